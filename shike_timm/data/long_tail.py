"""Long-tailed subsets of balanced data sets, as data sets of their own."""
import copy
import math
from pathlib import Path
from typing import List, Optional, Sequence, Tuple, Type

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.utils import check_integrity

from ..errors import InputError

__all__ = ['DigitsLT', 'cifar_lt', 'hold_out', 'long_tailed_counts', 'long_tailed_indices']


def long_tailed_counts(max_count: int, num_classes: int, imb_factor: float, imb_type: str = 'exp') -> List[int]:
    """Images that each class keeps.

    Args:
        max_count: Images of the largest class.
        num_classes: Classes C.
        imb_factor: Imbalance factor, largest over smallest class, at least 1.
        imb_type: 'exp': class i keeps int(max_count * imb_factor^(-i / (C - 1))); 'step': the first half of the
            classes keep max_count, the others int(max_count / imb_factor).

    Returns:
        C counts in label order.

    Raises:
        InputError: If imb_factor is below 1, imb_type is unknown, or a class is left without images.
    """
    if not imb_factor >= 1:
        raise InputError(f'imb-factor {imb_factor:g} is below 1: give the size of the largest class over the smallest.')
    if imb_type == 'exp':
        ratios = [(1 / imb_factor) ** (i / max(num_classes - 1, 1)) for i in range(num_classes)]
    elif imb_type == 'step':
        ratios = [1. if i < num_classes // 2 else 1 / imb_factor for i in range(num_classes)]
    else:
        raise InputError(f"imb-type '{imb_type}' is unknown: choose 'exp' or 'step'.")
    counts = [int(max_count * ratio) for ratio in ratios]
    if not counts[-1]:
        raise InputError(
            f'imb-factor {imb_factor:g} leaves class {counts.index(0)} with no training image: '
            f'choose at most {max_count}, the size of the largest class.')
    return counts


def long_tailed_indices(targets: Sequence[int], counts: Sequence[int]) -> np.ndarray:
    """Positions of the first `counts[c]` images of each class c, in file order."""
    targets = np.asarray(targets)
    return np.sort(np.concatenate([np.flatnonzero(targets == c)[:count] for c, count in enumerate(counts)]))


def _explain_cifar(cls: Type[CIFAR10], root: str) -> str:
    folder = Path(root, cls.base_folder)
    remedy = 'give the folder that holds it with --data-dir, or add --dataset-download where there is a network.'
    if not folder.is_dir():
        return f"{cls.__name__} is not in '{root}', which has no folder '{cls.base_folder}': {remedy}"
    for name, md5 in [*cls.train_list, *cls.test_list, [cls.meta['filename'], cls.meta['md5']]]:
        if not (folder / name).is_file():
            return f"{cls.__name__} in '{root}' lacks the file '{folder / name}': {remedy}"
        if not check_integrity(str(folder / name), md5):
            return f"'{folder / name}' is damaged, its MD5 is not {md5}: remove it and get {cls.__name__} again."
    return f"{cls.__name__} in '{root}' cannot be read: {remedy}"


def cifar_lt(
        cls: Type[CIFAR10],
        root: str,
        train: bool,
        imb_factor: float = 100.,
        imb_type: str = 'exp',
        download: bool = False,
) -> CIFAR10:
    """CIFAR-10-LT or CIFAR-100-LT: the published long-tailed training subset, or the whole test set.

    Args:
        cls: torchvision's CIFAR10 or CIFAR100.
        root: Folder of torchvision's files.
        train: Training subset rather than test set.
        imb_factor: Imbalance factor of the training subset.
        imb_type: 'exp' or 'step', see `long_tailed_counts`.
        download: Download the files where they are missing.

    Raises:
        InputError: If files are missing or their checksums differ.
    """
    try:
        dataset = cls(root, train=train, download=download)
    except (RuntimeError, OSError) as error:
        raise InputError(_explain_cifar(cls, root)) from error
    if train:
        num_classes = len(dataset.classes)
        max_count = int(np.bincount(dataset.targets).max())
        keep = long_tailed_indices(
            dataset.targets, long_tailed_counts(max_count, num_classes, imb_factor, imb_type))
        dataset.data = dataset.data[keep]
        dataset.targets = np.asarray(dataset.targets)[keep].tolist()
    return dataset


def cifar10_lt(root: str, train: bool, **kwargs) -> CIFAR10:
    """CIFAR-10-LT, see `cifar_lt`."""
    return cifar_lt(CIFAR10, root, train, **kwargs)


def cifar100_lt(root: str, train: bool, **kwargs) -> CIFAR10:
    """CIFAR-100-LT, see `cifar_lt`."""
    return cifar_lt(CIFAR100, root, train, **kwargs)


class DigitsLT(Dataset):
    """scikit-learn's bundled scans of handwritten digits, 8x8 grey levels, with a long-tailed training set.

    The test set is balanced and fixed: the last 50 scans of each class. The training set is drawn from the others.

    Args:
        root: Unused, scikit-learn brings the data.
        train: Training subset rather than test set.
        imb_factor: Imbalance factor of the training subset.
        imb_type: 'exp' or 'step', see `long_tailed_counts`.
        download: Unused.
        transform: Applied to each PIL image.
    """

    test_images_per_class = 50

    def __init__(
            self,
            root: str = '',
            train: bool = True,
            imb_factor: float = 100.,
            imb_type: str = 'exp',
            download: bool = False,
            transform=None,
    ):
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise InputError("digits_lt needs scikit-learn: pip install 'shike-timm[quickstart]'.") from error
        digits = load_digits()
        self.classes = [str(name) for name in digits.target_names]
        positions = [np.flatnonzero(digits.target == c) for c in range(len(self.classes))]
        if train:
            pool = np.concatenate([p[:-self.test_images_per_class] for p in positions])
            max_count = min(len(p) for p in positions) - self.test_images_per_class
            counts = long_tailed_counts(max_count, len(self.classes), imb_factor, imb_type)
            keep = pool[long_tailed_indices(digits.target[pool], counts)]
        else:
            keep = np.concatenate([p[-self.test_images_per_class:] for p in positions])
        self.data = np.round(digits.images[keep] * (255 / 16)).astype(np.uint8)
        self.targets = digits.target[keep].tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int):
        image = Image.fromarray(self.data[index]).convert('RGB')
        return image if self.transform is None else self.transform(image), self.targets[index]


