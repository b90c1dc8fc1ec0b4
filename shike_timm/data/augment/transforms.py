"""Transforms of images: timm's, and the parts that timm does not have."""
import math
from dataclasses import dataclass
from typing import Any, Dict, Tuple, cast

import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from torch import Tensor
from torchvision import transforms

from . import AugmentationConfig


class Cutout(torch.nn.Module):
    """Blacken one square, clipped at the borders, around a random pixel of an image (DeVries and Taylor, 2017)."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def forward(self, image: Tensor) -> Tensor:
        """Set the square of an image [C, H, W] to 0 in place."""
        height, width = image.shape[-2:]
        top = int(torch.randint(height, ())) - self.size // 2
        left = int(torch.randint(width, ())) - self.size // 2
        image[..., max(top, 0):max(top + self.size, 0), max(left, 0):max(left + self.size, 0)] = 0
        return image


@dataclass
class ShortenLong:
    """Crop a very long PIL image around its middle to a little more than `ratio` times its shorter side.

    Resized whole, a panorama takes gigabytes, and the centre crop then drops nearly all of it. An even multiple of the
    shorter side goes at both ends, so that the other pixels land where they would without this.
    """

    ratio: int = 8

    def __call__(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        short, long = sorted(image.size)
        cut = max((long - self.ratio * short) // (4 * short), 0) * 2 * short
        if not cut:
            return image
        return image.crop((cut, 0, width - cut, height) if width == long else (0, cut, width, height - cut))


def create_eval_transform(data_config: Dict[str, Any]) -> transforms.Compose:
    """timm's transform for evaluation, from PIL images to uint8 [C, H, W], with little memory for long images."""
    transform: Any = create_transform(**data_config, is_training=False, use_prefetcher=True)
    if data_config.get('crop_mode') in (None, 'center'):
        size = data_config['input_size'][-2:]
        ratio = math.ceil(8 * max(data_config.get('crop_pct') or 1, 1) * max(size) / min(size))
        transform.transforms.insert(0, ShortenLong(ratio))
    return transform


def create_train_transform(
        input_size: Tuple[int, int, int], augmentation: AugmentationConfig,
        mean: Tuple[float, ...] = IMAGENET_DEFAULT_MEAN, std: Tuple[float, ...] = IMAGENET_DEFAULT_STD,
) -> transforms.Compose:
    """Transform from PIL images to the uint8 tensors that timm's loader takes. Random erasing is left to the loader."""
    same_names = (
        'scale', 'ratio', 'hflip', 'vflip', 'color_jitter', 'color_jitter_prob', 'grayscale_prob', 'gaussian_blur_prob')
    options: Dict[str, Any] = {name: getattr(augmentation, name) for name in same_names}
    options.update(
        input_size=input_size, is_training=True, use_prefetcher=True, mean=mean, std=std,
        interpolation=augmentation.train_interpolation)
    if augmentation.no_aug:
        return cast(transforms.Compose, create_transform(no_aug=True, **options))
    pad_crop = augmentation.train_crop_mode == 'pad'
    cifar_policy = augmentation.aa == 'cifar10'
    parts: Any = create_transform(
        train_crop_mode=None if pad_crop else augmentation.train_crop_mode,
        auto_augment=None if cifar_policy else augmentation.aa, separate=True, **options)
    first, second, last = (list(part.transforms) for part in parts)
    if pad_crop:
        size = input_size[-2:]
        first[:1] = [transforms.Resize(size), transforms.RandomCrop(size, padding=[side // 8 for side in size[::-1]])]
    if cifar_policy:
        grey: Any = [128] * 3  # Pillow takes no float as fill.
        # Colour jitter takes this place.
        second[:1] = [transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10, fill=grey)]
    if augmentation.force_color_jitter and augmentation.aa:
        # The three are brightness, contrast and saturation.
        jitter = transforms.ColorJitter(*[augmentation.color_jitter] * 3)
        probability = augmentation.color_jitter_prob
        second.insert(0, jitter if probability is None else transforms.RandomApply([jitter], probability))
    if augmentation.cutout:
        last.append(Cutout(augmentation.cutout))
    return transforms.Compose(first + second + last)
