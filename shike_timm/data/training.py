"""What a run trains and is evaluated on, put together from the registry's data sets."""
import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import numpy as np

from ..errors import InputError
from .checks import without_unreadable
from .datasets import DataRequest, DatasetEntry, ImageSet, find_dataset, match_classes, read_class_stats
from .holdout import (
    SIDES,
    check_labels,
    count_alike,
    covers,
    hold_out_listed,
    hold_out_share,
    read_sides,
    write_sides,
)
from .table import ImageTable
from .timm_sets import STREAMS

__all__ = ['TrainingData', 'check_request', 'create_eval_dataset', 'load_training_data']

_logger = logging.getLogger(__name__)

HOLDOUT = 0.2  # where nothing else is given to evaluate on
CHECKED = 100_000  # images that are read before training unless that is asked for or not
_UNUSED_IN_MEMORY = ('class_map', 'class_depth', 'group_key', 'input_key', 'target_key')


@dataclass
class TrainingData:
    """A training set, the set it is evaluated on, and what the training set says of the classes.

    Attributes:
        train: Training set.
        test: Evaluation split.
        class_counts: Training images of each class, all positive.
        class_names: Names of the classes in label order.
        shot_counts: Images of each class that make it one of many, medium or few: with those that are held out.
        holdout: Share of each class that is held out.
        is_parted: Whether names alone tell both sides apart, which are held out or listed.
    """

    train: ImageSet
    test: ImageSet
    class_counts: List[int]
    class_names: List[str]
    shot_counts: List[int] = field(default_factory=list)
    holdout: float = 0.
    is_parted: bool = False

    def __post_init__(self) -> None:
        self.shot_counts = self.shot_counts or self.class_counts

    @property
    def num_classes(self) -> int:
        return len(self.class_counts)

    def write_sides(self, folder: Path) -> None:
        """Write lists of both sides into a run folder, where a table was parted by its names and there are none yet."""
        if self.is_parted and isinstance(self.train.dataset, ImageTable) and read_sides(str(folder)) is None:
            write_sides(folder, self.train, self.test)

    def describe(self) -> str:
        """What was found, in a line."""
        counts, names = self.class_counts, self.class_names
        largest, smallest = max(counts), min(counts)
        line = (
            f"Data: {sum(counts)} training images of {len(counts)} classes, from {largest} of "
            f"'{names[counts.index(largest)]}' to {smallest} of '{names[counts.index(smallest)]}', imbalance factor "
            f'{largest / smallest:.4g}.')
        number = f'{sum(self.test.class_counts)} images' if self.test.class_counts else 'images'
        line += f" Evaluation: {number}, {self.test.source or 'a split of its own'}."
        notes = list(dict.fromkeys([*self.train.notes, *self.test.notes]))
        return line + (f" Left out: {'; '.join(notes)}." if notes else '')


def _refuse(request: DataRequest, names: Sequence[str], why: str) -> None:
    for name in names:
        value = getattr(request, name)
        if value != getattr(DataRequest, name):
            raise InputError(f"{name.replace('_', '-')} {value!r} is {why}: drop it.")


