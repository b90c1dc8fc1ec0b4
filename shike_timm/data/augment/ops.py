"""Pillow's image operations on whole batches of RGB images, each image with a magnitude of its own, bit for bit.

Operations take and return uint8 images [N, 3, H, W] on any device. Magnitudes [N] have the same meaning as in
`torchvision.transforms.AutoAugment`. Geometric operations take the nearest pixel and fill with grey (128).
"""
import math
from typing import Any, Callable, Dict, Union

import torch
import torch.nn.functional as F
from torch import Tensor

FILL = 128


def _blend(degenerate: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    """Pillow's Image.blend: arithmetic in float32, clipped, then cut off to a whole number."""
    degenerate = degenerate.float()
    factor = factor.float().view(-1, 1, 1, 1)
    return (factor * (images.float() - degenerate)).add_(degenerate).clamp_(0, 255).to(torch.uint8)


def _grey(images: Tensor) -> Tensor:
    """Luma [N, 1, H, W] as whole numbers in int32, by Pillow's 16-bit fixed-point weights."""
    red, green, blue = images.int().unbind(1)
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16)[:, None]


def _lookup(images: Tensor, table: Tensor) -> Tensor:
    """Replace each pixel value by its entry in a table [N, 3, 256]."""
    return table.to(torch.uint8).gather(2, images.flatten(2).long()).view_as(images)


def posterize(images: Tensor, magnitude: Tensor) -> Tensor:
    """Keep the `magnitude` highest bits."""
    mask = torch.bitwise_left_shift(255, 8 - magnitude.int()) & 255
    return images & mask.to(torch.uint8).view(-1, 1, 1, 1)


def solarize(images: Tensor, magnitude: Tensor) -> Tensor:
    """Invert the pixels at or above the threshold `magnitude`."""
    return torch.where(images < magnitude.view(-1, 1, 1, 1), images, 255 - images)


def contrast(images: Tensor, magnitude: Tensor) -> Tensor:
    mean = _grey(images).double().mean((1, 2, 3), keepdim=True).add_(0.5).floor_()
    return _blend(mean, images, 1 + magnitude)


def sharpness(images: Tensor, magnitude: Tensor) -> Tensor:
    """Blend with a smoothed image: a 3x3 mean where the centre weighs 5, border pixels as they are."""
    wide = images.float()
    kernel = torch.ones(3, 1, 3, 3, device=images.device)
    kernel[:, :, 1, 1] = 5.
    smooth = wide.clone()
    # Sums of up to 13 pixels are exact in float32, and no quotient by 13 falls on a half.
    with torch.autocast(images.device.type, enabled=False):
        smooth[:, :, 1:-1, 1:-1] = F.conv2d(wide, kernel, groups=3).div_(13).add_(0.5).floor_()
    return _blend(smooth, images, 1 + magnitude)


def autocontrast(images: Tensor, magnitude: Tensor) -> Tensor:
    """Stretch each channel to 0..255."""
    low = images.amin((2, 3)).double()[..., None]
    high = images.amax((2, 3)).double()[..., None]
    scale = torch.full_like(high, 255).div_(high - low)  # `255 / tensor` would round twice.
    levels = torch.arange(256, device=images.device, dtype=torch.float64)
    table = (levels * scale - low * scale).trunc().clamp(0, 255)
    return _lookup(images, torch.where(high > low, table, levels))


def equalize(images: Tensor, magnitude: Tensor) -> Tensor:
    """Flatten the histogram of each channel."""
    flat = images.flatten(2).long()
    histogram = torch.zeros(*flat.shape[:2], 256, dtype=torch.int64, device=images.device)
    histogram.scatter_add_(2, flat, torch.ones_like(flat))
    num_pixels = flat.shape[-1]
    last = histogram.gather(2, flat.amax(2, keepdim=True))  # The number of pixels with the highest value.
    step = (num_pixels - last) // 255
    before = histogram.cumsum(2) - histogram
    table = ((step // 2 + before) // step.clamp(min=1)).clamp(max=255)
    return _lookup(images, torch.where(step > 0, table, torch.arange(256, device=images.device)))


Number = Union[float, Tensor]


def _affine(images: Tensor, a: Number, b: Number, c: Number, d: Number, e: Number, f: Number) -> Tensor:
    """Output pixel (x, y) takes input pixel (a x + b y + c, d x + e y + f), in Pillow's 16-bit fixed point."""
    height, width = images.shape[-2:]

    def fixed(value: Number) -> Number:
        if isinstance(value, float):
            return math.floor(value * 65536 + 0.5)
        return (value * 65536 + 0.5).floor().long().view(-1, 1, 1)

    x = torch.arange(width, device=images.device)
    y = torch.arange(height, device=images.device)[:, None]
    column: Any = (fixed(a) * x + fixed(b) * y + fixed(c + 0.5 * a + 0.5 * b)) >> 16
    row: Any = (fixed(d) * x + fixed(e) * y + fixed(f + 0.5 * d + 0.5 * e)) >> 16
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    index = (row * width + column).where(inside, 0).flatten(1)[:, None].expand(-1, images.shape[1], -1)
    taken = images.flatten(2).gather(2, index).view_as(images)
    return taken.where(inside[:, None], FILL)


def rotate(images: Tensor, magnitude: Tensor) -> Tensor:
    """Rotate about the centre by `magnitude` degrees against the clock."""
    angle = -magnitude.double() * (math.pi / 180)
    cos, sin = angle.cos(), angle.sin()
    x, y = images.shape[-1] / 2, images.shape[-2] / 2
    return _affine(images, cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y)


OPS: Dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    'AutoContrast': autocontrast,
    'Brightness': lambda images, magnitude: _blend(torch.zeros_like(images), images, 1 + magnitude),
    'Color': lambda images, magnitude: _blend(_grey(images), images, 1 + magnitude),
    'Contrast': contrast,
    'Equalize': equalize,
    'Invert': lambda images, magnitude: 255 - images,
    'Posterize': posterize,
    'Rotate': rotate,
    'Sharpness': sharpness,
    'ShearX': lambda images, magnitude: _affine(images, 1., magnitude.double(), 0., 0., 1., 0.),
    'ShearY': lambda images, magnitude: _affine(images, 1., 0., 0., magnitude.double(), 1., 0.),
    'Solarize': solarize,
    'TranslateX': lambda images, magnitude: _affine(images, 1., 0., -magnitude.trunc().double(), 0., 1., 0.),
    'TranslateY': lambda images, magnitude: _affine(images, 1., 0., 0., 0., 1., -magnitude.trunc().double()),
}
"""Operations by torchvision's names. Each takes images [N, 3, H, W] and magnitudes [N], and returns images."""
