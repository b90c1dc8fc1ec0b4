"""Folders of images and tar archives of them: which files are images, which are of a split, what class each has."""
import os
import unicodedata
from collections import Counter
from typing import Dict, List, Optional, Sequence, Tuple

import numpy as np

from ..errors import InputError
from .datasets import DataRequest, DatasetEntry, ImageSet, register_dataset, table_set
from .files import archive_members, open_files
from .images import image_extensions
from .lists import load_list

__all__ = ['EVAL_SPLITS', 'TRAIN_SPLITS', 'check_apart', 'list_folder', 'without']

# What a split may be called where the default was not changed.
TRAIN_SPLITS = ('train', 'training')
EVAL_SPLITS = ('validation', 'val', 'valid', 'eval', 'evaluation', 'test')
NOT_DATA = ('__MACOSX', '@eaDir', '$RECYCLE.BIN', 'lost+found', '__pycache__', 'Thumbs.db', 'desktop.ini')

Listed = Dict[str, List[str]]  # names of the files by the path of their folder, '' for the root


def _is_hidden(name: str) -> bool:
    return name.startswith('.') or name in NOT_DATA


def list_folder(root: str, hidden: Counter) -> Listed:
    """All files below a folder by their folder, through links, each folder once."""
    listed: Listed = {}
    seen, waiting = set(), ['']
    while waiting:
        folder = waiting.pop()
        path = os.path.join(root, folder)
        status = os.stat(path)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        files = listed[folder] = []
        with os.scandir(path) as entries:
            for entry in entries:
                if _is_hidden(entry.name):
                    hidden[entry.name] += 1
                elif entry.is_dir():
                    waiting.append(f'{folder}/{entry.name}' if folder else entry.name)
                else:
                    files.append(entry.name)
    return listed


def _list_archive(members: Sequence[Tuple[str, int, int]], hidden: Counter) -> Listed:
    listed: Listed = {'': []}
    for name, _, length in members:
        odd = next((part for part in name.split('/') if _is_hidden(part)), None)
        if odd is not None:
            hidden[odd] += 1
            continue
        folder, _, file = ('', '', name) if length < 0 or '/' not in name else name.rpartition('/')
        if length < 0:
            listed.setdefault(name, [])
        else:
            listed.setdefault(folder, []).append(file)
    return listed


def _below(listed: Listed, folder: str) -> Listed:
    """What lies below a folder, by paths from there."""
    start = f'{folder}/'
    return {path[len(start):]: files for path, files in listed.items() if path == folder or path.startswith(start)}


def _find_split(listed: Listed, names: Sequence[str]) -> Optional[str]:
    """The first of the names that a folder of folders has; one of images alone is a class, or has no labels."""
    return next((name for name in names if any(path.startswith(f'{name}/') for path in listed)), None)


def _unwrap(listed: Listed, splits: Sequence[str]) -> str:
    """The folder in which there is a split of these names or more than one folder, below the root."""
    prefix = ''
    while True:
        tops = {path.split('/')[0] for path in listed if path}
        only = tops.pop() if len(tops) == 1 else None
        if only is None or listed.get('') or not any(path.startswith(f'{only}/') for path in listed):
            return prefix
        if _find_split(listed, splits):
            return prefix
        listed, prefix = _below(listed, only), f'{prefix}{only}/'


def _named(folders: Dict[str, str]) -> Dict[str, str]:
    """Class names by folder, from the class's path by folder: its last part, or the path where those are not unique."""
    paths = set(folders.values())
    last = {path: path.rpartition('/')[2] for path in paths}
    if len(set(last.values())) < len(paths):
        last = {path: path for path in paths}
    return {folder: last[path] for folder, path in folders.items()}


