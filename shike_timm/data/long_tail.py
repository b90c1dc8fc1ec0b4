"""Long-tailed subsets of balanced data sets, as data sets of their own."""
import math
from functools import partial
from pathlib import Path
from typing import Callable, List, Optional, Sequence, Tuple, Type, Union

import numpy as np
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.utils import check_integrity

from ..errors import InputError
from .datasets import DataRequest, DatasetEntry, MemorySet, in_memory_set, register_dataset

__all__ = ['hold_out', 'long_tailed_counts', 'long_tailed_indices', 'register_long_tailed']

DIGITS_TEST_IMAGES = 50  # the last ones of each class


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


def long_tailed_indices(
        targets: Union[Sequence[int], np.ndarray],
        counts: Sequence[int],
        seed: Optional[int] = None,
) -> np.ndarray:
    """Positions of `counts[c]` images of each class c, in file order.

    Args:
        targets: Class indices [N].
        counts: Images of each class to keep.
        seed: Seed of the images that are kept, drawn as LDAM-DRW draws them; None for the first of each class.
    """
    targets = np.asarray(targets)
    random = None if seed is None else np.random.RandomState(seed)
    kept = []
    for c, count in enumerate(counts):
        positions = np.flatnonzero(targets == c)
        if random is not None:
            random.shuffle(positions)
        kept.append(positions[:count])
    return np.sort(np.concatenate(kept))


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


def _cifar(cls: Type[CIFAR10], request: DataRequest, train: bool) -> MemorySet:
    """torchvision's CIFAR-10 or CIFAR-100."""
    root = request.root or '.'
    try:
        dataset = cls(root, train=train, download=request.download)
    except (RuntimeError, OSError) as error:
        raise InputError(_explain_cifar(cls, root)) from error
    return in_memory_set(dataset.data, dataset.targets, dataset.classes)


def _digits(request: DataRequest, train: bool) -> MemorySet:
    """scikit-learn's bundled scans of handwritten digits, 8x8 grey levels, parted into training and test images."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError("digits_lt needs scikit-learn: pip install 'shike-timm[quickstart]'.") from error
    digits = load_digits()
    names = [str(name) for name in digits.target_names]
    part = slice(-DIGITS_TEST_IMAGES) if train else slice(-DIGITS_TEST_IMAGES, None)
    keep = np.concatenate([np.flatnonzero(digits.target == c)[part] for c in range(len(names))])
    images = np.round(digits.images[keep] * (255 / 16)).astype(np.uint8)
    return in_memory_set(images[..., None].repeat(3, axis=-1), digits.target[keep], names)


def hold_out(data: MemorySet, sizes: Sequence[int], option: str) -> Tuple[MemorySet, MemorySet]:
    """Split a training set in memory, to choose settings without looking at the test set.

    Args:
        data: Training set.
        sizes: Images of each class to hold out, its last ones in file order.
        option: What asks for it, for the error.

    Returns:
        What is left to train on, and what is held out.

    Raises:
        InputError: If a class is left without training images.
    """
    kept = [count - size for count, size in zip(data.class_counts, sizes)]
    if min(kept) < 1:
        bare = kept.index(min(kept))
        raise InputError(
            f'{option} leaves class {bare} with no training image of {data.class_counts[bare]}: hold out fewer, '
            'or choose a lower imb-factor.')
    keep = long_tailed_indices(data.targets, kept)
    return data.take(keep), data.take(np.setdiff1d(np.arange(len(data.targets)), keep))


def _load_train(
        source: Callable[[DataRequest, bool], MemorySet],
        request: DataRequest,
) -> Tuple[MemorySet, Optional[MemorySet]]:
    data, held_out = source(request, True), None
    if request.val_per_class:
        sizes = [request.val_per_class] * len(data.class_counts)
        data, held_out = hold_out(data, sizes, f'val-per-class {request.val_per_class}')
    counts = long_tailed_counts(
        min(data.class_counts), len(data.class_counts), request.imb_factor, request.imb_type)
    data = data.take(long_tailed_indices(data.targets, counts, request.imb_seed))
    if request.holdout:
        sizes = [math.ceil(round(request.holdout * count, 6)) for count in counts]
        data, held_out = hold_out(data, sizes, f'holdout {request.holdout:g}')
    if held_out is not None:
        held_out.source = 'held out of the training set'
    return data, held_out


def register_long_tailed(name: str, source: Callable[[DataRequest, bool], MemorySet]) -> None:
    """Make the long-tailed subset of a balanced data set known by a name.

    Args:
        name: Name of the subset.
        source: Gives the whole training set, or the test set, as a set in memory.
    """
    register_dataset(DatasetEntry(
        name,
        partial(_load_train, source),
        lambda request: source(request, False),
        has_imb_factor=True,
        eval_split='test',
    ))


register_long_tailed('cifar10_lt', partial(_cifar, CIFAR10))
register_long_tailed('cifar100_lt', partial(_cifar, CIFAR100))
register_long_tailed('digits_lt', _digits)
