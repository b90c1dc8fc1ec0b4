"""Augmentation: of one image at a time, and of whole batches."""
from dataclasses import dataclass
from typing import List, Optional

from ...options import option


@dataclass(frozen=True)
class AugmentationConfig:
    """Augmentation."""

    no_aug: bool = option(False, 'no augmentation at all')
    train_crop_mode: Optional[str] = option(
        None, "timm's crop modes, or pad: a random crop after padding by 1/8 of the side",
        choices=('rrc', 'rkrc', 'rkrr', 'pad'))
    scale: List[float] = option([0.08, 1.], 'area of rrc', 'PCT', nargs=2, card='changed')
    ratio: List[float] = option([3 / 4, 4 / 3], 'aspect of rrc', 'R', nargs=2, card='changed')
    hflip: float = option(0.5, 'horizontal flip probability', 'P')
    vflip: float = option(0., 'vertical flip probability', 'P')
    color_jitter: float = option(0.4, 'colour jitter, off with --aa')
    force_color_jitter: bool = option(False, 'colour jitter before --aa too', card='changed')
    color_jitter_prob: Optional[float] = option(
        None, 'probability of colour jitter, 1 by default', 'P', low=0, card='changed')
    grayscale_prob: float = option(0., 'probability of taking the colours out', 'P', low=0, card='changed')
    gaussian_blur_prob: float = option(0., 'probability of blur', 'P', low=0, card='changed')
    aa: Optional[str] = option(None, "cifar10 (torchvision's AutoAugment policy), or timm's: original, rand-m9-mstd0.5")
    cutout: int = option(0, 'side of a square to blacken', low=0)
    reprob: float = option(0., 'random erasing probability', 'P')
    remode: str = option('pixel', 'random erasing fill', choices=('const', 'rand', 'pixel'), card='changed')
    recount: int = option(1, 'random erasing regions', card='changed')
    mixup: float = option(0., 'Mixup alpha; with --method shike needs --alpha 0, not with ldam_drw', 'A')
    cutmix: float = option(0., 'CutMix alpha, likewise', 'A')
    mixup_prob: float = option(1., 'probability of Mixup or CutMix', 'P', card='changed')
    mixup_switch_prob: float = option(0.5, 'probability of CutMix where both are on', 'P', card='changed')
    mixup_off_epoch: int = option(
        0, 'epoch from which on nothing is mixed, counted on into stage two; 0 for never', 'N', low=0, card='changed')
    mixup_mode: str = option('batch', 'how to mix', choices=('batch', 'pair', 'elem'), card='changed')
    train_interpolation: str = option(
        'random', 'interpolation in training', choices=('random', 'bilinear', 'bicubic'), card='changed')
