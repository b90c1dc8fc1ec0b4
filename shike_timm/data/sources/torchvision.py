"""torchvision's data sets, `torch/NAME`."""
from typing import Any

import numpy as np
from PIL import Image
from torchvision.datasets import QMNIST

from ...errors import InputError
from ..dataset import ImageSet, ImageSource, in_memory_set, label_images
from ..registry import register_dataset
from .timm_source import TimmSource

IN_MEMORY = ('torch/cifar10', 'torch/cifar100')  # torchvision holds the images of these as uint8 arrays [N, H, W, 3].


class _TorchImages(ImageSource):
    """Images of one of torchvision's data sets, whose paths are their numbers."""

    def __init__(self, dataset: Any, num_images: int):
        super().__init__(str(getattr(dataset, 'root', '')), (f'{i:08d}' for i in range(num_images)))
        self.dataset = dataset

    def open(self, row: int) -> Image.Image:
        return self.dataset[row][0]

    def stamp(self, row: int) -> str:
        return f'{type(self.dataset).__name__}|{len(self.dataset)}|{row}'  # The files of these data sets do not change.


@register_dataset('torch/')
class TorchSource(TimmSource):
    """A data set of torchvision."""

    def load(self, split: str, is_training: bool) -> ImageSet:
        name = self.config.dataset
        if not self.config.data_dir:
            raise InputError(f"No folder of data was named for dataset '{name}': give it as --data-dir.")
        dataset = self.create(split, is_training)
        if name.lower() in IN_MEMORY:
            return in_memory_set(dataset.data, dataset.targets, dataset.classes)
        targets = getattr(dataset, 'targets', None)
        if targets is None:
            samples = getattr(dataset, 'samples', None)
            targets = [target for _, target in samples] if samples else [
                target for target, _ in getattr(dataset, 'index', ())]  # iNaturalist has this index.
        targets = np.asarray(targets)
        if isinstance(dataset, QMNIST):
            targets = targets[:, 0]  # The other columns describe the scan.
        if not len(targets) or targets.ndim > 1 or targets.min() < 0:
            raise InputError(f"The {split} split of '{name}' has images without a label.")
        classes = getattr(dataset, 'classes', None) or getattr(dataset, 'all_categories', None)
        order = [str(one if isinstance(one, str) else one[0]) for one in classes] if classes else None
        if order and len(set(order)) < len(order):  # ImageNet has two classes called crane.
            order = getattr(dataset, 'wnids', None)
        labels = [order[target] if order else str(target) for target in targets]
        return label_images(self.config, _TorchImages(dataset, len(labels)), labels, order=order)
