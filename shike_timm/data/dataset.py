"""Sets of labelled images. An `ImageSet` can be indexed, a `StreamSet` only read in order."""
import hashlib
import logging
import os
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Callable, Iterable, Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from PIL import Image
from timm.data import IterableImageDataset
from torch.utils.data import Dataset

from ..errors import InputError
from .class_names import index_labels
from .config import SourceConfig
from .decode import ImageDecoder, create_decoder

_logger = logging.getLogger(__name__)

MAX_UNREADABLE = 0.01  # Largest share of a set's images that may prove unreadable while the set is used.


class Names(Sequence):
    """Names in one array of bytes, which worker processes share. So millions of names need no Python objects."""

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
    """A 64-bit number for each name. It is the same on every machine."""
    digests = b''.join(
        hashlib.blake2b(name.encode('utf-8', 'surrogateescape'), digest_size=8).digest() for name in names)
    return np.frombuffer(digests, dtype='<u8')


class ImageSource(ABC):
    """Images in a folder, an archive or a data set, one in each row."""

    images: Optional[np.ndarray] = None  # uint8 images [N, H, W, C] if all are in memory.

    def __init__(self, root: str = '', paths: Iterable[str] = ()):
        self.root = root  # The folder, archive or data set that holds the images.
        self.paths = Names(paths)  # Path of each image, unique. Empty if images have no names.

    @abstractmethod
    def open(self, row: int) -> Image.Image:
        """The image of a row, which need not be decoded yet."""

    def stamp(self, row: int) -> str:
        """A text that differs after the image of a row has changed. By default it is always the same."""
        return f'{self.root}|{row}'


