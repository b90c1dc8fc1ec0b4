"""The registry of data sets, and what loads one by name."""
import json
import re
import unicodedata
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np
from PIL import Image
from timm.data.readers.class_map import load_class_map
from timm.loss import load_class_stats
from torch.utils.data import Dataset

from ..errors import InputError, one_line
from .files import name_hashes
from .images import MODES, ImageDecoder
from .table import ImageTable

__all__ = [
    'DATASETS', 'DataRequest', 'DatasetEntry', 'ImageSet', 'MemorySet', 'find_dataset', 'in_memory_set',
    'map_labels', 'match_classes', 'natural_order', 'read_class_stats', 'register_dataset', 'table_set',
]


class ArrayDataset(Dataset):
    """An array of images as a data set of PIL images.

    Args:
        images: uint8 images [N, H, W, 3].
        targets: Class indices [N].
    """

    def __init__(self, images: np.ndarray, targets: np.ndarray):
        self.images = images
        self.targets = targets
        self.transform: Optional[Callable] = None

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        image = Image.fromarray(self.images[index])
        return image if self.transform is None else self.transform(image), int(self.targets[index])


@dataclass
class ImageSet:
    """One split of a data set, and what it knows of itself.

    Attributes:
        dataset: Gives PIL images, or what its `transform` makes of them, and class indices.
        class_names: Names of the classes in label order, None where it has none.
        class_counts: Images of each class, None where nobody counted them.
        images: uint8 images [N, H, W, 3] where they all lie in memory, else None.
        targets: Their class indices [N], else None.
        source: Where it comes from, in words.
        notes: What was left out of it and why.
        is_whole: Whether it is what a model may have been trained on, for want of an evaluation split.
        is_training: Whether it is a split to train on.
    """

    dataset: Any
    class_names: Optional[List[str]] = None
    class_counts: Optional[List[int]] = None
    images: Optional[np.ndarray] = None
    targets: Optional[np.ndarray] = None
    source: str = ''
    notes: List[str] = field(default_factory=list)
    is_whole: bool = False
    is_training: bool = False

    def take(self, index: np.ndarray) -> 'ImageSet':
        """Some images of a set in memory, or of a table."""
        assert self.class_names is not None  # a stream alone may lack them
        if self.images is not None and self.targets is not None:
            return in_memory_set(self.images[index], self.targets[index], self.class_names)
        table = self.dataset.take(index)
        counts = np.bincount(table.targets, minlength=len(self.class_names)).tolist()
        return replace(self, dataset=table, class_counts=counts, notes=list(self.notes))


class MemorySet(ImageSet):
    """A set whose images lie in memory, of which all is known."""

    class_names: List[str]
    class_counts: List[int]
    images: np.ndarray
    targets: np.ndarray
    take: Callable[[np.ndarray], 'MemorySet']


def in_memory_set(
        images: np.ndarray,
        targets: Union[Sequence[int], np.ndarray],
        class_names: Sequence[str],
) -> MemorySet:
    """A set of uint8 images [N, H, W, 3] in memory with class indices [N]."""
    labels = np.asarray(targets, dtype=np.int64)
    counts = np.bincount(labels, minlength=len(class_names)).tolist()
    return MemorySet(ArrayDataset(images, labels), list(class_names), counts, images, labels)


def natural_order(name: str) -> Tuple[str, str]:
    """Key that sorts names as timm does, numbers by their value, but never takes two names for equal."""
    return re.sub('[0-9]+', lambda number: number.group().zfill(20), name.lower()), name


