"""Which images of a training set are held out to evaluate on, by a rule that depends on nothing but their names."""
import csv
import math
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

import numpy as np

from ..errors import InputError
from .datasets import ImageSet
from .files import name_hashes
from .table import ImageTable

__all__ = ['check_labels', 'count_alike', 'covers', 'hold_out_listed', 'hold_out_share', 'read_sides', 'write_sides']

SIDES = ('train.csv', 'validation.csv')  # the columns are those that --train-list and --val-list read


def _sizes(counts: np.ndarray, share: float) -> np.ndarray:
    """Images of each class to hold out: a share, rounded up, but never all."""
    return np.minimum([math.ceil(round(share * count, 6)) for count in counts], np.maximum(counts - 1, 0)).astype(int)


def _choose(targets: np.ndarray, hashes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Mask of the images of each class with the least hashes."""
    order = np.lexsort((hashes, targets))
    counts = np.bincount(targets, minlength=len(sizes))
    rank = np.arange(len(targets)) - np.repeat(np.cumsum(counts) - counts, counts)
    chosen = np.zeros(len(targets), dtype=bool)
    chosen[order] = rank < sizes[targets[order]]
    return chosen


def _choose_groups(targets: np.ndarray, groups: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Mask of whole groups, those of the least hashes that no class has too much, or all its images, in."""
    left, remaining = sizes.copy(), np.bincount(targets, minlength=len(sizes))
    order = np.argsort(groups, kind='stable')
    chosen = np.zeros(len(targets), dtype=bool)
    for rows in np.split(order, np.flatnonzero(np.diff(groups[order])) + 1):
        classes, counts = np.unique(targets[rows], return_counts=True)
        # At least half of the group is still wanted, and every class keeps an image to train on.
        if 2 * np.minimum(counts, left[classes]).sum() >= len(rows) and (counts < remaining[classes]).all():
            chosen[rows] = True
            left[classes] = np.maximum(left[classes] - counts, 0)
            remaining[classes] -= counts
    return chosen


def _part(data: ImageSet, chosen: np.ndarray) -> Tuple[ImageSet, ImageSet]:
    return data.take(np.flatnonzero(~chosen)), data.take(np.flatnonzero(chosen))


def hold_out_share(data: ImageSet, share: float, name: str) -> Tuple[ImageSet, ImageSet]:
    """Hold a share of each class out of a training set.

    Of each class the images whose class and file name have the least hashes are chosen, so that no other class and no
    image added elsewhere changes the choice. Groups stay together.

    Args:
        data: Training set, with its class names.
        share: Share of each class, rounded up; one image at least stays in training.
        name: Name of the data set, for the error.

    Returns:
        What is left to train on, and what is held out.

    Raises:
        InputError: If the data set is a stream, or nothing is left to hold out.
    """
    table = data.dataset
    if isinstance(table, ImageTable):
        targets, groups = table.targets, table.groups
        files = [table.filename(i).rpartition('/')[2] for i in range(len(table))]
    elif data.images is not None and data.targets is not None:
        targets, groups, files = data.targets, None, [str(i) for i in range(len(data.targets))]
    else:
        raise InputError(
            f"holdout {share:g} needs a data set whose images can be told apart, and '{name}' is a stream: give it "
            'another split to evaluate on with --val-split, or drop it.')
    assert data.class_names is not None  # a stream alone may lack them
    sizes = _sizes(np.bincount(targets, minlength=len(data.class_names)), share)
    if groups is not None:
        chosen = _choose_groups(targets, groups, sizes)
    else:
        keys = [f'{data.class_names[target]}/{file}' for target, file in zip(targets, files)]
        chosen = _choose(targets, name_hashes(keys), sizes)
    if not chosen.any():
        raise InputError(
            f"Nothing of '{name}' can be held out to evaluate on, since each class has a single image or group: add "
            'images, or name others with --val-list.')
    train, test = _part(data, chosen)
    assert test.class_counts is not None  # which `take` counts
    bare = [name for name, count in zip(data.class_names, test.class_counts) if not count]
    if bare:
        word = 'class has' if len(bare) == 1 else 'classes have'
        test.notes.append(
            f"{len(bare)} {word} no image held out, for want of a second image or group "
            f"({', '.join(bare[:3])}{', ...' if len(bare) > 3 else ''})")
    by_group = ' by groups' if groups is not None else ''
    test.source = f'{share:g} of each class of the training set, held out{by_group} by name'
    return train, test


def write_sides(folder: Path, train: ImageSet, test: ImageSet) -> None:
    """Write the lists of both sides of a training set into a run folder, each in one step."""
    for name, data in zip(SIDES, (train, test)):
        assert data.class_names is not None  # as of every table
        temporary = folder / f'{name}.tmp'
        with temporary.open('w', newline='', encoding='utf-8', errors='surrogateescape') as file:
            rows = csv.writer(file)
            rows.writerow(('path', 'label'))
            rows.writerows(
                (data.dataset.filename(i), data.class_names[target]) for i, target in enumerate(data.dataset.targets))
        temporary.replace(folder / name)


def read_sides(folder: Optional[str]) -> Optional[List[Dict[str, str]]]:
    """The lists that `write_sides` wrote, labels by path; None where there are none."""
    paths = [Path(folder, name) for name in SIDES] if folder else []
    if not paths or not all(path.is_file() for path in paths):
        return None
    sides = []
    for path in paths:
        with path.open(newline='', encoding='utf-8', errors='surrogateescape') as file:
            sides.append({row['path']: row['label'] for row in csv.DictReader(file)})
    return sides


def covers(data: ImageSet, sides: Sequence[Dict[str, str]]) -> bool:
    """Whether a set is the one that a run parted: nearly all the images of its lists are there."""
    if not isinstance(data.dataset, ImageTable):
        return False
    names = {data.dataset.filename(i) for i in range(len(data.dataset))}
    found = sum(name in names for side in sides for name in side)
    return found >= 0.9 * sum(map(len, sides))


def check_labels(data: ImageSet, side: Dict[str, str], folder: str) -> None:
    """Check that images have the labels that a run has listed them with.

    Args:
        data: Images of the list.
        side: The list of those it was evaluated on.
        folder: Run folder, for the message.

    Raises:
        InputError: If one has another.
    """
    assert data.class_names is not None  # as of every table
    path = Path(folder, SIDES[1])
    for i, target in enumerate(data.dataset.targets):
        name, label = data.dataset.filename(i), data.class_names[target]
        if label != side[name]:
            raise InputError(
                f"'{name}' is of class '{label}' here and of '{side[name]}' in '{path}': give the options of training, "
                f'or --val-list {path}.')


def count_alike(data: ImageSet, side: Dict[str, str], moved: bool) -> int:
    """How many images of a set have the path of one of a list, or where they may be moved, its folder and name."""
    def ending(path: str) -> str:
        return '/'.join(path.split('/')[-2:]) if moved else path

    if not isinstance(data.dataset, ImageTable):
        return 0
    endings = {ending(path) for path in side}
    return sum(ending(data.dataset.filename(i)) in endings for i in range(len(data.dataset)))


def hold_out_listed(data: ImageSet, sides: Sequence[Dict[str, str]], folder: str) -> Tuple[ImageSet, ImageSet]:
    """Part a training set as a run did before.

    Args:
        data: Training set.
        sides: What `read_sides` gives.
        folder: Run folder, for messages.

    Raises:
        InputError: If none of the listed images is there.
    """
    names = [data.dataset.filename(i) for i in range(len(data.dataset))]
    parts = [np.flatnonzero([name in side for name in names]) for side in sides]
    if not all(map(len, parts)):
        raise InputError(
            f"None of the images that '{folder}' lists in {SIDES[not len(parts[1])]} is in the data: give "
            '--data-dir and --val-list as in training.')
    train, test = (data.take(part) for part in parts)
    new, lost = len(names) - sum(map(len, parts)), sum(map(len, sides)) - sum(map(len, parts))
    test.notes += [f'{count} {what}' for count, what in (
        (new, 'images that the run does not list'), (lost, 'images that it lists are not there')) if count]
    test.source = f"the list '{Path(folder, SIDES[1])}'"
    return train, test
