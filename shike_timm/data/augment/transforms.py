"""Training transforms: timm's, with the parts of the CIFAR recipe that timm lacks put in their places."""
from typing import Any, Optional, Tuple

import torch
from timm.data import create_transform
from torch import Tensor
from torchvision import transforms

__all__ = ['Cutout', 'create_train_transform']


class Cutout(torch.nn.Module):
    """Blacken one square at a random place of an image, clipped at the borders (DeVries and Taylor, 2017).

    The centre is uniform over the pixels, so the square that remains can be as small as a quarter.

    Args:
        size: Side of the square in pixels.
    """

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def forward(self, image: Tensor) -> Tensor:
        """Give the image [C, H, W] with its square set to 0, in place."""
        height, width = image.shape[-2:]
        top = int(torch.randint(height, ())) - self.size // 2
        left = int(torch.randint(width, ())) - self.size // 2
        image[..., max(top, 0):max(top + self.size, 0), max(left, 0):max(left + self.size, 0)] = 0
        return image

    def __repr__(self) -> str:
        return f'{type(self).__name__}(size={self.size})'


def create_train_transform(
        input_size: Tuple[int, int, int],
        train_crop_mode: Optional[str] = None,
        auto_augment: Optional[str] = None,
        cutout: int = 0,
        no_aug: bool = False,
        **timm_kwargs: Any,
) -> transforms.Compose:
    """Transform from PIL images to uint8 tensors, as timm's prefetching loader takes them.

    Args:
        input_size: Channels, height and width.
        train_crop_mode: timm's 'rrc', 'rkrc' or 'rkrr', or 'pad': a crop after padding by 1/8 of the side with black.
        auto_augment: timm's policy string, or 'cifar10': torchvision's AutoAugment CIFAR-10 policy with fill 128.
        cutout: Side in pixels of a square to blacken last; 0 for none.
        no_aug: Resize and crop only.
        **timm_kwargs: Other arguments of `timm.data.create_transform`.
    """
    timm_kwargs.update(input_size=input_size, is_training=True, use_prefetcher=True)
    if no_aug:
        return create_transform(no_aug=True, **timm_kwargs)
    pad_crop = train_crop_mode == 'pad'
    cifar_policy = auto_augment == 'cifar10'
    first, second, last = create_transform(
        train_crop_mode=None if pad_crop else train_crop_mode,
        auto_augment=None if cifar_policy else auto_augment,
        separate=True,
        **timm_kwargs,
    )
    first, second, last = list(first.transforms), list(second.transforms), list(last.transforms)
    if pad_crop:
        size = input_size[-2:]
        first[:1] = [transforms.Resize(size), transforms.RandomCrop(size, padding=[side // 8 for side in size[::-1]])]
    if cifar_policy:
        second = [transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10, fill=[128] * 3)]
    if cutout:
        last.append(Cutout(cutout))
    return transforms.Compose(first + second + last)