def _classes(folders: Sequence[str], depth: Optional[int], root: str, known: Optional[Sequence[str]]) -> Dict[str, str]:
    """Class name of each folder that holds images.

    Raises:
        InputError: If there are two readings.
    """
    def cut(depth: int) -> Dict[str, str]:
        return {folder: '/'.join(folder.split('/')[:depth]) for folder in folders}

    def is_known(reading: Dict[str, str]) -> bool:
        return {unicodedata.normalize('NFC', name) for name in reading.values()} <= set(known or ())

    deepest = max(folder.count('/') + 1 for folder in folders)
    if depth is not None:
        # Of names that several folders have the whole path is taken, which a split with fewer of them must follow.
        return cut(depth) if is_known(cut(depth)) else _named(cut(depth))
    first, whole = cut(1), cut(deepest)
    if known:  # the classes of a model decide
        for reading in (first, whole, _named(whole), *(_named(cut(level)) for level in range(2, deepest))):
            if is_known(reading):
                return reading
    tops = set(first.values())
    if len(tops) == len(folders) or any(top in first for top in tops if any(
            folder.startswith(f'{top}/') for folder in folders)):
        return first  # each class is one folder, or has images and folders of images
    if all(len(top) == 1 and folder[2:].lower().startswith(top.lower()) for folder, top in first.items()):
        return _named(whole)  # an index of letters, as b/bazaar/outdoor
    example = max(folders, key=lambda folder: folder.count('/'))
    raise InputError(
        f"'{example}' in '{root}' may be of class '{first[example]}', one of {len(tops)}, or a class of its own, one "
        f'of {len(folders)}: choose with --class-depth 1 or --class-depth {deepest}.')


def _some(names: Sequence[str]) -> str:
    return ', '.join(names[:3]) + (', ...' if len(names) > 3 else '')


def _number(count: int, one: str) -> str:
    return f'{count} {one}' + ('s' if count != 1 else '')


class _Tree:
    """What lies in a folder or an archive."""

    def __init__(self, request: DataRequest):
        if not request.root:
            raise InputError("No folder of data was named: give it as --data-dir, or a data set as --dataset.")
        self.request, self.root = request, request.root
        if not os.path.exists(self.root):
            raise InputError(
                f"data-dir '{self.root}' does not exist: give a folder with a sub-folder of images per class.")
        self.hidden: Counter = Counter()
        self.members = None
        if os.path.isdir(self.root):
            listed = list_folder(self.root, self.hidden)
        else:
            self.members = archive_members(self.root)
            listed = _list_archive(self.members, self.hidden)
        self.prefix = _unwrap(listed, (request.train_split, request.val_split, *TRAIN_SPLITS, *EVAL_SPLITS))
        self.listed = _below(listed, self.prefix[:-1]) if self.prefix else listed

    def split(self, wanted: str, usual: Sequence[str]) -> Optional[str]:
        """Path of a split, None where there is none; the usual names stand for the first of them.

        Raises:
            InputError: If there is none of an unusual name.
        """
        name = _find_split(self.listed, usual if wanted == usual[0] else [wanted])
        if name is None and wanted != usual[0]:
            raise InputError(
                f"data-dir '{self.root}' has no {wanted} split: expected a folder '{os.path.join(self.root, wanted)}'.")
        return name

    def images(self, split: str, known: Optional[Sequence[str]] = None) -> ImageSet:
        """The labelled images of a split, or of the whole where it is ''.

        Raises:
            InputError: If there are none, or there are two readings of their classes.
        """
        listed = _below(self.listed, split) if split else self.listed
        kinds, unused, folders = image_extensions(), Counter(), {}
        for folder, files in listed.items():
            images = []
            for file in files:
                extension = os.path.splitext(file)[1].lower()
                if extension in kinds:
                    images.append(file)
                else:
                    unused[extension or file] += 1
            folders[folder] = images
        loose = folders.pop('', [])
        full = [folder for folder, images in folders.items() if images]
        if not full:
            where = f'the {split} split' if split else 'its classes'
            raise InputError(
                f"data-dir '{self.root}' holds no images for {where}: add some, a folder per class, or list them with "
                '--train-list and --val-list.')
        tops = {folder.split('/')[0] for folder in folders}
        empty = sorted(tops - {folder.split('/')[0] for folder in full})
        classes = _classes(full, self.request.class_depth, os.path.join(self.root, self.prefix + split), known)
        where = self.prefix + (f'{split}/' if split else '')
        names, labels = [], []
        for folder in full:
            label = unicodedata.normalize('NFC', classes[folder])
            names += [f'{where}{folder}/{file}' for file in folders[folder]]
            labels += [label] * len(folders[folder])
        notes = []
        if loose:
            notes.append(f'{_number(len(loose), "image")} beside the class folders ({_some(sorted(loose))})')
        if empty:
            notes.append(f'{_number(len(empty), "folder")} without images ({_some(empty)})')
        if unused:
            notes.append(f'{_number(sum(unused.values()), "file")} of other types ({_some(sorted(unused))})')
        if self.hidden:
            notes.append(f'{_number(sum(self.hidden.values()), "hidden name")} ({_some(sorted(self.hidden))})')
            self.hidden = Counter()  # told once
        return table_set(self.request, names, labels, notes, lambda names: open_files(self.root, names, self.members))