@dataclass(frozen=True)
class DataRequest:
    """What is asked of a data set, which reads what concerns it.

    Attributes:
        name: Name of the data set.
        root: Folder of the data, or a tar archive.
        train_split: Split to train on, for sets that do not fix it.
        val_split: Split to evaluate on, likewise.
        download: Download what is missing, where the set can.
        train_list: List of the images to train on, below `root`.
        val_list: List of the images to evaluate on.
        input_key: Column of the images, in tables and data sets that have columns.
        target_key: Column of the labels.
        class_map: File of classes as timm reads it: a name a line, in label order.
        class_depth: Folders below the split whose names make the class, None for what is evident.
        group_key: Column, or regular expression to be found in paths, that names the group of an image; a group is
            held out as a whole.
        imb_factor: Imbalance factor, for sets that have one.
        imb_type: 'exp' or 'step', likewise.
        imb_seed: Seed of the images that each class keeps, None for its first ones, likewise.
        holdout: Share of each class's training images to evaluate on instead.
        val_per_class: Training images of each class to evaluate on instead, for sets with an imbalance factor; they are
            set aside before the long-tailed subset is cut from the others, so that they are balanced.
        class_stats: JSON file that `timm.loss.load_class_stats` reads, to take the class counts from rather than from
            labels, for sets without an imbalance factor; it may name the classes as `class_names`.
        train_num_samples: Images of a training stream.
        val_num_samples: Images of an evaluation stream.
        in_chans: Channels of the images.
        exif: Turn images as their EXIF orientation says.
        pixel_range: Values of images of more than 8 bits that become black and white.
        check_images: Read all images before they are used; None for sets of up to `CHECKED` images.
        workers: Worker processes for that.
        batch_size: Images a batch, which a stream is told.
        seed: Seed of a stream.
        class_names: Classes in label order that the set is to be labelled by.
        sides: Run folder with the lists of what was trained and evaluated on.
    """

    name: str
    root: Optional[str] = None
    train_split: str = 'train'
    val_split: str = 'validation'
    download: bool = False
    train_list: Optional[str] = None
    val_list: Optional[str] = None
    input_key: Optional[str] = None
    target_key: Optional[str] = None
    class_map: Optional[str] = None
    class_depth: Optional[int] = None
    group_key: Optional[str] = None
    imb_factor: float = 100.
    imb_type: str = 'exp'
    imb_seed: Optional[int] = None
    holdout: float = 0.
    val_per_class: int = 0
    class_stats: Optional[str] = None
    train_num_samples: Optional[int] = None
    val_num_samples: Optional[int] = None
    in_chans: int = 3
    exif: Optional[bool] = None
    pixel_range: Optional[Sequence[float]] = None
    check_images: Optional[bool] = None
    workers: int = 0
    batch_size: int = 1
    seed: int = 42
    class_names: Optional[List[str]] = None
    sides: Optional[str] = None

    def decoder(self) -> ImageDecoder:
        """What decodes the images.

        Raises:
            InputError: If there are images of no such kind.
        """
        if self.in_chans not in MODES:
            raise InputError(f'Images of {self.in_chans} channels are not read: choose 1 or 3 with --in-chans.')
        low, high = self.pixel_range or (0., 1.)
        if not low < high:
            raise InputError(f'--pixel-range {low:g} {high:g} is empty: give the lower value first.')
        return ImageDecoder(self.in_chans, (low, high) if self.pixel_range else None, bool(self.exif))


def map_labels(path: str, labels: Sequence[str]) -> Tuple[List[str], List[Optional[int]]]:
    """Names of the classes of a class map, and the index of each label, None for one that the map leaves out.

    Raises:
        InputError: If the map cannot be read, or its indices have gaps.
    """
    try:
        index_of = load_class_map(path)
        if Path(path).suffix == '.txt':  # an empty line at the end is no class
            index_of.pop('', None)
        names: List[str] = []
        for name, index in sorted(index_of.items(), key=lambda item: item[1]):
            if index == len(names):
                names.append(unicodedata.normalize('NFC', str(name)))
            elif index != len(names) - 1:
                raise ValueError(f"class '{name}' has index {index}, expected {len(names)}; are there repetitions?")
    except Exception as error:  # timm asserts, and the pickle may be anything
        raise InputError(f"class-map '{path}' cannot be read: {one_line(error)}.") from error
    index_of = {unicodedata.normalize('NFC', str(name)): index for name, index in index_of.items()}
    if not set(labels) & set(index_of):  # labels that are numbers, which names may be too
        index_of = {str(c): c for c in range(len(names))}
    return names, [index_of.get(label) for label in labels]


