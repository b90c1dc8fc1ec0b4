"""Loads and checks the training set and the evaluation split of a configuration, and matches them by class names."""
import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import List, Optional, Sequence, Type, Union

import numpy as np

from ..errors import InputError
from ..options import options
from .class_names import match_names, read_class_stats
from .config import SourceConfig
from .dataset import AnySet, ImageSet, StreamSet
from .holdout import hold_out_share
from .inspect import exclude_unreadable
from .registry import DataSource, find_dataset
from .split_lists import SplitLists, write_split_lists

_logger = logging.getLogger(__name__)

HOLDOUT = 0.2  # Share of each class that is held out if there is nothing else to evaluate on.
MAX_CHECKED = 100_000  # Larger sets are read before training only with --check-images.
STREAMS = ('hfids/', 'tfds/', 'wds/')
UNUSED_IN_MEMORY = ('class_map', 'class_depth', 'group_key', 'input_key', 'target_key')


@dataclass
class TrainingData:
    """A training set, the set that it is evaluated on, and its classes."""

    train: AnySet
    test: AnySet
    class_counts: List[int]  # Training images of each class, all positive.
    class_names: List[str]  # Class names in label order.
    # Images of each class, including held-out images. They decide whether a class is many-, medium- or few-shot.
    shot_counts: List[int] = field(default_factory=list)
    holdout: float = 0.  # Share of each class that is held out.
    is_split_by_path: bool = False  # Whether only paths tell the two sets apart (images held out or listed).

    def __post_init__(self) -> None:
        self.shot_counts = self.shot_counts or self.class_counts

    @property
    def num_classes(self) -> int:
        return len(self.class_counts)

    def write_split_lists(self, folder: Path) -> None:
        """Write lists of both sets into a run folder, if only paths tell the sets apart and it has no lists yet."""
        train, test = self.train, self.test
        if (self.is_split_by_path and isinstance(train, ImageSet) and isinstance(test, ImageSet) and train.has_paths
                and SplitLists.find(folder) is None):
            write_split_lists(folder, train, test)

    def describe(self) -> str:
        """One line about the data that was found."""
        counts, names = self.class_counts, self.class_names
        largest, smallest = max(counts), min(counts)
        line = (
            f"Data: {sum(counts)} training images of {len(counts)} classes, from {largest} of "
            f"'{names[counts.index(largest)]}' to {smallest} of '{names[counts.index(smallest)]}', imbalance factor "
            f'{largest / smallest:.4g}.')
        number = f'{sum(self.test.class_counts)} images' if self.test.class_counts else 'images'
        line += f" Evaluation: {number}, {self.test.origin or 'a split of its own'}."
        notes = list(dict.fromkeys([*self.train.notes, *self.test.notes]))
        return line + (f" Left out: {'; '.join(notes)}." if notes else '')