def check_request(request: DataRequest, entry: DatasetEntry) -> None:
    """Check that a training set can do what is asked of it.

    Raises:
        InputError: If it cannot, or options contradict each other.
    """
    what = request.name or request.root
    if not entry.has_imb_factor:
        _refuse(request, ('imb_factor', 'imb_type', 'imb_seed'), f"for the *_lt data sets, and '{what}' is none")
    if entry.eval_split:
        splits = ('train_split', 'val_split') if request.val_split != entry.eval_split else ('train_split',)
        _refuse(request, splits, f"not for '{what}', whose splits are fixed")
    if not (request.name or request.train_list or request.val_list):
        _refuse(request, ('input_key', 'target_key'), f"for lists, and '{what}' is a folder")
    if not request.name.lower().startswith(STREAMS):
        _refuse(request, ('train_num_samples', 'val_num_samples'), f"for streams, and '{what}' is none")
    if request.class_depth and request.train_list:
        raise InputError(
            f"class-depth {request.class_depth} is for folders, and the list '{request.train_list}' says the classes: "
            'drop one of them.')
    if request.val_per_class and not entry.has_imb_factor:
        raise InputError(
            f"val-per-class {request.val_per_class} needs one of the *_lt data sets, not '{what}': drop it.")
    if request.holdout and request.val_per_class:
        raise InputError(
            f'holdout {request.holdout:g} and val-per-class {request.val_per_class} contradict each other: drop one.')
    if request.holdout and request.val_list:
        raise InputError(
            f"holdout {request.holdout:g} and val-list '{request.val_list}' contradict each other: drop one.")
    if request.class_stats and entry.has_imb_factor:
        raise InputError(
            f"class-stats '{request.class_stats}' is not for '{what}', whose counts follow its imb-factor: drop it.")
    if request.name and entry.num_classes is None and (request.train_list or request.val_list):
        raise InputError(
            f"List '{request.train_list or request.val_list}' is of images in a folder, and dataset '{what}' is none: "
            'drop one of them.')


def _checked(data: ImageSet, request: DataRequest) -> ImageSet:
    if data.images is not None and data.images.shape[-1] != request.in_chans:
        raise InputError(
            f"'{request.name}' has images of {data.images.shape[-1]} channels, not of {request.in_chans}: leave "
            '--in-chans out.')
    if data.images is not None:
        _refuse(request, _UNUSED_IN_MEMORY, f"not for '{request.name}', read as it is")
    wanted = request.check_images
    if isinstance(data.dataset, ImageTable) and (len(data.dataset) <= CHECKED if wanted is None else wanted):
        return without_unreadable(data, request.workers)
    return data


def _count_shared_groups(train: ImageSet, test: ImageSet) -> int:
    one, other = (getattr(data.dataset, 'groups', None) for data in (train, test))
    return 0 if one is None or other is None else int(np.isin(np.unique(one), other).sum())


def _warn_of_trained(data: ImageSet, trained: Dict[str, str], request: DataRequest) -> None:
    """Tell of images that the list of a run's training side seems to have; they may lie elsewhere by now."""
    if alike := count_alike(data, trained, data.is_whole):
        _logger.warning(
            f"{alike} images of '{request.name or request.root}' have the "
            f"{'folder and the name' if data.is_whole else 'path'} of one that '{request.sides}' was trained on: "
            f"unless they are others, its figures are too good; '{Path(request.sides or '', SIDES[1])}' lists those "
            'held out.')


def _split_words(request: DataRequest) -> str:
    return f"the {request.val_split} split of '{request.name or request.root}'"


