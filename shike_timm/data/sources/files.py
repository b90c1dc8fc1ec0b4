"""Image files in a folder or in uncompressed tar archives, by their paths."""
import io
import os
import tarfile
from collections import Counter
from typing import Iterator, List, Optional, Sequence, Tuple

import numpy as np
from PIL import Image

from ...errors import InputError, one_line
from ..class_names import first_few
from ..dataset import ImageSource, Names
from ..decode import open_image

Member = Tuple[str, int, int]  # Name, first byte and length. The length of a folder is -1.
DEEPEST = 10  # Archives in one another.


class FolderImages(ImageSource):
    """Image files at these paths below a folder."""

    def __init__(self, root: str, paths: Sequence[str]):
        self.root = root
        self.paths = Names(paths)

    def open(self, row: int) -> Image.Image:
        return open_image(os.path.join(self.root, self.paths[row]))

    def stamp(self, row: int) -> str:
        status = os.stat(os.path.join(self.root, self.paths[row]))
        return f'{self.paths[row]}|{status.st_size}|{status.st_mtime_ns}'


class TarImages(ImageSource):
    """Members of uncompressed tar archives: the archive, first byte and length of each are its place [N, 3]."""

    def __init__(self, root: str, paths: Sequence[str], places: np.ndarray, archives: Sequence[str] = ()):
        self.root = root
        self.paths = Names(paths)
        self.places = places.reshape(-1, 3)
        self.archives = list(archives) or [root]

    def open(self, row: int) -> Image.Image:
        archive, start, length = self.places[row].tolist()
        with open(self.archives[archive], 'rb') as file:
            file.seek(start)
            return Image.open(io.BytesIO(file.read(length)))

    def stamp(self, row: int) -> str:
        archive, start, length = self.places[row].tolist()
        return f'{self.paths[row]}|{start}|{length}|{os.stat(self.archives[archive]).st_mtime_ns}'


def _members(tar: tarfile.TarFile, prefix: str = '', offset: int = 0, depth: int = 0) -> Iterator[Member]:
    if depth > DEEPEST:
        raise tarfile.TarError(f'archives lie in one another more than {DEEPEST} deep')
    for member in tar:
        name = prefix + '/'.join(part for part in member.name.split('/') if part not in ('', '.'))
        if member.isfile() and name.lower().endswith('.tar'):
            with tarfile.open(fileobj=tar.extractfile(member), mode='r:') as inner:
                yield from _members(inner, name[:-4] + '/', offset + member.offset_data, depth + 1)
        elif member.isfile() or member.isdir():
            yield name, offset + member.offset_data, member.size if member.isfile() else -1


def tar_members(path: str, notes: List[str]) -> List[Member]:
    """Members of a tar archive and of the archives in it. Of those with one name the last counts, as a note says."""
    try:
        if not os.path.isfile(path):  # A pipe would make its reader wait.
            raise FileNotFoundError('it is no file')
        with tarfile.open(path, mode='r:') as tar:
            members = list(_members(tar))
    except Exception as error:  # A damaged archive can make tarfile raise nearly anything.
        raise InputError(
            f"data-dir '{path}' cannot be read as an uncompressed tar archive ({one_line(error)}): unpack it and give "
            'the folder.') from error
    last = {member[0]: member for member in members}
    counts = Counter(name for name, _, length in members if length >= 0)
    again = sorted(name for name, count in counts.items() if count > 1)
    if again:
        number = sum(counts[name] - 1 for name in again)
        notes.append(f'{number} files of the archive that a later one of the same name replaces ({first_few(again)})')
    return list(last.values())


def open_files(
        root: str, paths: Sequence[str], notes: List[str], members: Optional[Sequence[Member]] = None) -> ImageSource:
    """The image files at these paths in a folder, or in an archive whose members may be known."""
    if os.path.isdir(root):
        return FolderImages(root, paths)
    members = tar_members(root, notes) if members is None else members
    places = {name: (0, start, length) for name, start, length in members if length >= 0}
    missing = next((path for path in paths if path not in places), None)
    if missing is not None:
        raise InputError(f"'{root}' has no member '{missing}': give paths as they are in the archive.")
    return TarImages(root, paths, np.array([places[path] for path in paths], dtype=np.int64))
