"""Long-tailed subsets of balanced data sets, as data sets of their own."""
from abc import abstractmethod
from functools import cached_property
from pathlib import Path
from typing import List, Optional, Sequence, Tuple, Type, Union

import numpy as np
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.utils import check_integrity

from ...errors import InputError
from ..dataset import ImageSet, in_memory_set
from ..holdout import hold_out_last
from ..registry import DataSource, register_dataset

DIGITS_TEST_IMAGES = 50  # Number of last images of each class that are the test images.


def long_tailed_counts(max_count: int, num_classes: int, imb_factor: float, imb_type: str = 'exp') -> List[int]:
    """Number of images that each class keeps, in label order.

    With 'exp' class i of C keeps int(max_count * imb_factor^(-i / (C - 1))). With 'step' the first half of the classes
    keep max_count, the others int(max_count / imb_factor).
    """
    if imb_type == 'exp':
        ratios = [(1 / imb_factor) ** (i / max(num_classes - 1, 1)) for i in range(num_classes)]
    else:
        ratios = [1. if i < num_classes // 2 else 1 / imb_factor for i in range(num_classes)]
    counts = [int(max_count * ratio) for ratio in ratios]
    if not counts[-1]:
        raise InputError(
            f'imb-factor {imb_factor:g} leaves class {counts.index(0)} with no training image: '
            f'choose at most {max_count}, the size of the largest class.')
    return counts


def long_tailed_indices(
        targets: Union[Sequence[int], np.ndarray], counts: Sequence[int], seed: Optional[int] = None,
) -> np.ndarray:
    """Positions of `counts[c]` images of each class c in file order. Without a seed these are its first images.

    With a seed the images are drawn as LDAM-DRW draws them.
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


class LongTailedSource(DataSource):
    """The long-tailed subset of a balanced data set in memory. A subclass implements `load`."""

    has_imb_factor = True
    eval_split = 'test'

    @abstractmethod
    def load(self, is_training: bool) -> ImageSet:
        """The whole training set, or the test set."""

    @cached_property
    def _whole(self) -> Tuple[ImageSet, Optional[ImageSet]]:
        """The training set before it is cut, and the images that `--val-per-class` sets aside."""
        data, size = self.load(is_training=True), self.config.val_per_class
        if not size:
            return data, None
        return hold_out_last(data, [size] * len(data.class_names), f'val-per-class {size}')

    def train(self, class_names: Optional[Sequence[str]] = None) -> ImageSet:
        config, (data, _) = self.config, self._whole
        counts = long_tailed_counts(
            min(data.class_counts), len(data.class_counts), config.imb_factor, config.imb_type)
        return data.take(long_tailed_indices(data.targets, counts, config.imb_seed))

    def evaluation(self, class_names: Optional[Sequence[str]] = None) -> Optional[ImageSet]:
        return self._whole[1] if self.config.val_per_class else self.load(is_training=False)


@register_dataset('cifar10_lt')
class CIFAR10LT(LongTailedSource):
    """torchvision's CIFAR-10, cut to a long tail."""

    dataset: Type[CIFAR10] = CIFAR10

    def load(self, is_training: bool) -> ImageSet:
        root = self.config.data_dir or '.'
        try:
            dataset = self.dataset(root, train=is_training, download=self.config.dataset_download)
        except (RuntimeError, OSError) as error:
            raise InputError(_explain_cifar(self.dataset, root)) from error
        return in_memory_set(dataset.data, dataset.targets, dataset.classes)


@register_dataset('cifar100_lt')
class CIFAR100LT(CIFAR10LT):
    """torchvision's CIFAR-100, cut to a long tail."""

    dataset = CIFAR100


@register_dataset('digits_lt')
class DigitsLT(LongTailedSource):
    """scikit-learn's scans of handwritten digits, 8x8 grey levels. The last ones of each class are the test images."""

    def load(self, is_training: bool) -> ImageSet:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise InputError("digits_lt needs scikit-learn: pip install 'shike-timm[quickstart]'.") from error
        digits = load_digits()
        names = [str(name) for name in digits.target_names]
        part = slice(-DIGITS_TEST_IMAGES) if is_training else slice(-DIGITS_TEST_IMAGES, None)
        kept = np.concatenate([np.flatnonzero(digits.target == c)[part] for c in range(len(names))])
        images = np.round(digits.images[kept] * (255 / 16)).astype(np.uint8)
        return in_memory_set(images[..., None].repeat(3, axis=-1), digits.target[kept], names)
