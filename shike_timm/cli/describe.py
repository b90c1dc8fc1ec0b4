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

import numpy as np

from ..data import SourceConfig
from ..data.config import DataConfig
from ..data.dataset import AnySet, StreamSet
from ..data.holdout import hold_out_share
from ..data.inspect import Inspected, find_similar, inspect_images
from ..data.load import HOLDOUT, open_dataset
from ..data.registry import find_dataset
from ..errors import InputError
from ..files import check_results_file, write_text
from ..metrics import ShotConfig, shot_divisions
from ..options import HparamsConfig, checked, option, parse
from .script import command

NUMBERED = r'.*(?=[_-]\d+\.\w+$)'  # The path of an image up to the number that ends its name.
MAX_LISTED = 10  # Longest list in the text. The JSON lists all.


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


def _load(config: DescribeConfig) -> Tuple[AnySet, Optional[AnySet], Optional[str], Optional[float]]:
    """The training set, the evaluation split, why there is none, and the share that `train` would hold out for it."""
    # `describe` writes this file, the data reads it.
    source = open_dataset(replace(checked(SourceConfig, vars(config)), class_stats=None))
    train = source.train()
    if config.holdout:
        return train, None, None, config.holdout
    try:
        test = source.evaluation(train.class_names)
    except InputError as error:
        if not source.has_uncertain_splits:
            raise
        return train, None, str(error), None
    if test is not None:
        return train, test, None, None
    return train, None, 'the data set has one split', None if config.class_stats else HOLDOUT  # It counts all images.


def _hold_out(
        train: AnySet, seen: List[Inspected], share: float, config: DescribeConfig,
) -> Dict[str, Tuple[AnySet, List[Inspected]]]:
    """Both sets with the facts of their images. As in `train`, unreadable images are not held out."""
    readable = train if isinstance(train, StreamSet) else train.take(
        np.flatnonzero([one.error is None for one in seen]))
    test = hold_out_share(
        readable, share, config.dataset or str(config.data_dir), find_dataset(config.dataset).has_imb_factor)[1]
    held_out = np.isin(train.rows, test.rows)
    return {
        'train': (train.take(np.flatnonzero(~held_out)), list(compress(seen, ~held_out))),
        'evaluation': (test, list(compress(seen, held_out)))}


def _three(values: Sequence[int]) -> List[int]:
    return [min(values), round(median(values)), max(values)]


def _describe_split(data: AnySet, seen: List[Inspected]) -> Dict[str, Any]:
    labels = [one.target for one in seen]
    names = list(data.class_names or map(str, range(max(labels, default=-1) + 1)))
    counts = Counter(labels)
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
        summary.update(zip(('width', 'height'), map(_three, zip(*(one.size for one in readable)))))
        summary['turned'] = sum(one.is_turned for one in readable)
    extrema = [one.extrema for one in readable if one.extrema]
    if extrema:
        summary['pixel_range'] = [min(low for low, _ in extrema), max(high for _, high in extrema)]
    if data.notes:
        summary['left_out'] = list(data.notes)
    return summary


Found = Tuple[str, str, Inspected]  # The split, the class and the facts of an image.


def _equal(found: List[Found]) -> List[List[Found]]:
    groups: Dict[bytes, List[Found]] = defaultdict(list)
    for one in found:
        if one[2].digest is not None:
            groups[one[2].digest].append(one)
    return [group for group in groups.values() if len(group) > 1]


def _similar(found: List[Found]) -> List[List[Found]]:
    """Groups of images that look alike and are not all the same file."""
    hashed = [(one, one[2].look) for one in found if one[2].look is not None]
    groups = ([hashed[i][0] for i in group] for group in find_similar([look for _, look in hashed]))
    return [group for group in groups if len({one.digest for _, _, one in group}) > 1]


def _by_place(groups: List[List[Found]]) -> Dict[str, List[List[Dict[str, str]]]]:
    """Groups of images by where they are: in one class, in several, and in both splits."""
    summary: Dict[str, List[List[Dict[str, str]]]] = dict(within_class=[], across_classes=[], across_splits=[])
    for group in groups:
        kind = 'within_class' if len({name for _, name, _ in group}) == 1 else 'across_classes'
        listed = [{'split': split, 'class': name, 'file': one.name} for split, name, one in group]
        if len({split for split, _, _ in group}) > 1:
            summary['across_splits'].append(listed)
        if kind == 'across_classes' or max(Counter(split for split, _, _ in group).values()) > 1:
            summary[kind].append(listed)
    return summary


