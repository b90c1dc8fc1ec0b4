"""shike describe: the classes, counts and sizes of a data set, and its defects."""
import importlib.util
import json
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from functools import partial
from itertools import compress
from pathlib import Path
from statistics import median
from typing import Any, Dict, List, Optional, Sequence, Tuple

import jinja2
import numpy as np

from ..data import SourceConfig
from ..data.config import DataConfig
from ..data.dataset import AnySet, StreamSet
from ..data.holdout import hold_out_share
from ..data.inspect import Inspected, find_similar, inspect_images
from ..data.load import HOLDOUT, open_dataset
from ..errors import InputError
from ..files import check_results_file, write_text
from ..metrics import ShotConfig, shot_divisions
from ..options import HparamsConfig, checked, option, parse
from .script import command

NUMBERED = r'.*(?=[_-]\d+\.\w+$)'  # The path of an image up to the number that ends its name.
TEMPLATE = Path(__file__).with_name('describe.txt.jinja')


@dataclass(frozen=True)
class DescribeConfig(DataConfig, ShotConfig, HparamsConfig):
    """Description."""

    json: bool = option(False, 'print JSON, with all names')
    class_stats: Optional[str] = option(
        None, "JSON file to write the training images of each class to, in timm's format", 'FILE')
    perceptual: Optional[bool] = option(
        None, 'also find images that look alike, by perceptual hashes. This is the default if the package imagehash is '
        'installed')
    workers: int = option(4, 'processes that read images', low=0, flags=('-j',))


Splits = Dict[str, Tuple[AnySet, List[Inspected]]]  # Each split, `train` or `evaluation`, with the facts of its images.
Found = Tuple[str, Inspected]  # The split and the facts of an image.


def _hold_out(train: AnySet, seen: List[Inspected], share: float, name: str, take_last: bool) -> Splits:
    """Both splits after a share is held out. As in `shike train`, unreadable images are not held out."""
    readable = train if isinstance(train, StreamSet) else train.take(
        np.flatnonzero([one.error is None for one in seen]))
    test = hold_out_share(readable, share, name, take_last)[1]
    held_out = np.isin(train.rows, test.rows)
    return {
        'train': (train.take(np.flatnonzero(~held_out)), list(compress(seen, ~held_out))),
        'evaluation': (test, list(compress(seen, held_out)))}


def _read_splits(config: DescribeConfig, perceptual: bool) -> Tuple[Splits, Optional[str]]:
    """The splits that `shike train` would use, and the reason if there is no evaluation split, else None."""
    # `--class-stats` is a file to write here, but for the data it is a file to read.
    source = open_dataset(replace(checked(SourceConfig, vars(config)), class_stats=None))
    train, test, reason, share = source.train(), None, None, config.holdout
    if not share:
        try:
            test = source.evaluation(train.class_names)
        except InputError as error:
            if not source.has_uncertain_splits:
                raise
            reason = str(error)
        if test is None and reason is None:
            reason = 'the data set has one split'
            share = 0 if config.class_stats else HOLDOUT  # The --class-stats file counts all images.
    seen = inspect_images(train, config.workers, perceptual)
    if test is not None:
        return {'train': (train, seen), 'evaluation': (test, inspect_images(test, config.workers, perceptual))}, None
    if share:
        try:
            name = config.dataset or str(config.data_dir)
            return _hold_out(train, seen, share, name, source.has_imb_factor), None
        except InputError as error:
            if config.holdout:
                raise
            reason = str(error)
    return {'train': (train, seen)}, reason


def _describe_split(data: AnySet, seen: List[Inspected]) -> Dict[str, Any]:
    names = list(data.class_names or map(str, range(max((one.target for one in seen), default=-1) + 1)))
    counts = Counter(one.target for one in seen)
    class_counts = [counts[c] for c in range(len(names))]
    present = [count for count in class_counts if count]
    readable = [one for one in seen if one.error is None]
    summary: Dict[str, Any] = dict(
        origin=data.origin or 'a split of its own',
        images=len(seen),
        classes=len(present),
        imbalance_factor=round(max(present) / min(present), 4) if present else None,
        class_counts=dict(zip(names, class_counts)),
        classes_without_images=[name for name, count in zip(names, class_counts) if not count],
        images_without_label=[one.name for one in seen if not 0 <= one.target < len(names)],
        unreadable=[dict(file=one.name, error=one.error) for one in seen if one.error is not None],
        modes=dict(Counter(one.mode for one in readable).most_common()),
    )
    if readable:
        for side, values in zip(('width', 'height'), zip(*(one.size for one in readable))):
            summary[side] = [min(values), round(median(values)), max(values)]
        summary['turned'] = sum(one.is_turned for one in readable)
    extrema = [one.extrema for one in readable if one.extrema]
    if extrema:
        summary['pixel_range'] = [min(low for low, _ in extrema), max(high for _, high in extrema)]
    if data.notes:
        summary['left_out'] = list(data.notes)
    return summary


def _equal(found: List[Found]) -> List[List[Found]]:
    groups: Dict[bytes, List[Found]] = defaultdict(list)
    for split, one in found:
        if one.digest is not None:
            groups[one.digest].append((split, one))
    return [group for group in groups.values() if len(group) > 1]


def _similar(found: List[Found]) -> List[List[Found]]:
    """Groups of images that look alike and are not all the same file."""
    hashed = [((split, one), one.look) for split, one in found if one.look is not None]
    groups = ([hashed[i][0] for i in group] for group in find_similar([look for _, look in hashed]))
    return [group for group in groups if len({one.digest for _, one in group}) > 1]


