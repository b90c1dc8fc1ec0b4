"""Lists of images: text, tables with a header, and COCO's JSON."""
import csv
import json
import os
import re
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np

from ...errors import InputError, one_line
from ..config import SourceConfig
from ..dataset import ImageSet, label_images
from ..decode import image_extensions
from .tar import open_files, tar_members

INPUT_KEYS = ('path', 'image', 'filename', 'file_name', 'file')
TARGET_KEYS = ('label', 'target', 'class', 'category')


@dataclass
class ImageList:
    """The entries of a list, with groups of images and an order of class names if the list has these."""

    paths: List[str] = field(default_factory=list)
    labels: List[str] = field(default_factory=list)
    groups: Optional[List[str]] = None
    order: Optional[List[str]] = None


def _read_text(path: str) -> ImageList:
    result = ImageList()
    with open(path, encoding='utf-8-sig', errors='surrogateescape') as file:
        for number, line in enumerate(file, 1):
            parts = line.rsplit(None, 1)
            if not parts:
                continue
            if len(parts) == 1:
                raise InputError(
                    f"Line {number} of '{path}' is '{parts[0]}', expected a path and a label with a space between: "
                    'correct it, or give a table with a header as .csv.')
            if ' ' in os.path.splitext(parts[0])[1]:
                raise InputError(
                    f"Line {number} of '{path}', '{line.strip()}', has a label of several words: give a table with a "
                    'header as .csv.')
            result.paths.append(parts[0].strip())
            result.labels.append(parts[1])
    return result


def _column(fields: List[str], wanted: Optional[str], usual: Tuple[str, ...], option: str, path: str) -> int:
    """The place of a column: of the wanted one, or else of the first that has a usual name."""
    for name in (wanted,) if wanted else usual:
        if name in fields:
            return fields.index(name)
    raise InputError(
        f"'{path}' has no column '{wanted or usual[0]}' among {', '.join(fields)}: name one with {option}.")


def _read_table(path: str, config: SourceConfig) -> ImageList:
    result = ImageList()
    with open(path, encoding='utf-8-sig', errors='surrogateescape', newline='') as file:
        first = file.readline()
        file.seek(0)
        rows = csv.reader(file, delimiter=max(',;\t', key=first.count))
        fields = [field.strip() for field in next(rows, [])]
        if len(fields) == 2 and os.path.splitext(fields[0])[1].lower() in image_extensions():
            rows, fields = csv.reader([first, *file], delimiter=rows.dialect.delimiter), ['path', 'label']  # no header
        path_at = _column(fields, config.input_key, INPUT_KEYS, '--input-key', path)
        label_at = _column(fields, config.target_key, TARGET_KEYS, '--target-key', path)
        group_at = fields.index(config.group_key) if config.group_key in fields else None
        groups: List[str] = []
        for row in rows:
            if not row:
                continue
            if len(row) != len(fields) or not row[path_at] or not row[label_at].strip():
                raise InputError(
                    f"Line {rows.line_num} of '{path}' has no path or no label, or not the {len(fields)} columns of "
                    'its header: correct it.')
            result.paths.append(row[path_at])
            result.labels.append(row[label_at].strip())
            if group_at is not None:
                groups.append(row[group_at].strip())
    result.groups = groups or None
    return result


def _read_coco(path: str, config: SourceConfig) -> ImageList:
    with open(path, encoding='utf-8') as file:
        content = json.load(file)
    categories = sorted(content['categories'], key=lambda one: one['id'])
    names = [str(one.get('name', one['id'])) for one in categories]
    if len(set(names)) < len(names):
        names = [f"{one.get('supercategory', '')}/{name}" for one, name in zip(categories, names)]
    if len(set(names)) < len(names):
        names = [str(one['id']) for one in categories]
    label_of = {one['id']: name for one, name in zip(categories, names)}
    labels: Dict[Any, str] = {}
    for one in content['annotations']:
        label = label_of[one['category_id']]
        if labels.setdefault(one['image_id'], label) != label:
            raise InputError(
                f"Image {one['image_id']} of '{path}' is annotated as '{labels[one['image_id']]}' and as '{label}', "
                'expected one class an image: choose one.')
    images = [one for one in content['images'] if one['id'] in labels]
    if not all(isinstance(one['file_name'], str) for one in images):
        raise ValueError("a 'file_name' is not text")
    return ImageList(
        [one['file_name'] for one in images], [labels[one['id']] for one in images], order=names,
        groups=[str(one[config.group_key]) for one in images]
        if config.group_key and all(config.group_key in one for one in images) else None)


