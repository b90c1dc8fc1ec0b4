"""Finds a user's own images, their splits and their classes, in a folder, in an archive or by lists."""
import os
from collections import Counter
from functools import cached_property
from typing import Dict, FrozenSet, List, Optional, Sequence, Tuple

from ...errors import InputError
from ..class_names import first_few, normalize_name
from ..config import SourceConfig
from ..dataset import ImageSet, label_images
from ..decode import image_extensions
from ..registry import DataSource, register_dataset
from .lists import check_disjoint, exclude, load_list
from .tar import Member, open_files, tar_members

# The first name of a line is the default, and stands for all names of the line.
TRAIN_SPLITS = ('train', 'training')
EVAL_SPLITS = ('validation', 'val', 'valid', 'eval', 'evaluation', 'test')
NOT_DATA = ('__MACOSX', '@eaDir', '$RECYCLE.BIN', 'lost+found', '__pycache__', 'Thumbs.db', 'desktop.ini')

Listing = Dict[str, List[str]]  # Names of the files by the path of their folder. The path of the root is ''.


def _is_hidden(name: str) -> bool:
    return name.startswith('.') or name in NOT_DATA


def list_folder(root: str, hidden: Counter, unread: List[str]) -> Listing:
    """All files below a folder, by their folder. Links are followed, but not into a folder that they lie in.

    Hidden names are counted, and folders that cannot be read are added to a list.
    """
    def name_of(path: str) -> str:
        return '' if path == root else os.path.relpath(path, root).replace(os.sep, '/')

    def note(error: OSError) -> None:
        if error.filename == root:
            raise error
        unread.append(name_of(error.filename))

    listed: Listing = {}
    around: Dict[str, FrozenSet[Tuple[int, int]]] = {}  # The folders around each folder, by device and inode.
    for path, folders, files in os.walk(root, onerror=note, followlinks=True):
        status, outer = os.stat(path), around.pop(path, frozenset())
        place = status.st_dev, status.st_ino
        if place in outer:
            folders.clear()
            continue
        hidden.update(filter(_is_hidden, (*folders, *files)))
        folders[:] = [name for name in folders if not _is_hidden(name)]
        around.update({os.path.join(path, name): outer | {place} for name in folders})
        listed[name_of(path)] = [name for name in files if not _is_hidden(name)]
    return listed


def _list_archive(members: Sequence[Member], hidden: Counter) -> Listing:
    listed: Listing = {'': []}
    known = set()
    for name, _, length in members:
        parts = name.split('/')
        odd = next((number for number, part in enumerate(parts) if _is_hidden(part)), None)
        if odd is not None:
            known.add(tuple(parts[:odd + 1]))
        elif length < 0:
            listed.setdefault(name, [])
        else:
            folder, _, file = name.rpartition('/')
            listed.setdefault(folder, []).append(file)
    hidden.update(parts[-1] for parts in known)
    return listed


def list_images(listed: Listing, unused: Optional[Counter] = None) -> Listing:
    """The image files of a listing. Files of other types are counted by their extension."""
    kinds, found = image_extensions(), {}
    for folder, files in listed.items():
        images = found[folder] = []
        for file in files:
            extension = os.path.splitext(file)[1].lower()
            if extension in kinds:
                images.append(file)
            elif unused is not None:
                unused[extension or file] += 1
    return found


def _below(listed: Listing, folder: str) -> Listing:
    """The files below a folder, by paths that begin there."""
    start = f'{folder}/'
    return {path[len(start):]: files for path, files in listed.items() if path == folder or path.startswith(start)}


def _find_split(listed: Listing, names: Sequence[str]) -> Optional[str]:
    """The first of the names that is a folder with sub-folders, since a folder of images is a class or lacks labels."""
    return next((name for name in names if any(path.startswith(f'{name}/') for path in listed)), None)


def _unwrap(listed: Listing, splits: Sequence[str]) -> str:
    """Path prefix of the first folder that holds a split of these names, files, or several folders."""
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
    """Class name of each folder: the last part of its class's path, or the whole path if last parts are equal."""
    last = {path: path.rpartition('/')[2] for path in folders.values()}
    if len(set(last.values())) < len(last):
        return folders
    return {folder: last[path] for folder, path in folders.items()}


def _classes(folders: Sequence[str], depth: Optional[int], root: str, known: Optional[Sequence[str]]) -> Dict[str, str]:
    """Class name of each folder that holds images. Raises an InputError if the folders allow two readings."""
    def cut(depth: int) -> Dict[str, str]:
        return {folder: '/'.join(folder.split('/')[:depth]) for folder in folders}

    def is_known(reading: Dict[str, str]) -> bool:
        return set(map(normalize_name, reading.values())) <= set(known or ())

    deepest = max(folder.count('/') + 1 for folder in folders)
    if depth is not None:
        # Classes are whole paths if last parts repeat. A split with fewer folders may have no repetition, but must use
        # the same names.
        return cut(depth) if is_known(cut(depth)) else _named(cut(depth))
    first, whole = cut(1), cut(deepest)
    if known:  # The known classes of a model or of the training split decide.
        for reading in (first, whole, _named(whole), *(_named(cut(level)) for level in range(2, deepest))):
            if is_known(reading):
                return reading
    tops = set(first.values())
    if len(tops) == len(folders) or any(top in first for top in tops if any(
            folder.startswith(f'{top}/') for folder in folders)):
        return first  # Each class is one folder, or some folder has both images and folders of images.
    if all(len(top) == 1 and folder[2:].lower().startswith(top.lower()) for folder, top in first.items()):
        return _named(whole)  # The first level is an index of letters, such as b/bazaar/outdoor.
    example = max(folders, key=lambda folder: folder.count('/'))
    raise InputError(
        f"'{example}' in '{root}' may be of class '{first[example]}', one of {len(tops)}, or a class of its own, one "
        f'of {len(folders)}: choose with --class-depth 1 or --class-depth {deepest}.')