def _label_gaps(names: Sequence[str]) -> List[int]:
    """Numbers that are missing among class names that are all numbers, and not such as dates or bar codes."""
    numbers = {int(name) for name in names if name.isdecimal()}
    if len(numbers) < len(names) or not numbers or max(numbers) - min(numbers) > 100 * len(numbers):
        return []
    return sorted(set(range(min(numbers), max(numbers))) - numbers)


def _find_groups(names: Sequence[str]) -> Optional[str]:
    """A --group-key for images whose names are numbered within groups, such as 00003_00001.png, None without such."""
    found = [match.group() for match in map(re.compile(NUMBERED).match, names) if match]
    is_grouped = len(found) == len(names) >= 3 * len(set(found)) >= 6 * len({name.rpartition('/')[0] for name in names})
    return NUMBERED if is_grouped else None


def _group_leaks(sets: Dict[str, Tuple[AnySet, List[Inspected]]]) -> List[Dict[str, str]]:
    """For each group with images in both splits, one image of each split."""
    firsts: List[Dict[int, str]] = []  # The first image of each group, for each split.
    for data, found in sets.values():
        groups = [] if data.groups is None else data.groups.tolist()
        firsts.append({group: one.name for group, one in zip(reversed(groups), reversed(found))})
    shared = set(firsts[0]).intersection(*firsts[1:]) if len(firsts) > 1 else ()
    return [{split: first[group] for split, first in zip(sets, firsts)} for group in sorted(shared)]


def describe_data(config: DescribeConfig) -> Dict[str, Any]:
    """Read a whole data set and summarize it. With `--class-stats` its class counts are written.

    Returns:
        `train` and `evaluation` (None without such a split): `origin` in words, `images`, `classes` with images,
        `imbalance_factor`, `class_counts` by name, `classes_without_images`, `images_without_label`, `unreadable`
        with file and error, `modes`, smallest, median and largest `width` and `height`, how many are `turned` by EXIF,
        `pixel_range` of images of more than 8 bits.
        `no_evaluation`: why there is no evaluation split. `shots`: the many-, medium- and few-shot classes of training
        and their images. `duplicates`: groups of equal files, or pixels without files, `within_class`,
        `across_classes` and `across_splits`. `similar`: such groups of images that look alike, None if not looked for.
        `label_gaps`: numbers missing among class names. `group_leaks`: groups in both splits, an image of each split.
        `group_key`: what keeps numbered images of one thing together when a share is held out.
        `only_in_train`, `only_in_evaluation`: classes of one split.
    """
    check_results_file(config.class_stats)
    if config.class_stats and Path(config.class_stats).exists():
        raise InputError(f"--class-stats '{config.class_stats}' exists: choose another file, or remove it.")
    is_installed = importlib.util.find_spec('imagehash') is not None
    if config.perceptual and not is_installed:
        raise InputError("--perceptual needs imagehash: pip install 'shike-timm[describe]'.")
    perceptual = is_installed if config.perceptual is None else config.perceptual
    train, test, reason, share = _load(config)
    sets = {'train': (train, inspect_images(train, config.workers, perceptual))}
    if share:
        try:
            sets = _hold_out(*sets['train'], share, config)
            test, reason = sets['evaluation'][0], None
        except InputError as error:
            if config.holdout:
                raise
            reason = str(error)
    elif test is not None:
        sets['evaluation'] = (test, inspect_images(test, config.workers, perceptual))
    summary: Dict[str, Any] = {split: _describe_split(*one) for split, one in sets.items()}
    counts = {split: {name: count for name, count in summary[split]['class_counts'].items() if count} for split in sets}
    held_out = test is not None and 'held out' in test.origin
    whole = [  # A training run counts the held-out images too when it divides the classes.
        count + (summary['evaluation']['class_counts'].get(name, 0) if held_out else 0)
        for name, count in counts['train'].items()]
    shots = {
        shot: dict(classes=int(mask.sum()), images=sum(compress(counts['train'].values(), mask)))
        for shot, mask in shot_divisions(whole, config).items()
    }
    found = [
        (split, names[one.target] if 0 <= one.target < len(names) else str(one.target), one)
        for split, (data, seen) in sets.items() for names in [data.class_names or ()] for one in seen]
    if config.class_stats:
        names, numbers = zip(*summary['train']['class_counts'].items())
        stats = dict(pos_counts=numbers, num_samples=summary['train']['images'], class_names=names)
        write_text(config.class_stats, json.dumps(stats, indent=2) + '\n')
    return dict(
        train=summary['train'], evaluation=summary.get('evaluation'), no_evaluation=reason, shots=shots,
        duplicates=_by_place(_equal(found)), similar=_by_place(_similar(found)) if perceptual else None,
        label_gaps=_label_gaps(sorted(counts['train'])), group_leaks=_group_leaks(sets),
        group_key=_find_groups([one.name for _, seen in sets.values() for one in seen])
        if held_out and not config.group_key else None,
        only_in_train=sorted(counts['train'].keys() - counts['evaluation']) if test is not None else [],
        only_in_evaluation=sorted(counts['evaluation'].keys() - counts['train']) if test is not None else [],
    )


