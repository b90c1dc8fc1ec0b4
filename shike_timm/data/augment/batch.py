"""The augmentation of the CIFAR recipe for a batch on its device. Each image has its own random draws."""
from typing import List, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import AutoAugment, AutoAugmentPolicy

from . import AugmentationConfig
from .ops import OPS

NUM_MAGNITUDES = 10  # torchvision's AutoAugment has ten magnitudes.


def crop(images: Tensor, top: Tensor, left: Tensor, padding: List[int]) -> Tensor:
    """Crop each uint8 image [N, C, H, W], padded with black, from `top` and `left` [N] in the padded image."""
    rows, columns = padding
    padded = F.pad(images, (columns, columns, rows, rows))
    windows = padded.unfold(2, images.shape[2], 1).unfold(3, images.shape[3], 1)
    return windows[torch.arange(len(images), device=images.device), :, top, left]


def cutout(images: Tensor, row: Tensor, column: Tensor, size: int) -> Tensor:
    """Blacken a square at `row` and `column` [N] of each image, clipped at the borders (DeVries and Taylor, 2017)."""
    def covered(centre: Tensor, length: int) -> Tensor:
        offset = torch.arange(length, device=images.device) - (centre - size // 2)[:, None]
        return (offset >= 0) & (offset < size)

    mask = covered(row, images.shape[2])[:, :, None] & covered(column, images.shape[3])[:, None, :]
    return images.masked_fill(mask[:, None], 0)


def auto_augment(images: Tensor, generator: Optional[torch.Generator] = None) -> Tensor:
    """torchvision's AutoAugment CIFAR-10 policy for uint8 images [N, 3, H, W], with grey (128) as fill.

    The CPU draws the random numbers, so they are the same on every device, and no device waits.
    """
    transform = AutoAugment(AutoAugmentPolicy.CIFAR10)
    space = transform._augmentation_space(NUM_MAGNITUDES, (images.shape[-2], images.shape[-1]))
    names = list(OPS)
    num_images = len(images)
    policy = torch.randint(len(transform.policies), (num_images,), generator=generator)
    draw = torch.rand(num_images, 2, generator=generator)
    negative = torch.randint(2, (num_images, 2), generator=generator) == 0
    images = images.clone()
    for slot, steps in enumerate(zip(*transform.policies)):
        magnitudes, signed = zip(*(space[name] for name, _, _ in steps))
        magnitudes = [
            0. if index is None else float(values[index]) for values, (_, _, index) in zip(magnitudes, steps)]
        op = torch.tensor([names.index(name) for name, _, _ in steps])[policy]
        applied = draw[:, slot] <= torch.tensor([probability for _, probability, _ in steps])[policy]
        magnitude = torch.tensor(magnitudes, dtype=torch.float64)[policy]
        magnitude = torch.where(torch.tensor(signed)[policy] & negative[:, slot], -magnitude, magnitude)
        for i in op[applied].unique().tolist():
            chosen = ((op == i) & applied).nonzero()[:, 0]
            there = chosen.to(images.device, non_blocking=True)
            images[there] = OPS[names[i]](images[there], magnitude[chosen].to(images.device, non_blocking=True))
    return images


def augment_batch(
        images: Tensor, augmentation: AugmentationConfig, generator: Optional[torch.Generator] = None,
) -> Tensor:
    """Augment uint8 images [N, 3, H, W] as `create_train_transform` does. `why_not_batched` must be None."""
    num_images, _, height, width = images.shape
    device = images.device

    def draw_integers(high: int) -> Tensor:
        return torch.randint(high, (num_images,), generator=generator).to(device, non_blocking=True)

    def draw_flips(probability: float) -> Tensor:
        flips = torch.rand(num_images, generator=generator) < probability
        return flips.to(device, non_blocking=True)[:, None, None, None]

    if augmentation.no_aug:
        return images
    if augmentation.train_crop_mode == 'pad':
        padding = [height // 8, width // 8]
        images = crop(images, *(draw_integers(2 * side + 1) for side in padding), padding)
    if augmentation.hflip:
        images = torch.where(draw_flips(augmentation.hflip), images.flip(3), images)
    if augmentation.vflip:
        images = torch.where(draw_flips(augmentation.vflip), images.flip(2), images)
    if augmentation.aa:
        images = auto_augment(images, generator)
    if augmentation.cutout:
        images = cutout(images, draw_integers(height), draw_integers(width), augmentation.cutout)
    return images


def why_not_batched(augmentation: AugmentationConfig, device: torch.device) -> Optional[str]:
    """The first option of an augmentation that cannot run on batches on a device, or None if all options can."""
    if augmentation.no_aug:
        return None
    if augmentation.train_crop_mode != 'pad':
        return f"--train-crop-mode {augmentation.train_crop_mode or 'rrc'}"
    lacks_float64 = device.type == 'mps'
    if augmentation.aa and (augmentation.aa != 'cifar10' or lacks_float64):
        return f'--aa {augmentation.aa}'
    for name in ('grayscale_prob', 'gaussian_blur_prob'):
        if getattr(augmentation, name):
            return f"--{name.replace('_', '-')} {getattr(augmentation, name):g}"
    if augmentation.color_jitter and (augmentation.force_color_jitter or not augmentation.aa):
        return f'--color-jitter {augmentation.color_jitter:g}'
    return f'--reprob {augmentation.reprob:g}' if augmentation.reprob else None
