"""Image files in uncompressed tar archives or in a folder, by their paths."""
import os
import tarfile
from collections import Counter
from typing import Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
from PIL import Image

from ...errors import InputError, one_line
from ..class_names import first_few
from ..dataset import ImageSource
from ..decode import open_image

Member = Tuple[str, int, int]  # Name, first byte and length. The length of a folder is -1.
DEEPEST = 10  # Greatest depth of archives inside archives.


class FolderImages(ImageSource):
    """Image files at these paths below a folder."""

    def open(self, row: int) -> Image.Image:
        return open_image(os.path.join(self.root, self.paths[row]))

    def stamp(self, row: int) -> str:
        status = os.stat(os.path.join(self.root, self.paths[row]))
        return f'{self.paths[row]}|{status.st_size}|{status.st_mtime_ns}'


class TarImages(ImageSource):
    """Members of uncompressed tar archives. `places` [N, 3] has archive, first byte and length of each."""

    def __init__(self, root: str, paths: Sequence[str], places: np.ndarray, archives: Sequence[str] = ()):
        super().__init__(root, paths)
        self.places = places.reshape(-1, 3)
        self.archives = list(archives) or [root]

    def open(self, row: int) -> Image.Image:
        archive, start, length = self.places[row].tolist()
        with open(self.archives[archive], 'rb') as file:
            file.seek(start)
            return open_image(self.paths[row], file.read(length))

    def stamp(self, row: int) -> str:
        archive, start, length = self.places[row].tolist()
        return f'{self.paths[row]}|{start}|{length}|{os.stat(self.archives[archive]).st_mtime_ns}'


def _members(
        tar: tarfile.TarFile, links: Dict[str, str], prefix: str = '', offset: int = 0, depth: int = 0,
) -> Iterator[Member]:
    """Files and folders of an archive. Links are added to `links`. Pipes and devices count as empty files."""
    if depth > DEEPEST:
        raise tarfile.TarError(f'archives lie in one another more than {DEEPEST} deep')
    for member in tar:
        name = prefix + '/'.join(part for part in member.name.split('/') if part not in ('', '.'))
        links.pop(name, None)
        if member.isfile() and name.lower().endswith('.tar'):
            with tarfile.open(fileobj=tar.extractfile(member), mode='r:') as inner:
                yield from _members(inner, links, name[:-4] + '/', offset + member.offset_data, depth + 1)
        elif member.issym() or member.islnk():
            start = prefix if member.islnk() else name.rpartition('/')[0]
            links[name] = os.path.normpath(os.path.join(start, member.linkname))
        else:
            yield name, offset + member.offset_data, -1 if member.isdir() else member.size if member.isfile() else 0


def _follow(name: str, links: Dict[str, str]) -> str:
    """The path that a path leads to through links, or one of the links if they go round in a circle."""
    for _ in range(40):  # Linux also follows at most 40 links.
        parts = name.split('/')
        starts = ('/'.join(parts[:n]) for n in range(1, len(parts) + 1))
        link = next((start for start in starts if start in links), None)
        if link is None:
            break
        name = os.path.normpath(links[link] + name[len(link):])
    return name


def _with_links(members: Dict[str, Member], links: Dict[str, str]) -> Iterator[Member]:
    """The members of an archive as a file system would show them: links are followed, but not into their own folder."""
    folders: Dict[str, Dict[str, None]] = {'': {}}
    for path in (*members, *links):
        while path:
            folder, _, name = path.rpartition('/')
            folders.setdefault(folder, {})[name] = None
            path = folder
    waiting: List[Tuple[str, str, Tuple[str, ...]]] = [('', '', ('',))]
    while waiting:
        shown, folder, above = waiting.pop()
        for name in folders[folder]:
            path, place = (f'{start}/{name}'.lstrip('/') for start in (shown, folder))
            place = _follow(place, links)
            if place in above:
                continue
            if place in folders or place in members and members[place][2] < 0:
                folders.setdefault(place, {})
                yield path, 0, -1
                waiting.append((path, place, (*above, place)))
            else:
                yield (path, *members.get(place, ('', 0, 0))[1:])  # A link that leads nowhere is an empty file.


def tar_members(path: str, notes: List[str]) -> List[Member]:
    """Members of a tar archive and of the archives in it. Of equal names the last counts, and a note is added."""
    try:
        if not os.path.isfile(path):  # A pipe would make its reader wait.
            raise FileNotFoundError('it is no file')
        with tarfile.open(path, mode='r:') as tar:
            links: Dict[str, str] = {}
            members = list(_members(tar, links))
    except Exception as error:  # A damaged archive can make tarfile raise nearly any error.
        raise InputError(
            f"data-dir '{path}' cannot be read as an uncompressed tar archive ({one_line(error)}): unpack it and give "
            'the folder.') from error
    last = {member[0]: member for member in members if member[0] not in links}
    counts = Counter(name for name, _, length in members if length >= 0)
    again = sorted(name for name, count in counts.items() if count > 1)
    if again:
        number = sum(counts[name] - 1 for name in again)
        notes.append(f'{number} files of the archive that a later one of the same name replaces ({first_few(again)})')
    return list(_with_links(last, links) if links else last.values())


def open_files(root: str, paths: Sequence[str], members: Optional[Sequence[Member]] = None) -> ImageSource:
    """The image files at these paths in a folder, or in an archive with these members."""
    if members is None:
        return FolderImages(root, paths)
    places = {name: (0, start, length) for name, start, length in members if length >= 0}
    missing = next((path for path in paths if path not in places), None)
    if missing is not None:
        raise InputError(f"'{root}' has no member '{missing}': give paths as they are in the archive.")
    return TarImages(root, paths, np.array([places[path] for path in paths], dtype=np.int64))