def load_training_data(name: str, root: Optional[str] = None, **options: Any) -> TrainingData:
    """Load a training set and what it is evaluated on, part of which it holds out where there is nothing else.

    Args:
        name: Name in the registry, any name `timm.data.create_dataset` reads, or '' for a folder, an archive or lists.
        root: Folder of the data.
        **options: Other fields of `DataRequest`; with `class_names` it must have those very classes.

    Raises:
        InputError: If data is missing or damaged, a class has no training image, there is one class alone, or options
            contradict each other.
    """
    entry, request = find_dataset(name), DataRequest(name, root, **options)
    check_request(request, entry)
    what = f"'{name or root}'"
    train, test = entry.load_train(request)
    stats, counts = request.class_stats, train.class_counts
    if stats:
        counts, stats_names = read_class_stats(stats)
        train.class_names = train.class_names or stats_names
        if train.class_counts and counts != train.class_counts:
            _logger.warning(
                f"class-stats '{stats}' counts {sum(counts)} images, but {what} has {sum(train.class_counts)}, or its "
                'classes have other numbers: those of the file are taken.')
    if counts is None:
        raise InputError(
            f"dataset '{name}' does not list its labels, so its classes cannot be counted: use a folder of images, or "
            'give their counts with --class-stats.')
    named = len(train.class_names or counts)
    if named != len(counts):
        raise InputError(
            f"'{stats or name or root}' counts {len(counts)} classes, but {named} have names: give what fits.")
    if request.class_names:
        train = match_classes(replace(train, class_counts=counts), request.class_names, what, all_of_them=True)
        counts = train.class_counts or counts
    names = train.class_names or [str(c) for c in range(len(counts))]
    if min(counts) < 1:
        bare = names[counts.index(min(counts))]
        raise InputError(f"Class '{bare}' has no training image: add some, or remove the class.")
    if len(counts) < 2:
        raise InputError(
            f"{what} has a single class, '{names[0]}', and nothing to tell it from: give a folder of several.")
    train = _checked(train, request)
    if not stats:
        counts = train.class_counts or counts
    shot_counts, holdout = counts, request.holdout
    if test is None and not holdout and not train.is_whole:
        test = entry.load_eval(replace(request, class_names=train.class_names))
        if test is not None and stats:
            test.class_names = test.class_names or train.class_names
    sides = read_sides(request.sides)
    if test is not None:
        test = _checked(match_classes(test, names, _split_words(request)), request)
        if sides and request.val_list:
            _warn_of_trained(test, sides[0], request)
        if shared := _count_shared_groups(train, test):
            _logger.warning(
                f"{shared} groups of --group-key '{request.group_key}' are in training and in evaluation: figures are "
                'too good, and shike describe names them.')
        if holdout:
            assert test.class_counts is not None  # as of all that is held out
            shot_counts = [kept + held for kept, held in zip(counts, test.class_counts)]
    else:
        holdout = holdout or HOLDOUT
        if sides and request.sides:
            train, test = hold_out_listed(train, sides, request.sides)
        else:
            train, test = hold_out_share(train, holdout, name or str(root))
        counts = train.class_counts or counts
    return TrainingData(
        train, test, counts, names, shot_counts, holdout, bool(holdout or request.train_list or request.val_list))


def create_eval_dataset(
        name: str,
        root: Optional[str] = None,
        split: str = 'validation',
        download: bool = False,
        class_names: Optional[List[str]] = None,
        **options: Any,
) -> ImageSet:
    """Load an evaluation split alone.

    Args:
        name: As for `load_training_data`.
        root: Folder of the data.
        split: Split to evaluate on, for data sets that have several.
        download: Download what is missing, where the data set can.
        class_names: The model's classes in label order; those of the data are matched to them by name.
        **options: Other fields of `DataRequest`; of a data set without an evaluation split, what the run folder
            `sides` lists as held out is taken.

    Raises:
        InputError: If data is missing or damaged, or a class is not among the model's.
    """
    request = DataRequest(name, root, val_split=split, download=download, class_names=class_names, **options)
    entry, sides = find_dataset(name), read_sides(request.sides)
    check_request(request, entry)
    data = entry.load_eval(request)
    if data is None and sides:
        data, _ = entry.load_train(request)
        data.is_whole = data.is_training = True
    if sides and request.sides and data is not None:
        if data.is_whole and covers(data, sides):
            _, data = hold_out_listed(data, sides, request.sides)
            check_labels(data, sides[1], request.sides)
            data.is_training = False
        elif data.is_whole or request.val_list or not name:  # other sets may number each split's images alike
            _warn_of_trained(data, sides[0], request)
    if data is None or data.is_training:
        raise InputError(
            f"'{name or root}' has no {split} split: name the one to evaluate on with --val-split or --val-list.")
    if data.class_names is None and request.class_stats:
        data.class_names = read_class_stats(request.class_stats)[1]
    if class_names:
        data = match_classes(data, class_names, _split_words(request))
    return _checked(data, request)
