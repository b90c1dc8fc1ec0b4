"""A loader over images that lie on the device as one uint8 tensor."""
from typing import Any, Dict, Iterator, Optional, Tuple

import torch
from torch import Tensor

from ..distributed import rank, world_size
from .augment import AugmentationConfig
from .augment.batch import augment_batch
from .dataset import AnySet
from .sampler import EpochSampler

AUGMENTED_AT_ONCE = 16384  # Number of images in a round of augmentation. It limits the memory.


def why_not_on_device(data: AnySet, data_config: Dict[str, Any], is_training: bool) -> Optional[str]:
    """Why a set cannot lie on the device as it is, None if it can."""
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
    """Batches of normalised images [B, C, H, W] and their labels [B] from uint8 images [N, H, W, C] on the device.

    With a sampler the loader augments the sampled images, many batches at once. Without a sampler it yields this
    process's images in order.
    """

    def __init__(
            self, images: Any, targets: Any, mean: Tuple[float, ...], std: Tuple[float, ...], batch_size: int,
            device: torch.device, augmentation: Optional[AugmentationConfig] = None,
            sampler: Optional[EpochSampler] = None,
    ):
        if sampler is None:
            images, targets = images[rank()::world_size()], targets[rank()::world_size()]
        self.images = torch.as_tensor(images).to(device).permute(0, 3, 1, 2).contiguous()
        self.targets = torch.as_tensor(targets, dtype=torch.int64).to(device)
        self.batch_size = batch_size
        self.augmentation = augmentation or AugmentationConfig(no_aug=True)
        self.sampler = sampler
        channels = self.images.shape[1]
        self.mean, self.std = (
            torch.tensor([255 * x for x in values], device=device).expand(channels).view(1, channels, 1, 1)
            for values in (mean, std)
        )

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size) if self.sampler is None else self.sampler.num_batches

    def _rounds(self) -> Iterator[Tuple[Tensor, Tensor]]:
        if self.sampler is None:
            yield self.images, self.targets
            return
        order, generator = self.sampler.draw()
        if self.sampler.share.start:
            # Each process has its own random draws.
            generator.manual_seed(generator.initial_seed() + self.sampler.share.start)
        order = order.to(self.images.device)
        for chosen in order.split(max(AUGMENTED_AT_ONCE // self.batch_size, 1) * self.batch_size):
            yield augment_batch(self.images[chosen], self.augmentation, generator), self.targets[chosen]

    def __iter__(self) -> Iterator[Tuple[Tensor, Tensor]]:
        for images, targets in self._rounds():
            for batch, target in zip(images.split(self.batch_size), targets.split(self.batch_size)):
                yield batch.to(torch.float32, copy=True).sub_(self.mean).div_(self.std), target