class _Files:
    """The files of a folder or an archive."""

    def __init__(self, config: SourceConfig):
        if not config.data_dir:
            raise InputError("No folder of data was named: give it as --data-dir, or a data set as --dataset.")
        self.config, self.root = config, config.data_dir
        if not os.path.exists(self.root):
            raise InputError(
                f"data-dir '{self.root}' does not exist: give a folder with a sub-folder of images per class.")
        self.hidden: Counter = Counter()
        self.members, self.notes, unread = None, [], []
        if os.path.isdir(self.root):
            listed = list_folder(self.root, self.hidden, unread)
            if unread:
                self.notes.append(f'{len(unread)} folders that cannot be read ({first_few(sorted(unread))})')
        else:
            self.members = tar_members(self.root, self.notes)
            listed = _list_archive(self.members, self.hidden)
        self.prefix = _unwrap(listed, (config.train_split, config.val_split, *TRAIN_SPLITS, *EVAL_SPLITS))
        self.listed = _below(listed, self.prefix[:-1]) if self.prefix else listed

    def split(self, wanted: str, usual: Sequence[str]) -> Optional[str]:
        """Folder of a split. If it is missing, None for the default name, and an InputError for any other name."""
        name = _find_split(self.listed, usual if wanted == usual[0] else [wanted])
        if name is None and wanted != usual[0]:
            raise InputError(
                f"data-dir '{self.root}' has no {wanted} split: expected a folder '{os.path.join(self.root, wanted)}'.")
        return name

    def images(self, split: Optional[str], known: Optional[Sequence[str]] = None) -> ImageSet:
        """The labelled images of a split, or of all folders. `known` are the class names of a model or of training."""
        unused: Counter = Counter()
        files = _below(self.listed, split) if split else self.listed
        folders = list_images(files, unused)
        loose = folders.pop('', [])
        full = [folder for folder, images in folders.items() if images]
        if not full:
            where = f'the {split} split' if split else 'its classes'
            raise InputError(
                f"data-dir '{self.root}' holds no images for {where}: add some, a folder per class, or list them with "
                '--train-list and --val-list.')
        empty = sorted({folder.split('/')[0] for folder in folders} - {folder.split('/')[0] for folder in full})
        other = [name for name in empty if any(_below(files, name).values())]
        where = self.prefix + (f'{split}/' if split else '')
        classes = _classes(full, self.config.class_depth, os.path.join(self.root, where.rstrip('/')), known)
        paths = [f'{where}{folder}/{file}' for folder in full for file in folders[folder]]
        labels = [classes[folder] for folder in full for _ in folders[folder]]
        hidden, self.hidden = self.hidden, Counter()  # Hidden files are noted once.
        left_out = (
            (len(loose), 'image', ' beside the class folders', loose),
            (len(other), 'folder', ' whose files are all of other types', other),
            (len(empty) - len(other), 'folder', ' without images', [name for name in empty if name not in other]),
            (sum(unused.values()), 'file', ' of other types', unused),
            (sum(hidden.values()), 'hidden name', '', hidden),
        )
        notes = [
            f"{count} {kind}{'s' if count != 1 else ''}{where} ({first_few(sorted(names))})"
            for count, kind, where, names in left_out if count]
        source = open_files(self.root, paths, self.members)
        return label_images(self.config, source, labels, [*notes, *self.notes])


@register_dataset('', 'torch/image_folder', 'torch/folder')
class OwnImages(DataSource):
    """A folder or an archive of images, or lists of images in it."""

    def __init__(self, config: SourceConfig, batch_size: int = 1, seed: int = 42):
        super().__init__(config, batch_size, seed)
        if not (config.train_list or config.val_list):
            self.train_split = self.files.split(config.train_split, TRAIN_SPLITS)
            self.val_split = self.files.split(config.val_split, EVAL_SPLITS)
            self.is_undivided = not (self.train_split or self.val_split)

    @cached_property
    def files(self) -> _Files:
        return _Files(self.config)

    @cached_property
    def listed(self) -> Optional[ImageSet]:
        """The images of `--val-list`."""
        return load_list(self.config, self.config.val_list) if self.config.val_list else None

    def train(self, class_names: Optional[Sequence[str]] = None) -> ImageSet:
        config = self.config
        if config.train_list:
            train = load_list(config, config.train_list)
            if self.listed is not None:
                check_disjoint(train, self.listed, config.train_list, str(config.val_list))
            return train
        if self.listed is not None:
            train = self.files.images(self.files.split(config.train_split, TRAIN_SPLITS))
            return exclude(train, self.listed, self.files.root)
        if self.train_split is None and self.val_split is not None:
            folder = os.path.join(self.files.root, self.files.prefix, config.train_split)
            raise InputError(
                f"data-dir '{self.files.root}' has no {config.train_split} split: expected a folder '{folder}' beside "
                f"'{self.val_split}'.")
        train = self.files.images(self.train_split, class_names)
        if self.is_undivided:
            train.origin = f"all of '{self.files.root}', which has no evaluation split"
        return train

    def evaluation(self, class_names: Optional[Sequence[str]] = None) -> Optional[ImageSet]:
        if self.config.train_list or self.config.val_list:
            return self.listed
        if self.val_split is None:
            return None
        data = self.files.images(self.val_split, class_names)
        data.origin = f"the folder '{self.files.prefix}{self.val_split}'"
        return data