def _by_place(groups: List[List[Found]]) -> Dict[str, List[List[Dict[str, str]]]]:
    """Sort groups of images by place: within one class, across classes, and across splits."""
    summary: Dict[str, List[List[Dict[str, str]]]] = dict(within_class=[], across_classes=[], across_splits=[])
    for group in groups:
        kind = 'within_class' if len({one.label for _, one in group}) == 1 else 'across_classes'
        listed = [{'split': split, 'class': one.label, 'file': one.name} for split, one in group]
        num_splits = len({split for split, _ in group})
        if num_splits > 1:
            summary['across_splits'].append(listed)
        if kind == 'across_classes' or num_splits < len(group):
            summary[kind].append(listed)
    return summary


def _label_gaps(names: Sequence[str]) -> List[int]:
    """Missing numbers among class names that are all numbers. Empty if these are sparse, as dates or bar codes are."""
    numbers = {int(name) for name in names if name.isdecimal()}
    if len(numbers) < len(names) or not numbers or max(numbers) - min(numbers) > 100 * len(numbers):
        return []
    return sorted(set(range(min(numbers), max(numbers))) - numbers)


def _find_groups(names: Sequence[str]) -> Optional[str]:
    """A --group-key if image names are numbered within groups, such as 00003_00001.png, else None."""
    found = [match.group() for match in map(re.compile(NUMBERED).match, names) if match]
    is_grouped = len(found) == len(names) >= 3 * len(set(found)) >= 6 * len({name.rpartition('/')[0] for name in names})
    return NUMBERED if is_grouped else None


def _group_leaks(found: List[Found]) -> List[Dict[str, str]]:
    """For each group with images in both splits, the first image of each split."""
    firsts: Dict[int, Dict[str, str]] = defaultdict(dict)
    for split, one in found:
        if one.group is not None:
            firsts[one.group].setdefault(split, one.name)
    return [first for _, first in sorted(firsts.items()) if len(first) > 1]


def describe_data(config: DescribeConfig) -> Dict[str, Any]:
    """Read a whole data set and summarize it. With `--class-stats` also write its class counts to a file.

    Returns:
        `train` and `evaluation` (None without such a split): `origin` in words, `images`, `classes` with images,
        `imbalance_factor`, `class_counts` by name, `classes_without_images`, `images_without_label`, `unreadable`
        with file and error, `modes`, smallest, median and largest `width` and `height`, how many are `turned` by EXIF,
        `pixel_range` of images of more than 8 bits.
        `no_evaluation`: why there is no evaluation split. `shots`: the many-, medium- and few-shot classes of training
        and their images. `duplicates`: groups of equal files, or pixels without files, `within_class`,
        `across_classes` and `across_splits`. `similar`: the same for images that look alike, None if not searched.
        `label_gaps`: numbers missing among class names. `group_leaks`: groups in both splits, with an image of each.
        `group_key`: a --group-key that keeps the numbered images of one object in one split.
        `only_in_train`, `only_in_evaluation`: classes with images in only that split.
    """
    check_results_file(config.class_stats)
    if config.class_stats and Path(config.class_stats).exists():
        raise InputError(f"--class-stats '{config.class_stats}' exists: choose another file, or remove it.")
    is_installed = importlib.util.find_spec('imagehash') is not None
    if config.perceptual and not is_installed:
        raise InputError("--perceptual needs imagehash: pip install 'shike-timm[describe]'.")
    perceptual = is_installed if config.perceptual is None else config.perceptual
    sets, reason = _read_splits(config, perceptual)
    found = [(split, one) for split, (_, seen) in sets.items() for one in seen]
    summary: Dict[str, Any] = {split: _describe_split(*one) for split, one in sets.items()}
    counts = {split: {name: count for name, count in one['class_counts'].items() if count}
              for split, one in summary.items()}
    train, test = counts['train'], counts.get('evaluation')
    held_out = test is not None and 'held out' in summary['evaluation']['origin']
    # A training run counts the held-out images too when it divides the classes.
    whole = [count + (test.get(name, 0) if test and held_out else 0) for name, count in train.items()]
    shots = {
        shot: dict(classes=int(mask.sum()), images=sum(compress(train.values(), mask)))
        for shot, mask in shot_divisions(whole, config).items()
    }
    if config.class_stats:
        names, numbers = zip(*summary['train']['class_counts'].items())
        stats = dict(pos_counts=numbers, num_samples=summary['train']['images'], class_names=names)
        write_text(config.class_stats, json.dumps(stats, indent=2) + '\n')
    return dict(
        train=summary['train'], evaluation=summary.get('evaluation'), no_evaluation=reason, shots=shots,
        duplicates=_by_place(_equal(found)), similar=_by_place(_similar(found)) if perceptual else None,
        label_gaps=_label_gaps(sorted(train)), group_leaks=_group_leaks(found),
        group_key=_find_groups([one.name for _, one in found]) if held_out and not config.group_key else None,
        only_in_train=[] if test is None else sorted(train.keys() - test),
        only_in_evaluation=[] if test is None else sorted(test.keys() - train),
    )


def _text(summary: Dict[str, Any]) -> str:
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(TEMPLATE.read_text('utf-8'))
    return '\n'.join(filter(None, template.render(summary).split('\n')))  # A part without content is an empty line.


def describe(config: DescribeConfig) -> None:
    """Print the summary of a data set."""
    summary = describe_data(config)
    print(json.dumps(summary, indent=2) if config.json else _text(summary))


CONFIG = DescribeConfig
parse_describe_args = partial(
    parse, CONFIG, 'Describe a data set: classes, counts, sizes, duplicates, unreadable files.')
main = command(describe, parse_describe_args)
