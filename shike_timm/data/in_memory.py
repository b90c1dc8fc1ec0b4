"""Loaders over a data set that lies on the device as one uint8 tensor."""
from typing import Any, Callable, Dict, Iterator, Optional, Tuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10

from .augment.batch import BatchAugment
from .long_tail import DigitsLT

__all__ = ['DeviceLoader', 'batch_augment_gap', 'create_batch_augment', 'device_data_gap', 'in_memory_images']

AUGMENTED_AT_ONCE = 16384  # images; bounds the memory that one round of augmentation takes


def in_memory_images(dataset: Dataset) -> Optional[np.ndarray]:
    """The images [N, H, W, 3] of a data set that holds them all as uint8, None for any other."""
    if isinstance(dataset, DigitsLT):
        return np.repeat(dataset.data[..., None], 3, axis=-1)
    return dataset.data if isinstance(dataset, CIFAR10) else None


def create_batch_augment(
        train_crop_mode: Optional[str] = None,
        auto_augment: Optional[str] = None,
        cutout: int = 0,
        no_aug: bool = False,
        hflip: float = 0.5,
        vflip: float = 0.,
        **ignored: Any,
) -> BatchAugment:
    """What `create_train_transform` does with the same arguments, for whole batches.

    Only where `batch_augment_gap` finds nothing amiss with them.
    """
    if no_aug:
        return BatchAugment()
    return BatchAugment(True, hflip, vflip, bool(auto_augment), cutout)


def batch_augment_gap(
        train_crop_mode: Optional[str] = None,
        auto_augment: Optional[str] = None,
        no_aug: bool = False,
        color_jitter: float = 0.4,
        re_prob: float = 0.,
        mixup: Optional[Dict[str, Any]] = None,
        **ignored: Any,
) -> Optional[str]:
    """The first of a training loader's arguments that has no batched form, as its option reads; None if all have."""
    if mixup:
        return '--mixup or --cutmix'
    if no_aug:
        return None
    if train_crop_mode != 'pad':
        return f"--train-crop-mode {train_crop_mode or 'rrc'}"
    if auto_augment not in (None, '', 'cifar10'):
        return f'--aa {auto_augment}'
    if color_jitter and not auto_augment:
        return f'--color-jitter {color_jitter:g}'
    return f'--reprob {re_prob:g}' if re_prob else None


def device_data_gap(dataset: Dataset, data_config: Dict[str, Any], is_training: bool) -> Optional[str]:
    """Why a data set cannot lie on the device as it is; None if it can."""
    images = in_memory_images(dataset)
    if images is None:
        return 'its images are not in memory'
    channels, *size = data_config['input_size']
    if images.shape[1:] != (*size, channels):
        return f'its images are {images.shape[1]}x{images.shape[2]}, not {size[0]}x{size[1]}'
    if not is_training and data_config['crop_pct'] != 1:
        return f"--crop-pct is {data_config['crop_pct']:g}, not 1"
    return None


class DeviceLoader:
    """Batches of normalised images and their labels from tensors on the device.

    With `augment` it is a training loader: a new order each time, augmented in rounds of many images, and an
    incomplete last batch is dropped; torch's generator seeds each pass at its start. Without, batches come in order
    and whole.

    Args:
        images: uint8 images [N, H, W, C].
        targets: N class indices.
        mean: Mean of each channel, of images in 0..1.
        std: Standard deviation of each channel.
        batch_size: Images a batch.
        device: Where everything lies and happens.
        augment: From uint8 images [n, C, H, W] and a generator to uint8 images.
    """

    def __init__(
            self,
            images: np.ndarray,
            targets,
            mean: Tuple[float, ...],
            std: Tuple[float, ...],
            batch_size: int,
            device: torch.device,
            augment: Optional[Callable[[Tensor, torch.Generator], Tensor]] = None,
    ):
        self.images = torch.as_tensor(images).to(device).permute(0, 3, 1, 2).contiguous()
        self.targets = torch.as_tensor(targets, dtype=torch.int64).to(device)
        self.batch_size = batch_size
        self.augment = augment
        channels = self.images.shape[1]
        self.mean, self.std = (
            torch.tensor([255 * x for x in values], device=device).expand(channels).view(1, channels, 1, 1)
            for values in (mean, std)
        )

    def __len__(self) -> int:
        """Batches of an epoch."""
        num_images = len(self.images)
        return num_images // self.batch_size if self.augment else -(-num_images // self.batch_size)

    def _rounds(self) -> Iterator[Tuple[Tensor, Tensor]]:
        if self.augment is None:
            yield self.images, self.targets
            return
        generator = torch.Generator().manual_seed(int(torch.randint(2 ** 62, ())))
        order = torch.randperm(len(self.images), generator=generator)
        order = order[:len(self) * self.batch_size].to(self.images.device)
        for chosen in order.split(max(AUGMENTED_AT_ONCE // self.batch_size, 1) * self.batch_size):
            yield self.augment(self.images[chosen], generator), self.targets[chosen]

    def __iter__(self) -> Iterator[Tuple[Tensor, Tensor]]:
        for images, targets in self._rounds():
            for batch, target in zip(images.split(self.batch_size), targets.split(self.batch_size)):
                yield batch.to(torch.float32, copy=True).sub_(self.mean).div_(self.std), target
