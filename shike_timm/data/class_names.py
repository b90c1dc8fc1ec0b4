"""Class names. Only this module turns class names into labels, that is, class indices."""
import json
import re
import unicodedata
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

import numpy as np
from timm.data.readers.class_map import load_class_map
from timm.loss import load_class_stats

from ..errors import InputError, one_line


def natural_order(name: str) -> Tuple[str, str]:
    """Sort key that orders numbers by value, as timm does. No two names have the same key."""
    return re.sub('[0-9]+', lambda number: number.group().zfill(20), name.lower()), name


def first_few(names: Sequence[str]) -> str:
    """The first three names, for a message."""
    return ', '.join(names[:3]) + (', ...' if len(names) > 3 else '')


def normalize_name(name: str) -> str:
    """The name in Unicode's composed form, so that equal names are equal strings."""
    return unicodedata.normalize('NFC', name)


def read_class_map(path: str) -> Tuple[List[str], Dict[str, int]]:
    """Class names in label order, and the label of every name in the file."""
    try:
        label_of = {
            name.lstrip('\ufeff') if isinstance(name, str) else name: label  # A file may begin with a byte order mark.
            for name, label in load_class_map(path).items()}
        if Path(path).suffix == '.txt':
            label_of.pop('', None)  # The file may end with an empty line.
        names: List[str] = []
        for name, label in sorted(label_of.items(), key=lambda item: item[1]):
            if label == len(names):
                names.append(normalize_name(str(name)))
            elif label != len(names) - 1:
                raise ValueError(f"class '{name}' has index {label}, expected {len(names)}; are there repetitions?")
    except Exception as error:  # timm uses assertions, and a pickled map can raise any error.
        raise InputError(f"class-map '{path}' cannot be read: {one_line(error)}.") from error
    return names, {normalize_name(str(name)): label for name, label in label_of.items()}


def read_class_stats(path: str) -> Tuple[List[int], Optional[List[str]]]:
    """Class counts of a file in timm's format, and the class names if the file has them."""
    try:
        loaded = load_class_stats(path)
        with open(path) as file:
            names = json.load(file).get('class_names')
        return loaded[0].long().tolist(), names  # pyright: ignore[reportOptionalSubscript]  # None only without a path
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"class-stats '{path}' cannot be read: {one_line(error)}.") from error


def index_labels(
        labels: Sequence[str], class_map: Optional[str], order: Optional[Sequence[str]], notes: List[str],
) -> Tuple[List[str], np.ndarray]:
    """Class names in label order, and the label of each image [N]. It is -1 for a class that the class map lacks."""
    present = {label: normalize_name(label) for label in set(labels)}
    if class_map:
        names, label_of = read_class_map(class_map)
        if not set(present.values()) & set(label_of):  # The labels of the data are numbers.
            label_of = {str(c): c for c in range(len(names))}
        targets = np.array([label_of.get(present[label], -1) for label in labels], dtype=np.int64)
        unknown = set(present.values()) - set(label_of)
        if len(unknown) == len(set(present.values())):
            raise InputError(f"class-map '{class_map}' names none of the classes, such as '{labels[0]}'.")
        if unknown:
            notes.append(f"{(targets < 0).sum()} images of {len(unknown)} classes that the class map does not name")
        return names, targets
    known = set(present.values())
    names = [normalize_name(name) for name in order or sorted(known, key=natural_order)]
    if len(names) > len(known):
        notes.append(f'{len(names) - len(known)} classes without images')
        names = [name for name in names if name in known]
    label_of = {name: c for c, name in enumerate(names)}
    return names, np.array([label_of[present[label]] for label in labels], dtype=np.int64)


def match_names(own: Sequence[str], names: Sequence[str], what: str, all_of_them: bool = False) -> np.ndarray:
    """The place of each of the own class names among `names`. `what` is the data in words, for the message."""
    label_of = {normalize_name(name): c for c, name in enumerate(names)}
    own = [normalize_name(name) for name in own]
    if not set(own) <= set(label_of) and all(name.isdecimal() for name in (*own, *label_of)):
        numbers = {str(int(name)): c for name, c in label_of.items()}  # Class 3 of a table may be folder 00003.
        if len(numbers) == len(label_of):
            own, label_of = [str(int(name)) for name in own], numbers
    unknown = [name for name in own if name not in label_of]
    missing = [name for name in label_of if name not in own] if all_of_them else []
    if unknown or missing:
        name, where, others = (
            (unknown[0], what, f'the {len(names)} of training') if unknown else
            (missing[0], 'training', f'the {len(own)} of {what}'))
        raise InputError(
            f"Class '{name}' of {where} is not among {others}: remove it, add training images of it, or name the "
            'classes in the order of training with --class-map'
            + ('; for other classes start a new run with shike train --initial-checkpoint, or use shike '
               f'retrain-classifier --num-classes {len(own)}.' if all_of_them else '.'))
    return np.array([label_of[name] for name in own])