def read_class_stats(path: str) -> Tuple[List[int], Optional[List[str]]]:
    """Class counts of a file as `timm.loss.load_class_stats` reads it, and the names of the classes where it has them.

    Raises:
        InputError: If it cannot be read.
    """
    try:
        loaded = load_class_stats(path)
        assert loaded is not None  # it is for no path alone
        with open(path) as file:
            names = json.load(file).get('class_names')
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"class-stats '{path}' cannot be read: {one_line(error)}.") from error
    return loaded[0].long().tolist(), names


def _group_hashes(names: Sequence[str], groups: Optional[Sequence[str]], key: str) -> np.ndarray:
    if groups is not None:
        return name_hashes(groups)
    try:
        pattern = re.compile(key)
    except re.error as error:
        raise InputError(f"--group-key '{key}' is neither a column nor a regular expression: {error}.") from error
    found = [pattern.search(name) for name in names]
    if not any(found):
        raise InputError(
            f"--group-key '{key}' is no column, and is found in no path, such as '{names[0]}': give another one.")
    # An image without a group is one; its path, with a slash before it, is no group's name by chance.
    return name_hashes([
        (match.group(1) if match.re.groups else match.group()) or '' if match else f'/{name}'
        for match, name in zip(found, names)])


def _file_order(names: Sequence[str]) -> List[int]:
    """Positions sorted by the names of the files, and where those are equal by their paths."""
    files = [name.rpartition('/')[2] for name in names]
    order = sorted(range(len(names)), key=files.__getitem__)
    if len(set(files)) < len(files):
        order.sort(key=lambda i: (files[i], names[i]))
    return order


def table_set(
        request: DataRequest,
        names: Sequence[str],
        labels: Sequence[str],
        notes: List[str],
        open_files: Callable[[List[str]], Any],
        groups: Optional[Sequence[str]] = None,
        order: Optional[Sequence[str]] = None,
) -> ImageSet:
    """A set of images with names and labels, in an order that depends on the names of classes and files alone.

    Args:
        request: Says how images are decoded and labels mapped.
        names: Path of each image.
        labels: Name of each image's class.
        notes: What was left out, which is added to.
        open_files: Gives what an `ImageTable` reads from, of paths.
        groups: Group of each image, where the data set has a column of them.
        order: Names of the classes in label order, those without images among them; by default they are sorted.

    Raises:
        InputError: If the class map or the group key cannot be used.
    """
    normal = {label: unicodedata.normalize('NFC', label) for label in set(labels)}
    labels = [normal[label] for label in labels]
    if request.class_map:
        class_names, targets = map_labels(request.class_map, labels)
        strays = {label for label, target in zip(labels, targets) if target is None}
        if strays:
            count = sum(target is None for target in targets)
            notes.append(f"{count} images of {len(strays)} classes that the class map does not name")
    else:
        present = set(labels)
        class_names = [unicodedata.normalize('NFC', name) for name in order or sorted(present, key=natural_order)]
        missing = [name for name in class_names if name not in present]
        if missing:
            class_names = [name for name in class_names if name in present]
            notes.append(f'{len(missing)} classes without images')
        label_of = {name: c for c, name in enumerate(class_names)}
        targets = [label_of[label] for label in labels]
    rows = np.array([i for i in _file_order(names) if targets[i] is not None], dtype=np.int64)
    if not len(rows):
        raise InputError(f"class-map '{request.class_map}' names none of the classes, such as '{labels[0]}'.")
    sorted_targets = np.array([targets[i] for i in rows], dtype=np.int32)
    by_class = np.argsort(sorted_targets, kind='stable')
    rows, sorted_targets = rows[by_class], sorted_targets[by_class]
    group_hashes = _group_hashes(names, groups, request.group_key)[rows] if request.group_key else None
    files = open_files([names[int(i)] for i in rows])
    table = ImageTable(files, sorted_targets, request.decoder(), groups=group_hashes)
    return ImageSet(table, class_names, np.bincount(sorted_targets, minlength=len(class_names)).tolist(), notes=notes)


