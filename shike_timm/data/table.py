"""Data sets of images that can be told apart by name, whatever they are kept in."""
import logging
from typing import Any, Callable, Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from PIL import Image
from timm.data.loader import fast_collate
from torch.utils.data import Dataset

from .images import ImageDecoder

__all__ = ['CheckedLoader', 'ImageTable', 'readable_collate']

_logger = logging.getLogger(__name__)

MAX_UNREADABLE = 0.01  # share of a set's images that may turn out unreadable while it is used


class ImageTable(Dataset):
    """Images with labels, as PIL images or what `transform` makes of them.

    An image that cannot be read is counted, and named the first time. In training another one of its class takes its
    place, so that classes stay as frequent as they are counted; in evaluation its place is None.

    Args:
        files: Gives the image of a row by `open`, and has `names` and `stamp`.
        targets: Class index of each image [N].
        decoder: Decodes the images.
        rows: Row of each image in `files`, all in order by default.
        groups: Number of the group of each image [N], None where there are no groups.
    """

    def __init__(
            self,
            files: Any,
            targets: Union[Sequence[int], np.ndarray],
            decoder: ImageDecoder,
            rows: Optional[np.ndarray] = None,
            groups: Optional[np.ndarray] = None,
    ):
        self.files = files
        self.targets = np.asarray(targets, dtype=np.int32)
        self.decoder = decoder
        self.rows = np.arange(len(self.targets), dtype=np.int32) if rows is None else rows
        self.groups = groups
        self.transform: Optional[Callable] = None
        self.is_training = False
        self.unreadable = torch.zeros(len(self.targets), dtype=torch.bool).share_memory_()  # by all workers

    def __len__(self) -> int:
        return len(self.targets)

    def filename(self, index: int) -> str:
        """Path of an image in what holds it."""
        return self.files.names[int(self.rows[index])]

    def take(self, index: np.ndarray, targets: Optional[np.ndarray] = None) -> 'ImageTable':
        """Some of the images, or all of them with other labels."""
        return ImageTable(
            self.files, self.targets[index] if targets is None else targets, self.decoder, self.rows[index],
            None if self.groups is None else self.groups[index])

    def read(self, index: int) -> Image.Image:
        """An image, decoded; whatever its decoder raises comes through."""
        with self.files.open(int(self.rows[index])) as image:
            return self.decoder(image)

    def _try(self, index: int) -> Optional[Image.Image]:
        try:
            return self.read(index)
        except Exception as error:  # a decoder may raise anything for a damaged file
            if not self.unreadable[index]:
                self.unreadable[index] = True
                _logger.warning(f"'{self.filename(index)}' cannot be read and is skipped: {error}")
            return None

    def _stand_in(self, index: int) -> Image.Image:
        same = np.flatnonzero(self.targets == self.targets[index])
        for other in np.roll(same, -int(np.searchsorted(same, index)) - 1):
            image = self._try(int(other))
            if image is not None:
                return image
        raise OSError(f"No image of the class of '{self.filename(index)}' can be read any more")

    def __getitem__(self, index: int) -> Optional[Tuple[Any, int]]:
        index = int(index)
        image = self._try(index)
        if image is None and self.is_training:
            image = self._stand_in(index)
        if image is None:
            return None
        return image if self.transform is None else self.transform(image), int(self.targets[index])

    def check_readable(self) -> None:
        """Check that no more than a few images turned out unreadable so far.

        Raises:
            OSError: If more than 1 % of them did.
        """
        count = int(self.unreadable.sum())
        if count > MAX_UNREADABLE * len(self):
            first = int(self.unreadable.int().argmax())
            raise OSError(
                f"{count} of {len(self)} images cannot be read any more, the first is '{self.filename(first)}': see "
                'that the disk is there, and begin anew with --check-images')


def readable_collate(channels: int, batch: List[Optional[Tuple[Any, int]]]) -> Tuple[torch.Tensor, torch.Tensor]:
    """timm's collation of what could be read; batches may be smaller, or empty, for what could not."""
    readable = [item for item in batch if item is not None]
    if readable:
        return fast_collate(readable)
    return torch.zeros(0, channels, 1, 1, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64)


class CheckedLoader:
    """A loader over a table that stops where too many images turn out unreadable.

    Args:
        loader: timm's loader, whose attributes it has.
        table: The data set it reads.
    """

    def __init__(self, loader: Any, table: ImageTable):
        self.loader = loader
        self.table = table

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
        for batch in self.loader:
            self.table.check_readable()
            yield batch
        self.table.check_readable()