def _refuse(config: SourceConfig, names: Sequence[str], why: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value != options(SourceConfig)[name].default:
            raise InputError(f"{name.replace('_', '-')} {value!r} {why}: drop it.")


def _check_options(config: SourceConfig, source: Type[DataSource]) -> None:
    """Refuse options that do not apply to a data set, or that contradict each other."""
    name = config.dataset or config.data_dir
    for is_refused, names, why in (
        (not source.has_imb_factor, ('imb_factor', 'imb_type', 'imb_seed', 'val_per_class'),
         f"is for the *_lt data sets, and '{name}' is not one"),
        (source.eval_split, ('train_split',), f"is not for '{name}', whose splits are fixed"),
        (source.eval_split not in (None, config.val_split), ('val_split',),
         f"is not for '{name}', whose splits are fixed"),
        (not (config.dataset or config.train_list or config.val_list), ('input_key', 'target_key'),
         f"is for lists, and '{name}' is a folder"),
        (not config.dataset.lower().startswith(STREAMS), ('train_num_samples', 'val_num_samples'),
         f"is for streams, and '{name}' is not one"),
        (config.train_list, ('class_depth',), f"is for folders, and the list '{config.train_list}' says the classes"),
        (config.holdout, ('val_per_class', 'val_list'), f'contradicts holdout {config.holdout:g}'),
        (source.has_imb_factor, ('class_stats',), f"is not for '{name}', whose counts follow its imb-factor"),
        (config.dataset and source.num_classes is None, ('train_list', 'val_list'),
         f"is for images in a folder, and dataset '{name}' is not in one"),
    ):
        if is_refused:
            _refuse(config, names, why)


def open_dataset(config: SourceConfig, batch_size: int = 1, seed: int = 42) -> DataSource:
    """The data set that a configuration names, after its options are checked."""
    source = find_dataset(config.dataset)
    _check_options(config, source)
    return source(config, batch_size, seed)


def _check_images(data: AnySet, config: SourceConfig, workers: int) -> AnySet:
    """The set without unreadable images. The options of a set in memory are checked instead."""
    if isinstance(data, StreamSet):
        return data
    if data.images is not None:
        if data.images.shape[-1] != config.in_chans:
            raise InputError(
                f"'{config.dataset}' has images of {data.images.shape[-1]} channels, not of {config.in_chans}: leave "
                '--in-chans out.')
        _refuse(config, UNUSED_IN_MEMORY, f"is not for '{config.dataset}', read as it is")
        return data
    is_wanted = len(data) <= MAX_CHECKED if config.check_images is None else config.check_images
    return exclude_unreadable(data, workers, anew=bool(config.check_images)) if is_wanted else data


def _match_classes(data: AnySet, class_names: Sequence[str], config: SourceConfig) -> AnySet:
    """Relabel an evaluation split by the class names of training. A split without class names stays as it is."""
    if not data.class_names:
        return data
    what = f"the {config.val_split} split of '{config.dataset or config.data_dir}'"
    return data.relabel(match_names(data.class_names, class_names, what), class_names)


def load_training_data(
        config: SourceConfig, class_names: Optional[Sequence[str]] = None, run_folder: Union[None, str, Path] = None,
        workers: int = 0, batch_size: int = 1, seed: int = 42,
) -> TrainingData:
    """Load a training set and an evaluation set. Without an evaluation set, hold out a share of each class.

    If `class_names` are given, the data must have exactly these classes. If `run_folder` holds split lists, they split
    the training set in place of a new share. `batch_size` and `seed` are for streams.
    """
    config = replace(config, in_chans=config.channels)
    name = config.dataset or str(config.data_dir)
    source = open_dataset(config, batch_size, seed)
    train, stats = source.train(), config.class_stats
    counts = train.class_counts
    if stats:
        own_counts, (counts, stats_names) = counts, read_class_stats(stats)
        train.class_names = train.class_names or stats_names
        if own_counts and counts != own_counts:
            _logger.warning(
                f"class-stats '{stats}' counts {sum(counts)} images, but '{name}' has {sum(own_counts)}, or its "
                'classes have other numbers: those of the file are taken.')
    if counts is None:
        raise InputError(
            f"dataset '{config.dataset}' does not list its labels, so its classes cannot be counted: use a folder of "
            'images, or give their counts with --class-stats.')
    named = len(train.class_names or counts)
    if named != len(counts):
        raise InputError(f"'{stats}' counts {len(counts)} classes, but {named} have names: give counts of all of them.")
    if class_names and train.class_names:
        labels = match_names(train.class_names, class_names, f"'{name}'", all_of_them=True)
        train = train.relabel(labels, class_names)
        counts = [counts[label] for label in np.argsort(labels)]
    names = train.class_names or [str(c) for c in range(len(counts))]
    if min(counts) < 1:
        bare = names[counts.index(min(counts))]
        raise InputError(f"Class '{bare}' has no training image: add some, or remove the class.")
    if len(counts) < 2:
        raise InputError(
            f"'{name}' has a single class, '{names[0]}', expected two or more: give a folder of several.")
    train = _check_images(train, config, workers)
    if train.class_counts and not stats:
        counts = train.class_counts
    shot_counts, holdout, lists = counts, config.holdout, SplitLists.find(run_folder)
    test = None if holdout else source.evaluation(train.class_names)
    if test is not None:
        if stats:
            test.class_names = test.class_names or train.class_names
        test = _check_images(_match_classes(test, names, config), config, workers)
        if lists and config.val_list:
            lists.warn_about_trained(test, name, moved=False)
        if train.groups is not None and test.groups is not None:
            count = int(np.isin(np.unique(train.groups), test.groups).sum())
            if count:
                _logger.warning(
                    f"{count} groups of --group-key '{config.group_key}' are in training and in evaluation, so the "
                    'figures will be too good. shike describe names these groups.')
    else:
        holdout = holdout or HOLDOUT
        if lists and isinstance(train, ImageSet):
            train, test = lists.split(train)
        else:
            train, test = hold_out_share(train, holdout, name, source.has_imb_factor)
        counts = train.class_counts
    return TrainingData(
        train, test, counts, names, shot_counts, holdout, bool(holdout or config.train_list or config.val_list))


def load_eval_data(
        config: SourceConfig, class_names: Optional[Sequence[str]] = None, in_chans: Optional[int] = None,
        run_folder: Union[None, str, Path] = None, workers: int = 0, batch_size: int = 1, seed: int = 42,
) -> AnySet:
    """Load only an evaluation split, with `in_chans` channels. If there is no split, load the run's held-out images."""
    if in_chans:
        config = replace(config, in_chans=in_chans, input_size=None)
    config = replace(config, in_chans=config.channels)
    source = open_dataset(config, batch_size, seed)
    lists, data = SplitLists.find(run_folder), source.evaluation(class_names)
    is_whole, may_be_trained = data is None, False
    if data is None and (lists or source.is_undivided):
        data, may_be_trained = source.train(class_names), not source.is_undivided
    if lists and data is not None:
        if is_whole and isinstance(data, ImageSet) and lists.is_same_data(data):
            _, data = lists.split(data)
            lists.check_labels(data)
            may_be_trained = False
        # Other data sets may number the images of each split from 0.
        elif is_whole or config.val_list or not config.dataset:
            lists.warn_about_trained(data, config.dataset or str(config.data_dir), is_whole)
    if data is None or may_be_trained:
        raise InputError(
            f"'{config.dataset or config.data_dir}' has no {config.val_split} split: name the one to evaluate on with "
            '--val-split or --val-list.')
    if data.class_names is None and config.class_stats:
        data.class_names = read_class_stats(config.class_stats)[1]
    if class_names:
        data = _match_classes(data, class_names, config)
    return _check_images(data, config, workers)