def _few(lines: List[str]) -> List[str]:
    more = [f'  ... and {len(lines) - MAX_LISTED} more, which --json lists'] if len(lines) > MAX_LISTED else []
    return [f'  {line}' for line in lines[:MAX_LISTED]] + more


def _split_text(split: str, summary: Dict[str, Any]) -> List[str]:
    ordered = sorted(((count, name) for name, count in summary['class_counts'].items() if count), reverse=True)
    lines = [f"{split}: {summary['images']} images of {summary['classes']} classes, imbalance factor "
             f"{summary['imbalance_factor']:g}" if ordered else f'{split}: no images']
    if ordered:
        lines.append(f"  largest: {', '.join(f'{name} {count}' for count, name in ordered[:3])}; "
                     f"smallest: {', '.join(f'{name} {count}' for count, name in ordered[-3:])}")
    if 'width' in summary:
        sizes = (f'{side} {low} to {high} (median {middle})'
                 for side in ('width', 'height') for low, middle, high in [summary[side]])
        modes = (f'{mode} {count}' for mode, count in summary['modes'].items())
        lines.append(f"  {', '.join(sizes)}; {', '.join(modes)}")
    if summary.get('turned'):
        lines.append(f"  turned by their EXIF orientation: {summary['turned']}, unless --no-exif is given")
    if 'pixel_range' in summary:
        lines.append('  values of deep images: {0:g} to {1:g}, all of --pixel-range {0:g} {1:g}'.format(
            *summary['pixel_range']))
    lines += [f'  left out: {note}' for note in summary.get('left_out', ())]
    faults = [f"{one['file']}: {one['error']}" for one in summary['unreadable']]
    for title, items in (('unreadable', faults), ('without a label', summary['images_without_label']),
                         ('classes without images', summary['classes_without_images'])):
        if items:
            lines += [f'  {title}: {len(items)}', *(f'  {line}' for line in _few(items))]
    return lines


def _text(summary: Dict[str, Any]) -> str:
    lines = _split_text('training', summary['train'])
    shots = (f"{shot} {one['classes']} ({one['images']} images)" for shot, one in summary['shots'].items())
    lines.append(f"  classes by size: {', '.join(shots)}")
    if summary['evaluation']:
        lines += _split_text(f"evaluation, {summary['evaluation']['origin']}", summary['evaluation'])
    else:
        lines.append(f"evaluation: none; {summary['no_evaluation']}")
    titles = dict(
        within_class='images in one class', across_classes='images in several classes',
        across_splits='images of evaluation in training')
    for which, word, sign in (('duplicates', 'equal', ' = '), ('similar', 'alike', ' ~ ')):
        for kind, groups in (summary[which] or {}).items():
            lines.append(f'{word} {titles[kind]}: {len(groups)}')
            lines += _few([
                sign.join(f"{one['file']} ({one['split']}, {one['class']})" for one in group) for group in groups])
    if summary['similar'] is None:
        lines.append("images that look alike: not looked for. --perceptual does, with imagehash")
    if summary['group_leaks']:
        lines.append(f"groups in training and evaluation: {len(summary['group_leaks'])}")
        lines += _few([' and '.join(leak.values()) for leak in summary['group_leaks']])
    if summary['group_key']:
        lines.append(
            'names show several images of one thing, which may be on both sides of what is held out: keep them '
            f"together with --group-key '{summary['group_key']}'")
    if summary['label_gaps']:
        lines.append(f"numbers missing among the classes: {len(summary['label_gaps'])}")
        lines += _few([', '.join(map(str, summary['label_gaps'][:MAX_LISTED]))])
    for kind in ('only_in_train', 'only_in_evaluation'):
        if summary[kind]:
            lines += [f"classes {kind.replace('_', ' ')}: {len(summary[kind])}", *_few(summary[kind])]
    return '\n'.join(lines)


def describe(config: DescribeConfig) -> None:
    """Print the summary of a data set."""
    summary = describe_data(config)
    print(json.dumps(summary, indent=2) if config.json else _text(summary))


CONFIG = DescribeConfig
parse_describe_args = partial(
    parse, CONFIG, 'Describe a data set: classes, counts, sizes, duplicates, unreadable files.')
main = command(describe, parse_describe_args)