@dataclass(eq=False)
class ImageSet(Dataset):
    """Labelled images that can be indexed: PIL images, or what `transform` makes of them, with their labels.

    An image that cannot be read is counted, and named in a warning the first time. In training another image of its
    class takes its place, so the classes stay as frequent as they are counted. In evaluation its item is None.
    """

    source: ImageSource
    targets: np.ndarray  # Label of each image [N].
    class_names: List[str]  # Class names in label order.
    decoder: ImageDecoder = ImageDecoder()
    rows: Any = None  # Row of each image in the source. By default all rows in order.
    groups: Optional[np.ndarray] = None  # Number of each image's group [N], None without groups.
    notes: List[str] = field(default_factory=list)  # What was left out, and why.
    origin: str = ''  # Where the set comes from, in words.
    transform: Optional[Callable] = field(default=None, init=False)
    replaces_unreadable: bool = field(default=False, init=False)  # As in training.

    is_stream = False

    def __post_init__(self) -> None:
        self.targets = np.asarray(self.targets, dtype=np.int64)
        self.rows = np.arange(len(self.targets)) if self.rows is None else self.rows
        self.class_names, self.notes = list(self.class_names), list(self.notes)
        # All workers share this mask.
        self.unreadable = torch.zeros(len(self.targets), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def class_counts(self) -> List[int]:
        """Images of each class."""
        return np.bincount(self.targets, minlength=len(self.class_names)).tolist()

    @cached_property
    def images(self) -> Optional[np.ndarray]:
        """uint8 images [N, H, W, C] if all are in memory, else None."""
        return None if self.source.images is None else self.source.images[self.rows]

    @property
    def has_paths(self) -> bool:
        """Whether the images have names that tell them apart."""
        return len(self.source.paths) > 0

    def filename(self, index: int) -> str:
        """Path of an image in its source, or its index if images have no names."""
        return self.source.paths[self.rows[index]] if self.has_paths else str(index)

    def filenames(self) -> List[str]:
        return [self.filename(index) for index in range(len(self))]

    def take(self, index: np.ndarray) -> 'ImageSet':
        """The set that has only the images at these positions."""
        groups = None if self.groups is None else self.groups[index]
        return replace(self, targets=self.targets[index], rows=self.rows[index], groups=groups)

    def relabel(self, labels: np.ndarray, class_names: Sequence[str]) -> 'ImageSet':
        """The same images, where label c becomes `labels[c]`."""
        return replace(self, targets=labels[self.targets], class_names=list(class_names))

    def open(self, index: int) -> Image.Image:
        """An image, which need not be decoded yet."""
        return self.source.open(int(self.rows[index]))

    def read(self, index: int) -> Image.Image:
        """An image, decoded. A damaged image raises whatever its decoder raises."""
        with self.open(index) as image:
            return self.decoder(image)

    def _try(self, index: int) -> Optional[Image.Image]:
        try:
            return self.read(index)
        except Exception as error:  # A decoder may raise any error for a damaged file.
            if not self.unreadable[index]:
                self.unreadable[index] = True
                _logger.warning(f"'{self.filename(index)}' cannot be read and is skipped: {error}")
            return None

    def __getitem__(self, index: int) -> Optional[Tuple[Any, int]]:
        image = self._try(index)
        if image is None and self.replaces_unreadable:
            same = np.flatnonzero(self.targets == self.targets[index])
            others = np.roll(same, -int(np.searchsorted(same, index)) - 1)
            image = next((image for image in map(self._try, others.tolist()) if image is not None), None)
            if image is None:
                raise OSError(f"No image of the class of '{self.filename(index)}' can be read any more")
        if image is None:
            return None
        return image if self.transform is None else self.transform(image), int(self.targets[index])

    def check_readable(self) -> None:
        """Raise an OSError if more than 1 % of the images turned out to be unreadable."""
        count = int(self.unreadable.sum())
        if count > MAX_UNREADABLE * len(self):
            first = int(self.unreadable.int().argmax())
            raise OSError(
                f"{count} of {len(self)} images cannot be read any more, the first is '{self.filename(first)}': "
                'check that the disk is there, and start again with --check-images')


class StreamSet(IterableImageDataset):
    """Labelled images of timm's `reader`, in the order in which they come. Some data sets have no class names."""

    is_stream = True
    has_paths = False
    images = targets = groups = class_counts = None
    origin = ''

    def __init__(
            self, reader: Any, decoder: Optional[ImageDecoder] = None, class_names: Optional[List[str]] = None,
    ):
        super().__init__(None, reader=reader)
        self.decoder = decoder or ImageDecoder()
        self.class_names = class_names
        self.notes: List[str] = []

    def __iter__(self) -> Iterator[Tuple[Any, Any]]:
        reader: Any = self.reader
        for image, target in reader:
            image = self.decoder(image)
            yield (
                image if self.transform is None else self.transform(image),
                target if self.target_transform is None else self.target_transform(target))

    def relabel(self, labels: np.ndarray, class_names: Sequence[str]) -> 'StreamSet':
        """The same images, where label c becomes `labels[c]`."""
        self.target_transform = labels.tolist().__getitem__
        self.class_names = list(class_names)
        return self

    def check_readable(self) -> None:
        """Does nothing, because an unreadable image ends a stream with an error."""


AnySet = Union[ImageSet, StreamSet]


class _MemoryImages(ImageSource):
    images: np.ndarray

    def __init__(self, images: np.ndarray):
        super().__init__()
        self.images = images

    def open(self, row: int) -> Image.Image:
        return Image.fromarray(self.images[row])


def in_memory_set(images: np.ndarray, targets: Any, class_names: Sequence[str]) -> ImageSet:
    """A set of uint8 images [N, H, W, C] in memory with labels [N]."""
    return ImageSet(_MemoryImages(images), targets, list(class_names), ImageDecoder(images.shape[-1]))


def _group_hashes(paths: Sequence[str], groups: Optional[Sequence[str]], key: str) -> np.ndarray:
    if groups is not None:
        return name_hashes(groups)
    try:
        pattern = re.compile(key)
    except re.error as error:
        raise InputError(f"--group-key '{key}' is neither a column nor a regular expression: {error}.") from error
    found = [pattern.search(path) for path in paths]
    if not any(found):
        raise InputError(
            f"--group-key '{key}' is no column, and is found in no path, such as '{paths[0]}': give another one.")
    # An image without a group is a group of its own. No group's name begins with a slash, so its name is not taken.
    return name_hashes([
        (match.group(1) if match.re.groups else match.group()) or '' if match else f'/{path}'
        for match, path in zip(found, paths)])


def label_images(
        config: SourceConfig, source: ImageSource, labels: Sequence[str], notes: Sequence[str] = (),
        groups: Optional[Sequence[str]] = None, order: Optional[Sequence[str]] = None, origin: str = '',
) -> ImageSet:
    """The set of a source's images with paths, in an order that only depends on the names of classes and files.

    `labels` are the class names of the images, and `groups` their groups, if the data has a column for them. `order`
    has the class names in label order. By default class names are sorted.
    """
    paths = list(source.paths)
    notes = list(notes)
    class_names, targets = index_labels(labels, config.class_map, order, notes)
    files = [path.rpartition('/')[2] for path in paths]
    rows = np.array(sorted(range(len(paths)), key=lambda i: (files[i], paths[i])), dtype=np.int64)
    rows = rows[np.argsort(targets[rows], kind='stable')]
    rows = rows[targets[rows] >= 0]
    groups_of = _group_hashes(paths, groups, config.group_key)[rows] if config.group_key else None
    return ImageSet(
        source, targets[rows], class_names, create_decoder(config), rows, groups_of, notes, origin)