def match_classes(data: ImageSet, names: Sequence[str], what: str, all_of_them: bool = False) -> ImageSet:
    """A set labelled by the position of its class names among others.

    Args:
        data: The set; one without names is left as it is.
        names: Names in label order.
        what: The set, in words.
        all_of_them: Whether it must have all of the names.

    Raises:
        InputError: If it has a class of another name, or lacks one of them.
    """
    if not data.class_names:
        return data
    label = {unicodedata.normalize('NFC', name): c for c, name in enumerate(names)}
    own = [unicodedata.normalize('NFC', name) for name in data.class_names]
    unknown = [name for name in own if name not in label]
    lacking = [name for name in label if name not in own]
    if unknown or all_of_them and lacking:
        stray, where, others = (
            (unknown[0], what, f'the {len(names)} of training') if unknown else
            (lacking[0], 'training', f'the {len(own)} of {what}'))
        raise InputError(
            f"Class '{stray}' of {where} is not among {others}: remove it, add training images of it, or name the "
            'classes in the order of training with --class-map'
            + (f'; for other classes begin with train.py --initial-checkpoint, or say retrain_classifier.py '
               f'--num-classes {len(own)}.' if all_of_them else '.'))
    if own == list(label):
        return data
    labels = np.array([label[name] for name in own])
    if data.images is not None:
        matched = in_memory_set(data.images, labels[data.targets], names)
    elif isinstance(data.dataset, ImageTable):
        table = data.dataset.take(np.arange(len(data.dataset)), labels[data.dataset.targets])
        matched = replace(data, dataset=table)
    else:
        data.dataset.target_transform = labels.tolist().__getitem__
        matched = replace(data)
    if data.class_counts:
        matched.class_counts = np.bincount(labels, weights=data.class_counts, minlength=len(names)).astype(int).tolist()
    matched.class_names, matched.source, matched.notes = list(names), data.source, data.notes
    return matched


@dataclass(frozen=True)
class DatasetEntry:
    """A data set of the registry.

    Attributes:
        name: What `--dataset` calls it; with a slash at the end, the first part of its names.
        load_train: Gives the training set, and what there is to evaluate on, None where `load_eval` is to give it.
        load_eval: Gives the evaluation split, None where there is none.
        has_imb_factor: Whether it is cut to an imbalance factor, and holds training images out by itself.
        eval_split: What its evaluation split is called, None where `val_split` says.
        num_classes: Classes of a published set of lists, beside which others may be given; None for one of any other
            kind.
    """

    name: str
    load_train: Callable[[DataRequest], Tuple[ImageSet, Optional[ImageSet]]]
    load_eval: Callable[[DataRequest], Optional[ImageSet]]
    has_imb_factor: bool = False
    eval_split: Optional[str] = None
    num_classes: Optional[int] = None


DATASETS: Dict[str, DatasetEntry] = {}


def register_dataset(entry: DatasetEntry) -> None:
    """Make a data set known by its name.

    Raises:
        ValueError: If there is one of that name.
    """
    if entry.name in DATASETS:
        raise ValueError(f"There is a data set '{entry.name}' already.")
    DATASETS[entry.name] = entry


def find_dataset(name: str) -> DatasetEntry:
    """The data set of a name, or of its part up to the first slash, whose case does not matter.

    Raises:
        InputError: If there is none.
    """
    entry = DATASETS.get(name) or DATASETS.get(name[:name.find('/') + 1].lower() or name)
    if entry is None:
        known = ', '.join(f'{key}...' if key.endswith('/') else key for key in DATASETS if key)
        raise InputError(f"dataset '{name}' is unknown: choose one of {known}, or none for a folder of images.")
    return entry
