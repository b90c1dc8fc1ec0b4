"""Lists of images: text, tables with a header, and COCO's JSON."""
import csv
import json
import os
import re
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Sequence, Tuple

from ..errors import InputError, one_line
from .datasets import DataRequest, ImageSet, table_set
from .files import open_files

__all__ = ['ImageList', 'read_list', 'load_list']

INPUT_KEYS = ('path', 'image', 'filename', 'file_name', 'file')
TARGET_KEYS = ('label', 'target', 'class', 'category')


@dataclass
class ImageList:
    """Entries of a list.

    Attributes:
        names: Paths.
        labels: Names of their classes.
        groups: What `--group-key` names, where it is a column.
        order: Names of the classes in the list's own order, where it has one.
    """

    names: List[str] = field(default_factory=list)
    labels: List[str] = field(default_factory=list)
    groups: Optional[List[str]] = None
    order: Optional[List[str]] = None


def _read_text(path: str, request: DataRequest) -> ImageList:
    result = ImageList()
    with open(path, encoding='utf-8-sig', errors='surrogateescape') as file:
        for number, line in enumerate(file, 1):
            parts = line.rsplit(None, 1)
            if not parts:
                continue
            if len(parts) == 1:
                raise InputError(
                    f"Line {number} of '{path}' is '{parts[0]}', expected a path and a label with a space between: "
                    'mend it, or give a table with a header as .csv.')
            if ' ' in os.path.splitext(parts[0])[1]:
                raise InputError(
                    f"Line {number} of '{path}', '{line.strip()}', has a label of several words: give a table with a "
                    'header as .csv.')
            result.names.append(parts[0].strip())
            result.labels.append(parts[1])
    return result


def _column(fields: Any, wanted: Optional[str], usual: Tuple[str, ...], option: str, path: str) -> str:
    found = next((name for name in ((wanted,) if wanted else usual) if name in fields), None)
    if found is None:
        raise InputError(
            f"'{path}' has no column '{wanted or usual[0]}' among {', '.join(map(str, fields))}: "
            f'name one with {option}.')
    return found


def _read_table(path: str, request: DataRequest) -> ImageList:
    result = ImageList()
    with open(path, encoding='utf-8-sig', errors='surrogateescape', newline='') as file:
        rows = csv.reader(file, delimiter='\t' if path.lower().endswith('.tsv') else ',')
        fields = next(rows, [])
        keys = [
            _column(fields, request.input_key, INPUT_KEYS, '--input-key', path),
            _column(fields, request.target_key, TARGET_KEYS, '--target-key', path),
        ]
        if request.group_key in fields:
            keys.append(request.group_key)
            result.groups = []
        places = [fields.index(key) for key in keys]
        columns = [column for column in (result.names, result.labels, result.groups) if column is not None]
        for row in rows:
            if not row:
                continue
            if len(row) != len(fields) or not row[places[0]] or not row[places[1]]:
                raise InputError(
                    f"Line {rows.line_num} of '{path}' has no path or no label, or not the {len(fields)} columns of "
                    'its header: mend it.')
            for column, place in zip(columns, places):
                column.append(row[place])
    return result


def _read_coco(path: str, request: DataRequest) -> ImageList:
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
    return ImageList(
        [one['file_name'] for one in images], [labels[one['id']] for one in images], order=names,
        groups=[str(one[request.group_key]) for one in images]
        if request.group_key and all(request.group_key in one for one in images) else None)


def read_list(path: str, request: DataRequest) -> ImageList:
    """Entries of a list file: `.csv` and `.tsv` with a header, COCO's `.json`, or lines of a path and a label.

    Raises:
        InputError: If it cannot be read, or is not of that form.
    """
    kind = {'.csv': _read_table, '.tsv': _read_table, '.json': _read_coco}.get(os.path.splitext(path)[1].lower())
    try:
        result = (kind or _read_text)(path, request)
    except FileNotFoundError as error:
        raise InputError(f"List '{path}' does not exist: give a file of paths and labels.") from error
    except InputError:
        raise
    except KeyError as error:
        raise InputError(
            f"List '{path}' has no {error}, expected COCO's images, annotations and categories: mend it.") from error
    except (OSError, ValueError, csv.Error, TypeError, AttributeError) as error:
        raise InputError(f"List '{path}' cannot be read: {one_line(error)}.") from error
    if not result.names:
        raise InputError(f"List '{path}' names no labelled image: give a file of paths and labels.")
    return result


def _once(listed: ImageList, path: str, notes: List[str]) -> ImageList:
    """A list without its repetitions.

    Raises:
        InputError: If an image has two labels.
    """
    label_of = dict(zip(listed.names, listed.labels))
    if len(label_of) == len(listed.names):
        return listed
    for name, label in zip(listed.names, listed.labels):
        if label_of[name] != label:
            raise InputError(f"List '{path}' labels '{name}' both '{label}' and '{label_of[name]}': choose one.")
    notes.append(f'{len(listed.names) - len(label_of)} repeated entries')
    groups = dict(zip(listed.names, listed.groups)) if listed.groups else {}
    return ImageList(list(label_of), list(label_of.values()), [*groups.values()] or None, listed.order)


def _one_spelling(names: Sequence[str], root: str) -> List[str]:
    """Paths without detours, from the folder of the data on where they lead into it."""
    inside = os.path.join(os.path.abspath(root), '')
    return [name.removeprefix(inside) for name in map(os.path.normpath, names)]


def load_list(request: DataRequest, path: str, spellings: Sequence[Tuple[str, str]] = ()) -> ImageSet:
    """The images that a list file names, below the folder or in the archive of the data.

    Args:
        request: Says where the images are.
        path: The list.
        spellings: Patterns with replacements, the first of which to lead to an image is taken where the paths of the
            list do not.

    Raises:
        InputError: If it cannot be read, or its first images are not there.
    """
    notes: List[str] = []
    root = request.root or '.'
    listed = read_list(path, request)
    listed.names = _one_spelling(listed.names, root)
    listed = _once(listed, path, notes)
    if not os.path.exists(root):
        raise InputError(f"data-dir '{root}' does not exist: give the folder that the paths of '{path}' begin in.")
    names = listed.names
    if os.path.isdir(root):
        spelled = (names, *([re.sub(*pair, name) for name in names] for pair in spellings))
        present = [one for one in spelled if any(os.path.exists(os.path.join(root, name)) for name in one[:10])]
        if not present:
            raise InputError(
                f"'{os.path.join(root, names[0])}' does not exist: give the folder that the paths of '{path}' "
                'begin in as --data-dir.')
        names = present[0]
    data = table_set(
        request, names, listed.labels, notes, lambda names: open_files(root, names), listed.groups, listed.order)
    data.source = f"the list '{path}'"
    return data
