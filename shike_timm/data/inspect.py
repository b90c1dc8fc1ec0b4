"""Reads every image of a set: before training, for `shike describe` and for `shike predict`."""
import hashlib
import io
import itertools
import json
import logging
import os
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import PIL
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from ..devices import limit_workers
from ..errors import InputError, one_line
from ..files import write_text
from .class_names import first_few
from .dataset import AnySet, ImageSet, StreamSet
from .decode import HIGHEST, ImageDecoder, find_turn, image_extensions
from .workers import create_loader

_logger = logging.getLogger(__name__)

MAX_NAMED = 20  # Unreadable images that a warning names.
MAX_BITS = 3  # Two images look alike if at most this many of their 64 hash bits differ.


@dataclass(eq=False)
class ImageReader(Dataset):
    """Opens images. Each item is the result of `use` and None, or None and the fault if the image cannot be read."""

    open_image: Callable[[Any], Image.Image]
    use: Callable[[Image.Image], Any]
    indices: Sequence[Any]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Tuple[Any, Optional[str]]:
        try:
            with self.open_image(self.indices[position]) as image:
                return self.use(image), None
        except Exception as error:  # A decoder may raise any error for a damaged file.
            return None, one_line(error)


def _read_all(reader: ImageReader, workers: int, title: str) -> Iterator[Tuple[Any, Optional[str]]]:
    """The items of a reader in order, with a progress bar on a terminal."""
    workers = min(limit_workers(workers), -(-len(reader) // 1000))
    hidden = None if len(reader) else True  # None shows the bar on a terminal alone.
    with tqdm(total=len(reader), desc=title, leave=False, disable=hidden, dynamic_ncols=True) as progress:
        for batch in create_loader(reader, 32, workers, list):
            yield from batch
            progress.update(len(batch))


def _check(decoder: ImageDecoder, image: Image.Image) -> Tuple[float, ...]:
    """Decode an image. Returns the extrema of a deep image and the highest value of its type, otherwise ()."""
    deep: Tuple[float, ...] = ()
    if decoder.is_deep(image):
        low, high = image.getextrema()
        deep = float(low), float(high), float(HIGHEST.get(image.mode, 65535))  # pyright: ignore[reportArgumentType]
    decoder(image)
    return deep


def _memory(data: ImageSet) -> Path:
    """The file that records which images of a folder or archive were read before."""
    cache = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    key = hashlib.blake2b(os.path.abspath(data.source.root).encode('utf-8', 'surrogateescape'), digest_size=12)
    return Path(cache, 'shike_timm', f'images-{key.hexdigest()}.json')


def _stamp(data: ImageSet, index: int) -> str:
    """A digest of what decides whether an image can be read. It is empty if the file is missing."""
    try:
        text = f'{data.source.stamp(int(data.rows[index]))}|{data.decoder}|{PIL.__version__}|{len(image_extensions())}'
    except (OSError, ValueError):  # A path with a null byte is a ValueError.
        return ''
    return hashlib.blake2b(text.encode('utf-8', 'surrogateescape'), digest_size=8).hexdigest()


def find_unreadable(data: ImageSet, workers: int = 0, anew: bool = False) -> Dict[int, str]:
    """The fault of each unreadable image by its index. Images that were readable before are read only if `anew`."""
    stamps = [_stamp(data, index) for index in range(len(data))]
    path = _memory(data)
    known: Dict[str, Any] = {}
    with suppress(OSError, ValueError):
        known = json.loads(path.read_text())
    faults: Dict[int, str] = {}
    # The record of a readable image is '', or its extrema if it is deep. Images with a recorded fault are read again,
    # since the disk may have caused the fault.
    unknown = [
        i for i, stamp in enumerate(stamps)
        if anew or known.get(stamp) != '' and not isinstance(known.get(stamp), list)]
    reader = ImageReader(data.open, partial(_check, data.decoder), unknown)
    for index, (deep, fault) in zip(unknown, _read_all(reader, workers, 'checking images')):
        if fault:
            faults[index] = fault
        known[stamps[index]] = fault or list(deep or ()) or ''
    deep = [known[stamp] for stamp in stamps if isinstance(known[stamp], list)]
    known.pop('', None)
    if unknown:
        with suppress(OSError):  # Without the file the images are read again next time. Nothing else is lost.
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(known))
    if deep and data.decoder.pixel_range is None:
        low, high, highest = (pick(values) for pick, values in zip((min, max, max), zip(*deep)))
        if high > highest or high <= highest / 8:
            _logger.warning(
                f'{len(deep)} images of more than 8 bits have values of {low:g} to {high:g} in a range of 0 to '
                f'{highest:g}: scale them with --pixel-range {low:g} {high:g}.')
    return faults


def exclude_unreadable(data: ImageSet, workers: int = 0, anew: bool = False) -> ImageSet:
    """A set without its unreadable images. Warnings name them. At least one image of each class must be left."""
    faults = find_unreadable(data, workers, anew)
    if not faults:
        return data
    bad = sorted(faults)
    for index in bad[:MAX_NAMED]:
        _logger.warning(f"'{data.filename(index)}' cannot be read and is left out: {faults[index]}")
    if len(bad) > MAX_NAMED:
        _logger.warning(f'{len(bad) - MAX_NAMED} more cannot be read and are left out.')
    left = data.take(np.setdiff1d(np.arange(len(data)), bad))
    for label, (count, before) in enumerate(zip(left.class_counts, data.class_counts)):
        if before and not count:
            first = next(index for index in bad if data.targets[index] == label)
            raise InputError(
                f"None of the {before} images of class '{data.class_names[label]}' can be read (the first is "
                f"'{data.filename(first)}': {faults[first]}): replace them, or remove the class.")
    left.notes.append(f'{len(bad)} unreadable ({first_few([data.filename(i) for i in bad])})')
    return left


@dataclass
class Inspected:
    """The facts of an image."""

    name: str = ''  # Path of the image, or its index if it has no path.
    target: int = -1
    label: str = ''  # Name of its class, or its target if the class has no name.
    group: Optional[int] = None  # Number of its group, if there are groups.
    digest: Optional[bytes] = None  # Digest of its file, or of its pixels if there is no file.
    size: Optional[Tuple[int, int]] = None
    mode: str = ''
    extrema: Any = None  # Lowest and highest value of a deep image.
    is_turned: bool = False  # Whether its EXIF orientation turns it.
    look: Optional[int] = None  # Perceptual hash of 64 bits, if asked for.
    error: Optional[str] = None  # Why it cannot be read.


def _digest(content: Any) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def _inspect(perceptual: bool, image: Image.Image) -> Inspected:
    found, file = Inspected(), getattr(image, 'fp', None)
    try:
        if file is not None:
            file.seek(0)
            content = file.read()
            found.digest = _digest(content)
            image = Image.open(io.BytesIO(content))
        image.load()
        found.size, found.mode, found.is_turned = image.size, image.mode, find_turn(image) is not None
        if ImageDecoder.is_deep(image):
            found.extrema = image.getextrema()
        if perceptual:
            import imagehash
            found.look = int(str(imagehash.phash(ImageDecoder(1)(image))), 16)
        if file is None:
            found.digest = _digest(repr((image.size, image.mode)).encode() + image.tobytes())
    except Exception as error:  # A decoder may raise any error for a damaged file.
        found.error = one_line(error)
    return found


def inspect_images(data: AnySet, workers: int = 0, perceptual: bool = False) -> List[Inspected]:
    """The facts of each image of a set, in order. Perceptual hashes need the package imagehash."""
    inspect, names = partial(_inspect, perceptual), data.class_names or ()
    if isinstance(data, StreamSet):
        found = [(inspect(image), str(index), int(target), None) for index, (image, target) in enumerate(data)]
    else:
        reader = ImageReader(data.open, inspect, range(len(data)))
        groups = [None] * len(data) if data.groups is None else data.groups.tolist()
        found = [
            (one or Inspected(error=error), data.filename(index), int(data.targets[index]), groups[index])
            for index, (one, error) in enumerate(_read_all(reader, workers, 'reading images'))]
    return [
        replace(one, name=name, target=target, group=group,
                label=names[target] if 0 <= target < len(names) else str(target))
        for one, name, target, group in found]


def find_similar(looks: Sequence[int]) -> List[List[int]]:
    """Groups of positions whose perceptual hashes differ in at most `MAX_BITS` bits from another of the group."""
    from scipy.sparse import coo_array  # imagehash requires scipy.
    from scipy.sparse.csgraph import connected_components
    hashes, which = np.unique(np.array(looks, dtype=np.uint64), return_inverse=True)
    ones = np.unpackbits(np.arange(2 ** 16, dtype=np.uint16)[:, None].view(np.uint8), axis=1).sum(1)
    pairs = [np.empty((2, 0), dtype=np.int64)]
    # The 64 bits are split into 2 * MAX_BITS parts. Hashes that differ in up to MAX_BITS bits agree in half of these.
    parts = [sum(1 << bit for bit in range(start, 64, 2 * MAX_BITS)) for start in range(2 * MAX_BITS)]
    for some in itertools.combinations(parts, MAX_BITS):
        keys = hashes & np.uint64(sum(some))
        order = np.argsort(keys)
        keys, first, distance = keys[order], np.arange(len(keys)), 0
        while len(first):  # Pairs of equal keys, first of neighbours in the order, then of those further away.
            distance += 1
            first = first[:np.searchsorted(first, len(keys) - distance)]
            first = first[keys[first] == keys[first + distance]]
            one, other = order[first], order[first + distance]
            near = ones[(hashes[one] ^ hashes[other]).view(np.uint16).reshape(-1, 4)].sum(1) <= MAX_BITS
            pairs.append(np.stack([one[near], other[near]]))
    edges = np.concatenate(pairs, axis=1)
    graph = coo_array((np.ones(edges.shape[1], dtype=bool), tuple(edges)), shape=(len(hashes), len(hashes)))
    group_of = connected_components(graph, directed=False)[1]
    groups: Dict[int, List[int]] = {}
    for i, one in enumerate(which.tolist()):
        groups.setdefault(int(group_of[one]), []).append(i)
    return [group for group in groups.values() if len(group) > 1]
