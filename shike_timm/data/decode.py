"""Decoding: from image files of any kind to PIL images with the channels that a model takes."""
import os
from dataclasses import dataclass
from functools import lru_cache
from typing import FrozenSet, Optional, Tuple

import numpy as np
from PIL import Image, ImageOps

from ..errors import InputError
from .config import PreprocessingConfig

HIGHEST = {'F': 1., 'I': 2 ** 31 - 1}  # The other deep modes have 16 bits.
NO_IMAGES = ('BUFR', 'GRIB', 'HDF5', 'MPEG')  # Pillow knows these formats but cannot decode them.
MODES = {1: 'L', 3: 'RGB'}


@lru_cache(maxsize=1)
def image_extensions() -> FrozenSet[str]:
    """Extensions of the files that Pillow decodes, in lower case and with their dot."""
    known = Image.registered_extensions()
    return frozenset(
        extension for extension, kind in known.items() if kind in Image.OPEN and kind not in NO_IMAGES)


def open_image(path: str) -> Image.Image:
    """An image file, not decoded yet. A pipe or a device is refused, since its reader may wait for ever."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError('it is no file')
    return Image.open(path)


@dataclass(frozen=True)
class ImageDecoder:
    """Decodes images to one mode.

    Deep images (16 or 32 bits, or floating point) are scaled by the range of their type: 0 to 65535, 0 to 2^31 - 1,
    and 0 to 1. Pillow alone would clip them.

    Attributes:
        pixel_range: Values of deep images that become black and white, instead of the range of their type.
        exif: Turn images as their EXIF orientation says.
    """

    channels: int = 3
    pixel_range: Optional[Tuple[float, float]] = None
    exif: bool = False

    @staticmethod
    def is_deep(image: Image.Image) -> bool:
        """Whether an image has more than 8 bits a channel."""
        return image.mode == 'F' or image.mode.startswith('I')

    def __call__(self, image: Image.Image) -> Image.Image:
        """Decode an image. A damaged image raises whatever Pillow raises."""
        if self.exif:
            ImageOps.exif_transpose(image, in_place=True)  # A copy would lose the format of the image.
        if self.is_deep(image):
            image = self._scaled(image)
        # Pillow warns about the transparency of the first, and has multiplied it into the others.
        if image.mode in ('P', 'RGBa', 'La'):
            image = image.convert('LA' if image.mode == 'La' else 'RGBA')
        elif image.mode == 'LAB':
            raise OSError('LAB colours are not read')
        return image.convert(MODES[self.channels])  # `convert` also loads an image that has the mode already.

    def _scaled(self, image: Image.Image) -> Image.Image:
        # Pillow reads 16-bit portable grey maps as 32-bit images. Older releases do so with 16-bit PNG too.
        is_short = image.mode not in HIGHEST or image.mode == 'I' and image.format in ('PNG', 'PPM')
        low, high = self.pixel_range or (0, 65535 if is_short else HIGHEST[image.mode])
        values = (np.asarray(image, dtype=np.float64) - low) * (255 / (high - low))
        return Image.fromarray(np.nan_to_num(values).round().clip(0, 255).astype(np.uint8))


def create_decoder(config: PreprocessingConfig) -> ImageDecoder:
    """The decoder that a configuration describes."""
    channels = config.channels
    if channels not in MODES:
        raise InputError(f'Images of {channels} channels are not read: choose 1 or 3 with --in-chans.')
    low, high = config.pixel_range or (0., 1.)
    if not low < high:
        raise InputError(f'--pixel-range {low:g} {high:g} is empty: give the lower value first.')
    return ImageDecoder(channels, (low, high) if config.pixel_range else None, bool(config.exif))
