"""The registry of data sets, and what loads one by name."""
from dataclasses import dataclass, replace
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np
from PIL import Image
from timm.loss import load_class_stats
from torch.utils.data import Dataset

from ..errors import InputError, one_line

__all__ = [
    'DATASETS', 'DataRequest', 'DatasetEntry', 'ImageSet', 'MemorySet', 'TrainingData', 'create_eval_dataset',
    'find_dataset', 'in_memory_set', 'load_training_data', 'register_dataset',
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
    """

    dataset: Any
    class_names: Optional[List[str]] = None
    class_counts: Optional[List[int]] = None
    images: Optional[np.ndarray] = None
    targets: Optional[np.ndarray] = None


class MemorySet(ImageSet):
    """A set whose images lie in memory, of which all is known."""

    class_names: List[str]
    class_counts: List[int]
    images: np.ndarray
    targets: np.ndarray


def in_memory_set(
        images: np.ndarray,
        targets: Union[Sequence[int], np.ndarray],
        class_names: Sequence[str],
) -> MemorySet:
    """A set of uint8 images [N, H, W, 3] in memory with class indices [N]."""
    labels = np.asarray(targets, dtype=np.int64)
    counts = np.bincount(labels, minlength=len(class_names)).tolist()
    return MemorySet(ArrayDataset(images, labels), list(class_names), counts, images, labels)


@dataclass(frozen=True)
class DataRequest:
    """What is asked of a data set, which reads what concerns it.

    Attributes:
        name: Name of the data set.
        root: Folder of the data.
        train_split: Split to train on, for sets that do not fix it.
        val_split: Split to evaluate on, likewise.
        download: Download what is missing, where the set can.
        imb_factor: Imbalance factor, for sets that have one.
        imb_type: 'exp' or 'step', likewise.
        holdout: Share of each class's training images to evaluate on instead, likewise.
        val_per_class: Training images of each class to evaluate on instead, likewise; they are set aside before the
            long-tailed subset is cut from the others, so that they are balanced.
        class_stats: JSON file that `timm.loss.load_class_stats` reads, to take the class counts from rather than from
            labels, for sets without an imbalance factor.
        class_names: Classes in label order that an evaluation split is to be labelled by.
    """

    name: str
    root: Optional[str] = None
    train_split: str = 'train'
    val_split: str = 'validation'
    download: bool = False
    imb_factor: float = 100.
    imb_type: str = 'exp'
    holdout: float = 0.
    val_per_class: int = 0
    class_stats: Optional[str] = None
    class_names: Optional[List[str]] = None


@dataclass(frozen=True)
class DatasetEntry:
    """A data set of the registry.

    Attributes:
        name: What `--dataset` calls it; with a slash at the end, the first part of its names.
        load_train: Gives the training set, and what is held out of it to evaluate on, None where nothing is.
        load_eval: Gives the evaluation split.
        has_imb_factor: Whether it is cut to an imbalance factor, and can hold out training images.
        eval_split: What its evaluation split is called, None where `val_split` says.
    """

    name: str
    load_train: Callable[[DataRequest], Tuple[ImageSet, Optional[ImageSet]]]
    load_eval: Callable[[DataRequest], ImageSet]
    has_imb_factor: bool = False
    eval_split: Optional[str] = None


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


@dataclass
class TrainingData:
    """A training set, the set it is evaluated on, and what the training set says of the classes.

    Attributes:
        train: Training set.
        test: Evaluation split.
        class_counts: Training images of each class, all positive.
        class_names: Names of the classes in label order.
    """

    train: ImageSet
    test: ImageSet
    class_counts: List[int]
    class_names: List[str]

    @property
    def num_classes(self) -> int:
        return len(self.class_counts)


def _read_class_stats(path: str) -> List[int]:
    try:
        stats: Any = load_class_stats(path)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"class-stats '{path}' cannot be read: {one_line(error)}.") from error
    return stats[0].long().tolist()


def load_training_data(name: str, root: Optional[str] = None, **options: Any) -> TrainingData:
    """Load a training set and its evaluation split.

    Args:
        name: Name in the registry, any name `timm.data.create_dataset` reads, or '' for a folder.
        root: Folder of the data.
        **options: Other fields of `DataRequest`.

    Raises:
        InputError: If data is missing or damaged, a class has no training image, or options contradict each other.
    """
    entry, request = find_dataset(name), DataRequest(name, root, **options)
    stats, holdout, val_per_class = request.class_stats, request.holdout, request.val_per_class
    if (holdout or val_per_class) and not entry.has_imb_factor:
        option = f'holdout {holdout:g}' if holdout else f'val-per-class {val_per_class}'
        raise InputError(f"{option} needs one of the *_lt data sets, not '{name or root}': drop it.")
    if holdout and val_per_class:
        raise InputError(f'holdout {holdout:g} and val-per-class {val_per_class} contradict each other: drop one.')
    if stats and entry.has_imb_factor:
        raise InputError(f"class-stats '{stats}' is not for '{name}', whose counts follow its imb-factor: drop it.")
    train, test = entry.load_train(request)
    counts = _read_class_stats(stats) if stats else train.class_counts
    if counts is None:
        raise InputError(
            f"dataset '{name}' does not list its labels, so its classes cannot be counted: use a folder of images, or "
            'load it with class_stats.')
    names = train.class_names or [str(c) for c in range(len(counts))]
    if len(names) != len(counts):
        raise InputError(
            f"'{stats or name or root}' counts {len(counts)} classes, but {len(names)} have names: give what fits.")
    if min(counts) < 1:
        bare = names[counts.index(min(counts))]
        raise InputError(f"Class '{bare}' has no training image: add some, or remove the class.")
    return TrainingData(train, test or entry.load_eval(replace(request, class_names=train.class_names)), counts, names)


def create_eval_dataset(
        name: str,
        root: Optional[str] = None,
        split: str = 'validation',
        download: bool = False,
        class_names: Optional[List[str]] = None,
) -> ImageSet:
    """Load an evaluation split alone.

    Args:
        name: As for `load_training_data`.
        root: Folder of the data.
        split: Split to evaluate on, for timm's data sets.
        download: Download what is missing, where the data set can.
        class_names: The model's classes in label order; timm's data sets are matched to them by name.

    Raises:
        InputError: If data is missing or damaged, or a class is not among the model's.
    """
    request = DataRequest(name, root, val_split=split, download=download, class_names=class_names)
    return find_dataset(name).load_eval(request)
