"""Augmentation: of one image at a time, and of whole batches."""
from dataclasses import dataclass
from typing import Optional, Sequence

__all__ = ['Augmentation']


@dataclass(frozen=True)
class Augmentation:
    """What happens to a training image.

    Attributes:
        no_aug: Resize and crop only, whatever the others say.
        train_crop_mode: timm's 'rrc', 'rkrc' or 'rkrr', or 'pad': a crop after padding by 1/8 of the side with black.
            None is 'rrc'.
        scale: Share of the area that 'rrc' keeps, from and to; None for timm's.
        ratio: Aspect ratio of 'rrc', from and to; None for timm's.
        hflip: Horizontal flip probability.
        vflip: Vertical flip probability.
        color_jitter: Strength of colour jitter, which a policy takes the place of.
        color_jitter_prob: Probability of colour jitter, None for always.
        grayscale_prob: Probability of an image without colours.
        gaussian_blur_prob: Probability of blur.
        force_color_jitter: Jitter colours before a policy all the same.
        auto_augment: timm's policy string, or 'cifar10': torchvision's AutoAugment CIFAR-10 policy with fill 128.
        cutout: Side in pixels of a square to blacken; 0 for none.
        interpolation: 'bilinear', 'bicubic' or 'random', where an image is resized.
        re_prob: Random erasing probability.
        re_mode: Random erasing fill: 'const', 'rand' or 'pixel'.
        re_count: Random erasing regions.
    """

    no_aug: bool = False
    train_crop_mode: Optional[str] = None
    scale: Optional[Sequence[float]] = None
    ratio: Optional[Sequence[float]] = None
    hflip: float = 0.5
    vflip: float = 0.
    color_jitter: float = 0.4
    color_jitter_prob: Optional[float] = None
    grayscale_prob: float = 0.
    gaussian_blur_prob: float = 0.
    force_color_jitter: bool = False
    auto_augment: Optional[str] = None
    cutout: int = 0
    interpolation: str = 'bilinear'
    re_prob: float = 0.
    re_mode: str = 'const'
    re_count: int = 1
