"""Augmentation of single images and of whole batches."""
from dataclasses import dataclass
from typing import List, Optional

from ...options import option


@dataclass(frozen=True)
class AugmentationConfig:
    """Augmentation."""

    no_aug: bool = option(False, 'train without augmentation')
    train_crop_mode: Optional[str] = option(
        None, "crop of training images: one of timm's modes, or pad, a random crop after padding by 1/8 of the side",
        choices=('rrc', 'rkrc', 'rkrr', 'pad'))
    scale: List[float] = option(
        [0.08, 1.], 'smallest and largest area of a random resized crop', 'PCT', nargs=2, card='changed')
    ratio: List[float] = option(
        [3 / 4, 4 / 3], 'smallest and largest aspect ratio of a random resized crop', 'R', nargs=2, card='changed')
    hflip: float = option(0.5, 'probability of a horizontal flip', 'P')
    vflip: float = option(0., 'probability of a vertical flip', 'P')
    color_jitter: float = option(0.4, 'strength of colour jitter. It is off with --aa')
    force_color_jitter: bool = option(False, 'jitter colours before --aa too', card='changed')
    color_jitter_prob: Optional[float] = option(
        None, 'probability of colour jitter, 1 if it is not given', 'P', low=0, card='changed')
    grayscale_prob: float = option(0., 'probability of making an image grey', 'P', low=0, card='changed')
    gaussian_blur_prob: float = option(0., 'probability of Gaussian blur', 'P', low=0, card='changed')
    aa: Optional[str] = option(
        None, "policy: cifar10 (torchvision's AutoAugment), or one of timm's such as original or rand-m9-mstd0.5")
    cutout: int = option(0, 'side of a square that is blackened, in pixels', low=0)
    reprob: float = option(0., 'probability of random erasing', 'P')
    remode: str = option('pixel', 'fill of random erasing', choices=('const', 'rand', 'pixel'), card='changed')
    recount: int = option(1, 'number of regions of random erasing', card='changed')
    mixup: float = option(
        0., 'alpha of Mixup. With --method shike it needs --alpha 0. It does not work with ldam_drw', 'A')
    cutmix: float = option(0., 'alpha of CutMix. It needs what --mixup needs', 'A')
    mixup_prob: float = option(1., 'probability of Mixup or CutMix', 'P', card='changed')
    mixup_switch_prob: float = option(0.5, 'probability of CutMix if both are on', 'P', card='changed')
    mixup_off_epoch: int = option(
        0, 'first epoch without mixing. Stage two continues the count. 0 means that mixing stays on', 'N', low=0,
        card='changed')
    mixup_mode: str = option(
        'batch', 'what is mixed with one choice: a batch, a pair or an image', choices=('batch', 'pair', 'elem'),
        card='changed')
    train_interpolation: str = option(
        'random', 'interpolation in training', choices=('random', 'bilinear', 'bicubic'), card='changed')
