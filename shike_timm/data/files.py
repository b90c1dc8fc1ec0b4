"""Files of images, in a folder or in a tar archive, by their paths."""
import hashlib
import io
import os
import tarfile
from typing import Any, Iterable, Iterator, List, Optional, Sequence, Tuple

import numpy as np
from PIL import Image

from ..errors import InputError, one_line

__all__ = ['ArchiveFiles', 'FolderFiles', 'Names', 'archive_members', 'name_hashes', 'open_files']


class Names(Sequence):
    """Text kept as one array of bytes, so that worker processes share it and millions are no Python objects.

    Args:
        names: What to keep; what is not valid Unicode in the names of files is kept as it is.
    """

    def __init__(self, names: Iterable[str]):
        encoded = [os.fsencode(name) for name in names]
        self.bytes = np.frombuffer(b''.join(encoded), dtype=np.uint8)
        self.ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: Any) -> Any:
        start, end = self.ends[index], self.ends[index + 1]
        return os.fsdecode(self.bytes[start:end].tobytes())


def name_hashes(names: Sequence[str]) -> np.ndarray:
    """A number of 64 bits for each name, the same everywhere and always."""
    digests = b''.join(
        hashlib.blake2b(name.encode('utf-8', 'surrogateescape'), digest_size=8).digest() for name in names)
    return np.frombuffer(digests, dtype='<u8')


class FolderFiles:
    """Files below a folder.

    Args:
        root: The folder.
        names: Paths of the files below it, with slashes.
    """

    def __init__(self, root: str, names: Iterable[str]):
        self.root = root
        self.names = names if isinstance(names, Names) else Names(names)

    def open(self, row: int) -> Image.Image:
        """The image of a row, not decoded yet."""
        return Image.open(os.path.join(self.root, self.names[row]))

    def stamp(self, row: int) -> str:
        """What changes when the file of a row does."""
        status = os.stat(os.path.join(self.root, self.names[row]))
        return f'{self.names[row]}|{status.st_size}|{status.st_mtime_ns}'


class ArchiveFiles:
    """Members of uncompressed tar archives, read at their places in them.

    Args:
        root: The archive, or the folder of several.
        names: Paths of the members.
        places: Number of the archive of each, the byte at which it begins and its length [N, 3].
        archives: Paths of the archives, that of the only one by default.
    """

    def __init__(self, root: str, names: Iterable[str], places: np.ndarray, archives: Sequence[str] = ()):
        self.root = root
        self.names = Names(names)
        self.places = places
        self.archives = archives or (root,)

    def open(self, row: int) -> Image.Image:
        """The image of a row, not decoded yet."""
        archive, start, length = self.places[row].tolist()
        with open(self.archives[int(archive)], 'rb') as file:
            file.seek(start)
            return Image.open(io.BytesIO(file.read(length)))

    def stamp(self, row: int) -> str:
        """What changes when the file of a row does."""
        archive, start, length = self.places[row].tolist()
        return f'{self.names[row]}|{start}|{length}|{os.stat(self.archives[int(archive)]).st_mtime_ns}'


def _members(tar: tarfile.TarFile, prefix: str = '', offset: int = 0) -> Iterator[Tuple[str, int, int]]:
    for member in tar:
        name = prefix + '/'.join(part for part in member.name.split('/') if part not in ('', '.'))
        if member.isfile() and name.lower().endswith('.tar'):
            with tarfile.open(fileobj=tar.extractfile(member), mode='r:') as inner:
                yield from _members(inner, name[:-4] + '/', offset + member.offset_data)
        elif member.isfile() or member.isdir():
            yield name, offset + member.offset_data, member.size if member.isfile() else -1


def archive_members(path: str) -> List[Tuple[str, int, int]]:
    """Members of a tar archive, and of those within it: name, first byte and length, which is -1 for a folder.

    Raises:
        InputError: If it cannot be read.
    """
    try:
        with tarfile.open(path, mode='r:') as tar:
            return list(_members(tar))
    except (tarfile.TarError, OSError) as error:
        raise InputError(
            f"data-dir '{path}' cannot be read as an uncompressed tar archive ({one_line(error)}): unpack it and give "
            'the folder.') from error


def open_files(root: str, names: Sequence[str], members: Optional[Sequence[Tuple[str, int, int]]] = None) -> Any:
    """Files of these paths in a folder or a tar archive.

    Args:
        root: The folder or archive.
        names: The paths.
        members: Members of the archive where they are known.

    Raises:
        InputError: If it does not exist, or the archive lacks one of them.
    """
    if os.path.isdir(root):
        return FolderFiles(root, names)
    places = {name: (0, start, length) for name, start, length in members or archive_members(root) if length >= 0}
    missing = next((name for name in names if name not in places), None)
    if missing is not None:
        raise InputError(f"'{root}' has no member '{missing}': give paths as they are in the archive.")
    return ArchiveFiles(root, names, np.array([places[name] for name in names], dtype=np.int64).reshape(-1, 3))