def _read_list(config: SourceConfig, path: str) -> ImageList:
    """Entries of a list file: `.csv` and `.tsv` with a header, COCO's `.json`, or lines of a path and a label."""
    read = {'.csv': _read_table, '.tsv': _read_table, '.json': _read_coco}.get(os.path.splitext(path)[1].lower())
    try:
        result = read(path, config) if read else _read_text(path)
    except FileNotFoundError as error:
        raise InputError(f"List '{path}' does not exist: give a file of paths and labels.") from error
    except InputError:
        raise
    except KeyError as error:
        raise InputError(
            f"List '{path}' has no {error}, expected COCO's images, annotations and categories: correct it.") from error
    except (OSError, ValueError, csv.Error, TypeError, AttributeError) as error:
        raise InputError(f"List '{path}' cannot be read: {one_line(error)}.") from error
    if not result.paths:
        raise InputError(f"List '{path}' names no labelled image: give a file of paths and labels.")
    return result


def _drop_repetitions(listed: ImageList, path: str, notes: List[str]) -> ImageList:
    label_of = dict(zip(listed.paths, listed.labels))
    if len(label_of) == len(listed.paths):
        return listed
    for name, label in zip(listed.paths, listed.labels):
        if label_of[name] != label:
            raise InputError(f"List '{path}' labels '{name}' both '{label}' and '{label_of[name]}': choose one.")
    notes.append(f'{len(listed.paths) - len(label_of)} repeated entries')
    groups = dict(zip(listed.paths, listed.groups)) if listed.groups else {}
    return ImageList(list(label_of), list(label_of.values()), [*groups.values()] or None, listed.order)


def load_list(config: SourceConfig, path: str, spellings: Sequence[Tuple[str, str]] = ()) -> ImageSet:
    """The images that a list names, below the folder or in the archive of the data.

    `spellings` are patterns with replacements for the paths. If the listed paths lead to no image, the first spelling
    that leads to an image is used.
    """
    notes: List[str] = []
    root = config.data_dir or '.'
    listed = _read_list(config, path)
    inside = os.path.join(os.path.abspath(root), '')
    listed.paths = [os.path.normpath(one).removeprefix(inside) for one in listed.paths]
    listed = _drop_repetitions(listed, path, notes)
    if not os.path.exists(root):
        raise InputError(f"data-dir '{root}' does not exist: give the folder that the paths of '{path}' begin in.")
    paths, in_folder = listed.paths, os.path.isdir(root)
    members = None if in_folder else tar_members(root, notes)
    names = {member[0] for member in members or ()}
    if not any(os.path.splitext(one)[1] for one in paths[:10]):  # The paths may lack their extensions.
        spellings = [*spellings, *(('$', extension) for extension in ('.jpg', '.jpeg', '.png', '.JPG', '.tif'))]
    spelled = (paths, *([re.sub(*pair, one) for one in paths] for pair in spellings))
    present = [some for some in spelled if any(
        os.path.exists(os.path.join(root, one)) if in_folder else one in names for one in some[:10])]
    if in_folder and not present:
        raise InputError(
            f"'{os.path.join(root, paths[0])}' does not exist: give the folder that the paths of '{path}' begin in as "
            '--data-dir.')
    paths = present[0] if present else paths
    source = open_files(root, paths, members)
    return label_images(
        config, source, listed.labels, notes, listed.groups, listed.order, f"the list '{path}'")


def exclude(train: ImageSet, evaluation: ImageSet, origin: str) -> ImageSet:
    """The training images that are not in the evaluation set. `origin` names the training images in the message."""
    listed = set(evaluation.filenames())
    kept = np.flatnonzero([path not in listed for path in train.filenames()])
    if not len(kept):
        raise InputError(f"All images of '{origin}' are on the list of those to evaluate on: name others to train on.")
    return train.take(kept) if len(kept) < len(train) else train


def check_disjoint(train: ImageSet, evaluation: ImageSet, train_list: str, val_list: str) -> None:
    """Refuse two lists that share images."""
    if len(exclude(train, evaluation, train_list)) < len(train):
        raise InputError(f"'{train_list}' and '{val_list}' share images: take those out of one of them.")