LONG_TAILED = {'cifar10_lt': cifar10_lt, 'cifar100_lt': cifar100_lt, 'digits_lt': DigitsLT}


def is_long_tailed(name: str) -> bool:
    """Whether `name` is one of this module's data sets."""
    return name in LONG_TAILED


def create_long_tailed(name: str, root: Optional[str], train: bool, **kwargs) -> Dataset:
    """One of this module's data sets by name; see `cifar_lt` and `DigitsLT` for the arguments."""
    return LONG_TAILED[name](root or '.', train, **kwargs)


def hold_out(dataset: Dataset, share: float) -> Tuple[Dataset, Dataset]:
    """Split one of this module's training sets, to choose settings without looking at the test set.

    Args:
        dataset: Training set with arrays `data` and `targets`.
        share: Share of each class's images to hold out, rounded up: its last ones in file order.

    Returns:
        What is left to train on, and what is held out.

    Raises:
        InputError: If a class is left without training images.
    """
    targets = np.asarray(dataset.targets)
    counts = np.bincount(targets)
    kept = [count - math.ceil(round(share * count, 6)) for count in counts]
    if min(kept) < 1:
        bare = int(np.argmin(kept))
        raise InputError(
            f'holdout {share:g} leaves class {bare} with no training image of {counts[bare]}: choose a smaller share, '
            'or a lower imb-factor.')
    keep = long_tailed_indices(targets, kept)
    parts = []
    for index in (keep, np.setdiff1d(np.arange(len(targets)), keep)):
        part = copy.copy(dataset)
        part.data, part.targets = dataset.data[index], targets[index].tolist()
        parts.append(part)
    return tuple(parts)
