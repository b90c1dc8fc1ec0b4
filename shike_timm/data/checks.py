"""Reading all images of a set once, before training does: which cannot be read, and what range of values they use."""
import hashlib
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..errors import InputError, one_line
from .datasets import ImageSet
from .images import HIGHEST
from .table import ImageTable

__all__ = ['check_images', 'without_unreadable']

_logger = logging.getLogger(__name__)

MAX_NAMED = 20  # unreadable images

Seen = Tuple[int, str, Optional[Tuple[float, float, float]]]


class _Reader(Dataset):
    """Gives the index of an image, what is wrong with it, and of a deep one its extrema and the highest of its type."""

    def __init__(self, table: ImageTable, indices: List[int]):
        self.table = table
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Seen:
        index, deep = self.indices[position], None
        try:
            with self.table.files.open(int(self.table.rows[index])) as image:
                if self.table.decoder.is_deep(image):
                    low, high = image.getextrema()
                    deep = float(low), float(high), float(HIGHEST.get(image.mode, 65535))
                self.table.decoder(image)
        except Exception as error:  # a decoder may raise anything for a damaged file
            return index, one_line(error), None
        return index, '', deep


def _memory(table: ImageTable) -> Path:
    """Where what is known of the images of a folder or archive is kept between runs."""
    cache = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    key = hashlib.blake2b(os.path.abspath(table.files.root).encode('utf-8', 'surrogateescape'), digest_size=12)
    return Path(cache, 'shike_timm', f'images-{key.hexdigest()}.json')


def _recall(path: Path) -> Dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _remember(path: Path, known: Dict[str, Any]) -> None:
    temporary = path.with_name(f'{path.name}.{os.getpid()}')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(known))
        temporary.replace(path)
    except OSError:
        pass  # it is a matter of time alone


def _stamps(table: ImageTable) -> List[str]:
    def stamp(row: int) -> str:
        try:
            text = table.files.stamp(row)
        except OSError:
            return ''
        return hashlib.blake2b(text.encode('utf-8', 'surrogateescape'), digest_size=8).hexdigest()

    return [stamp(int(row)) for row in table.rows]


def check_images(table: ImageTable, num_workers: int = 0) -> Dict[int, str]:
    """Read all images, except those that were read before, by path, size and time.

    Args:
        table: The images.
        num_workers: Worker processes.

    Returns:
        What is wrong with each that cannot be read, by its index.
    """
    stamps = _stamps(table)
    path = _memory(table)
    known = _recall(path)
    faults: Dict[int, str] = {}
    # What was read is known by '' or the extrema of a deep image; a fault may have been the disk's.
    unknown = [i for i, stamp in enumerate(stamps) if known.get(stamp) != '' and not isinstance(known.get(stamp), list)]
    loader = DataLoader(
        _Reader(table, unknown), batch_size=32, num_workers=min(num_workers, -(-len(unknown) // 1000)),
        collate_fn=list, generator=torch.Generator())
    with tqdm(
            total=len(unknown), desc='checking images', leave=False, disable=not unknown or not sys.stderr.isatty(),
            dynamic_ncols=True) as progress:
        for batch in loader:
            for index, fault, deep in batch:
                if fault:
                    faults[index] = fault
                known[stamps[index]] = fault or list(deep or ()) or ''
            progress.update(len(batch))
    deep = [known[stamp] for stamp in stamps if isinstance(known[stamp], list)]
    known.pop('', None)
    if unknown:
        _remember(path, known)
    if deep and table.decoder.pixel_range is None:
        low, high, highest = (pick(values) for pick, values in zip((min, max, max), zip(*deep)))
        if high > highest or high <= highest / 8:
            _logger.warning(
                f'{len(deep)} images of more than 8 bits have values of {low:g} to {high:g} in a range of 0 to '
                f'{highest:g}: scale them with --pixel-range {low:g} {high:g}.')
    return faults


def without_unreadable(data: ImageSet, num_workers: int = 0) -> ImageSet:
    """A set less its unreadable images, which are named.

    Raises:
        InputError: If a class has no readable image.
    """
    table = data.dataset
    faults = check_images(table, num_workers)
    if not faults:
        return data
    bad = sorted(faults)
    for index in bad[:MAX_NAMED]:
        _logger.warning(f"'{table.filename(index)}' cannot be read and is left out: {faults[index]}")
    if len(bad) > MAX_NAMED:
        _logger.warning(f'{len(bad) - MAX_NAMED} more cannot be read and are left out.')
    left = data.take(np.setdiff1d(np.arange(len(table)), bad))
    assert left.class_counts and data.class_counts and data.class_names  # as of every table
    for label, (count, before) in enumerate(zip(left.class_counts, data.class_counts)):
        if before and not count:
            first = next(index for index in bad if table.targets[index] == label)
            raise InputError(
                f"None of the {before} images of class '{data.class_names[label]}' can be read, of "
                f"'{table.filename(first)}' because: {faults[first]}; mend them, or remove the class.")
    left.notes.append(
        f"{len(bad)} unreadable ({', '.join(table.filename(i) for i in bad[:3])}{', ...' if len(bad) > 3 else ''})")
    return left
