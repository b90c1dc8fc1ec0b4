"""Splits of a training set into images to train on and held-out images to evaluate on."""
import math
from dataclasses import replace
from typing import Sequence, Tuple, Union

import numpy as np

from ..errors import InputError
from .class_names import first_few
from .dataset import AnySet, ImageSet, StreamSet, name_hashes


def _choose(targets: np.ndarray, hashes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Mask of the `sizes[c]` images with the smallest hashes in each class c."""
    order = np.lexsort((hashes, targets))
    counts = np.bincount(targets, minlength=len(sizes))
    rank = np.arange(len(targets)) - np.repeat(np.cumsum(counts) - counts, counts)
    chosen = np.zeros(len(targets), dtype=bool)
    chosen[order] = rank < sizes[targets[order]]
    return chosen


def _choose_groups(targets: np.ndarray, groups: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Mask of whole groups. They are taken in the order of their hashes while they fit the size of each class."""
    left, remaining = sizes.copy(), np.bincount(targets, minlength=len(sizes))
    order = np.argsort(groups, kind='stable')
    chosen = np.zeros(len(targets), dtype=bool)
    for rows in np.split(order, np.flatnonzero(np.diff(groups[order])) + 1):
        classes, counts = np.unique(targets[rows], return_counts=True)
        # A group is taken if at least half of it is still wanted and every class keeps an image to train on.
        if 2 * np.minimum(counts, left[classes]).sum() >= len(rows) and (counts < remaining[classes]).all():
            chosen[rows] = True
            left[classes] = np.maximum(left[classes] - counts, 0)
            remaining[classes] -= counts
    return chosen


def _split(data: ImageSet, held_out: np.ndarray, origin: str) -> Tuple[ImageSet, ImageSet]:
    """The set to train on, and the set of the images that the mask holds out."""
    return data.take(np.flatnonzero(~held_out)), replace(data.take(np.flatnonzero(held_out)), origin=origin)


def hold_out_last(data: ImageSet, sizes: Union[Sequence[int], np.ndarray], option: str) -> Tuple[ImageSet, ImageSet]:
    """Hold out the last `sizes[c]` images of each class c. Returns the set to train on and the held-out set."""
    for c, (count, size) in enumerate(zip(data.class_counts, sizes)):
        if count <= size:
            raise InputError(
                f'{option} leaves class {c} with no training image of {count}: hold out fewer, or choose a lower '
                'imb-factor.')
    return _split(data, _choose(data.targets, -np.arange(len(data)), np.asarray(sizes)), 'held out of the training set')


def hold_out_share(data: AnySet, share: float, name: str, take_last: bool = False) -> Tuple[ImageSet, ImageSet]:
    """Hold out a share of each class, rounded up. Returns the set to train on and the held-out set.

    In each class the images with the smallest hashes of class and file name are held out, so other images hardly
    change the choice. With `take_last` the last images are held out. Without `take_last` groups stay together.
    """
    if isinstance(data, StreamSet):
        raise InputError(
            f"holdout {share:g} does not work with '{name}', which is a stream: name another split to evaluate on with "
            '--val-split, or leave --holdout out.')
    counts = np.array(data.class_counts)
    sizes = np.array([math.ceil(round(share * count, 6)) for count in counts])
    if take_last:
        return hold_out_last(data, sizes, f'holdout {share:g}')
    sizes = np.minimum(sizes, np.maximum(counts - 1, 0))
    if data.groups is not None:
        held_out = _choose_groups(data.targets, data.groups, sizes)
    else:
        keys = [
            f"{data.class_names[target]}/{path.rpartition('/')[2]}"
            for target, path in zip(data.targets, data.filenames())]
        held_out = _choose(data.targets, name_hashes(keys), sizes)
    if not held_out.any():
        raise InputError(
            f"Nothing of '{name}' can be held out to evaluate on, since each class has a single image or group: add "
            'images, or name others with --val-list.')
    by_group = '' if data.groups is None else ' by groups'
    origin = f'{share:g} of each class of the training set, held out{by_group} by name'
    train, evaluation = _split(data, held_out, origin)
    bare = [name for name, count in zip(data.class_names, evaluation.class_counts) if not count]
    if bare:
        word = 'class has' if len(bare) == 1 else 'classes have'
        evaluation.notes.append(
            f'{len(bare)} {word} no image held out, since a second image or group is missing ({first_few(bare)})')
    return train, evaluation