def without(train: ImageSet, path: str, test: ImageSet) -> ImageSet:
    """Training images that are not among those to evaluate on.

    Args:
        train: Training images.
        path: Where they come from, for the message.
        test: Those to evaluate on.

    Raises:
        InputError: If all of them are.
    """
    listed = {test.dataset.filename(i) for i in range(len(test.dataset))}
    names = (train.dataset.filename(i) for i in range(len(train.dataset)))
    left = np.flatnonzero([name not in listed for name in names])
    if not len(left):
        raise InputError(f"All images of '{path}' are on the list of those to evaluate on: name others to train on.")
    return train.take(left) if len(left) < len(train.dataset) else train


def check_apart(train: ImageSet, test: ImageSet, train_list: str, val_list: str) -> None:
    """Check that two lists share no image.

    Raises:
        InputError: If they do.
    """
    if len(without(train, train_list, test).dataset) < len(train.dataset):
        raise InputError(f"'{train_list}' and '{val_list}' share images: take those out of one of them.")


def _load_lists(request: DataRequest) -> Tuple[ImageSet, Optional[ImageSet]]:
    test = load_list(request, request.val_list) if request.val_list else None
    if not request.train_list:
        tree = _Tree(request)
        train = tree.images(tree.split(request.train_split, TRAIN_SPLITS) or '')
        assert test is not None  # of the one list there is
        return without(train, tree.root, test), test
    train = load_list(request, request.train_list)
    if test is not None:
        check_apart(train, test, request.train_list, str(request.val_list))
    return train, test


def _load_train(request: DataRequest) -> Tuple[ImageSet, Optional[ImageSet]]:
    if request.train_list or request.val_list:
        return _load_lists(request)
    tree = _Tree(request)
    split = tree.split(request.train_split, TRAIN_SPLITS)
    eval_split = tree.split(request.val_split, EVAL_SPLITS)
    if split is None and eval_split is not None:
        raise InputError(
            f"data-dir '{request.root}' has no {request.train_split} split: expected a folder "
            f"'{os.path.join(tree.root, tree.prefix, request.train_split)}' beside '{eval_split}'.")
    train = tree.images(split or '')
    train.is_whole = eval_split is None
    if request.holdout or eval_split is None:
        return train, None
    test = tree.images(eval_split, train.class_names)
    test.source = f"the folder '{tree.prefix}{eval_split}'"
    return train, test


def _load_eval(request: DataRequest) -> Optional[ImageSet]:
    if request.val_list:
        return load_list(request, request.val_list)
    if request.train_list:
        return None
    tree = _Tree(request)
    eval_split = tree.split(request.val_split, EVAL_SPLITS)
    train_split = None if eval_split else _find_split(tree.listed, TRAIN_SPLITS)
    data = tree.images(eval_split or train_split or '', request.class_names)
    data.source = f"all of '{request.root}', which has no evaluation split"
    if eval_split:
        data.source = f"the folder '{tree.prefix}{eval_split}'"
    data.is_whole, data.is_training = eval_split is None, train_split is not None
    return data


for _name in ('', 'torch/image_folder', 'torch/folder'):
    register_dataset(DatasetEntry(_name, _load_train, _load_eval))
