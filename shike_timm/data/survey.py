"""What a set of images holds, found by reading every one: sizes, modes, duplicates, what cannot be read."""
import hashlib
import io
import sys
from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset
from tqdm import tqdm

from ..errors import one_line
from .datasets import ImageSet
from .images import ImageDecoder

__all__ = ['Seen', 'alike', 'survey']

MAX_BITS = 3  # of 64 that differ between hashes of images that look alike


@dataclass
class Seen:
    """One image: its name, its label, a digest of its file or else of its pixels, and what it is or why it is none.

    What it looks like are the 64 bits of a perceptual hash, None where none was asked for.
    """

    name: str
    target: int
    digest: Optional[bytes] = None
    size: Optional[Tuple[int, int]] = None
    mode: str = ''
    extrema: Optional[Tuple[float, float]] = None
    look: Optional[int] = None
    error: Optional[str] = None


def _digest(content: Any) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def _inspect(seen: Seen, image: Image.Image, perceptual: bool) -> None:
    image.load()
    seen.size, seen.mode = image.size, image.mode
    if ImageDecoder.is_deep(image):  # whose range of values may be any
        seen.extrema = image.getextrema()
    if perceptual:
        import imagehash
        seen.look = int(str(imagehash.phash(ImageDecoder(1)(image))), 16)


class _Images(Dataset):
    """Every image of a set that can be indexed, as `Seen`."""

    def __init__(self, data: ImageSet, perceptual: bool):
        self.data = data
        self.perceptual = perceptual
        self.targets: Any = data.targets if data.targets is not None else getattr(data.dataset, 'targets', None)

    def __len__(self) -> int:
        return len(self.data.dataset)

    def _open(self, index: int) -> Tuple[Any, int]:
        """The file of an image, or the image where there is no file, and its label."""
        dataset = self.data.dataset
        if hasattr(dataset, 'files'):  # files that may be opened one at a time, or torchvision's images
            image = dataset.files.open(int(dataset.rows[index]))
            return getattr(image, 'fp', None) or image, int(self.targets[index])
        item, target = dataset[index]
        return item, int(target)

    def __getitem__(self, index: int) -> Seen:
        dataset = self.data.dataset
        name = dataset.filename(index) if hasattr(dataset, 'filename') else str(index)
        seen = Seen(name, -1 if self.targets is None else int(self.targets[index]))
        try:
            item, seen.target = self._open(index)
            if isinstance(item, Image.Image):
                _inspect(seen, item, self.perceptual)
                seen.digest = _digest(repr((item.size, item.mode)).encode() + item.tobytes())
            else:
                item.seek(0)
                content = item.read()
                item.close()
                seen.digest = _digest(content)
                with Image.open(io.BytesIO(content)) as image:
                    _inspect(seen, image, self.perceptual)
        except Exception as error:  # a decoder may raise anything for a damaged file
            seen.error = one_line(error)
        return seen


def _stream(data: ImageSet, perceptual: bool) -> Iterator[List[Seen]]:
    for index, (image, target) in enumerate(data.dataset):
        seen = Seen(str(index), int(target))
        _inspect(seen, image, perceptual)
        seen.digest = _digest(repr((image.size, image.mode)).encode() + image.tobytes())
        yield [seen]


def survey(data: ImageSet, num_workers: int = 0, perceptual: bool = False) -> List[Seen]:
    """Read every image of a set.

    Args:
        data: The set, without a transform.
        num_workers: Worker processes.
        perceptual: Also hash what images look like, which needs the package imagehash.

    Returns:
        What each image is, in order.
    """
    total, batches = None, _stream(data, perceptual)
    if not isinstance(data.dataset, IterableDataset):
        images, total = _Images(data, perceptual), len(data.dataset)
        batches = DataLoader(
            images, 64, num_workers=num_workers if total > 1000 else 0, collate_fn=list, generator=torch.Generator())
    found: List[Seen] = []
    with tqdm(total=total, desc='reading images', disable=not sys.stderr.isatty(), dynamic_ncols=True) as progress:
        for batch in batches:
            found += batch
            progress.update(len(batch))
    return found


def alike(looks: Sequence[int]) -> List[List[int]]:
    """Groups of positions whose perceptual hashes differ in no more than `MAX_BITS` bits from another of the group."""
    from scipy.sparse import coo_array  # which imagehash needs itself
    from scipy.sparse.csgraph import connected_components
    hashes, which = np.unique(np.array(looks, dtype=np.uint64), return_inverse=True)
    pairs = [np.empty((2, 0), dtype=np.int64)]
    # Cut into one part more than bits may differ, two such hashes have a part in common.
    width = 64 // (MAX_BITS + 1)
    for part in range(MAX_BITS + 1):
        keys = (hashes >> np.uint64(width * part)) & np.uint64(2 ** width - 1)
        order = np.argsort(keys, kind='stable')
        for rows in np.split(order, np.flatnonzero(np.diff(keys[order])) + 1):
            for place, row in enumerate(rows[:-1]):
                others = rows[place + 1:]
                bits = np.unpackbits((hashes[others] ^ hashes[row])[:, None].view(np.uint8), axis=1)
                near = others[bits.sum(1) <= MAX_BITS]
                pairs.append(np.stack([near, np.full_like(near, row)]))
    edges = np.concatenate(pairs, axis=1)
    graph = coo_array((np.ones(edges.shape[1], dtype=bool), tuple(edges)), shape=(len(hashes), len(hashes)))
    group_of = connected_components(graph, directed=False)[1]
    groups: Dict[int, List[int]] = {}
    for i, one in enumerate(which.tolist()):
        groups.setdefault(int(group_of[one]), []).append(i)
    return [group for group in groups.values() if len(group) > 1]
