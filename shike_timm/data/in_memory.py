"""Loaders over a data set that lies on the device as one uint8 tensor."""
from typing import Any, Dict, Iterator, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from torch import Tensor

from .augment import Augmentation
from .augment.batch import augment_batch
from .datasets import ImageSet

__all__ = ['DeviceLoader', 'device_data_gap']

AUGMENTED_AT_ONCE = 16384  # images; bounds the memory that one round of augmentation takes


def device_data_gap(data: ImageSet, data_config: Dict[str, Any], is_training: bool) -> Optional[str]:
    """Why a data set cannot lie on the device as it is; None if it can."""
    if data.images is None:
        return 'its images are not in memory'
    channels, *size = data_config['input_size']
    height, width = data.images.shape[1:3]
    if data.images.shape[1:] != (*size, channels):
        return f'its images are {height}x{width}, not {size[0]}x{size[1]}'
    if not is_training and data_config['crop_pct'] != 1:
        return f"--crop-pct is {data_config['crop_pct']:g}, not 1"
    return None


class DeviceLoader:
    """Batches of normalised images and their labels from tensors on the device.

    With an augmentation it is a training loader: a new order each time, augmented in rounds of many images, and an
    incomplete last batch is dropped; torch's generator seeds each pass at its start. Without, batches come in order
    and whole.

    Args:
        images: uint8 images [N, H, W, C].
        targets: N class indices.
        mean: Mean of each channel, of images in 0..1.
        std: Standard deviation of each channel.
        batch_size: Images a batch.
        device: Where everything lies and happens.
        augmentation: What happens to the images; it must have a batched form.
    """

    def __init__(
            self,
            images: np.ndarray,
            targets: Union[Sequence[int], np.ndarray],
            mean: Tuple[float, ...],
            std: Tuple[float, ...],
            batch_size: int,
            device: torch.device,
            augmentation: Optional[Augmentation] = None,
    ):
        self.images = torch.as_tensor(images).to(device).permute(0, 3, 1, 2).contiguous()
        self.targets = torch.as_tensor(targets, dtype=torch.int64).to(device)
        self.batch_size = batch_size
        self.augmentation = augmentation
        channels = self.images.shape[1]
        self.mean, self.std = (
            torch.tensor([255 * x for x in values], device=device).expand(channels).view(1, channels, 1, 1)
            for values in (mean, std)
        )

    def __len__(self) -> int:
        """Batches of an epoch."""
        num_images = len(self.images)
        return num_images // self.batch_size if self.augmentation else -(-num_images // self.batch_size)

    def _rounds(self) -> Iterator[Tuple[Tensor, Tensor]]:
        if self.augmentation is None:
            yield self.images, self.targets
            return
        generator = torch.Generator().manual_seed(int(torch.randint(2 ** 62, ())))
        order = torch.randperm(len(self.images), generator=generator)
        order = order[:len(self) * self.batch_size].to(self.images.device)
        for chosen in order.split(max(AUGMENTED_AT_ONCE // self.batch_size, 1) * self.batch_size):
            yield augment_batch(self.images[chosen], self.augmentation, generator), self.targets[chosen]

    def __iter__(self) -> Iterator[Tuple[Tensor, Tensor]]:
        for images, targets in self._rounds():
            for batch, target in zip(images.split(self.batch_size), targets.split(self.batch_size)):
                yield batch.to(torch.float32, copy=True).sub_(self.mean).div_(self.std), target
