"""Decoding of image files of any kind to PIL images with the channels that a model takes."""
import io
import os
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import FrozenSet, Optional, Tuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..errors import InputError
from .config import PreprocessingConfig

with suppress(ImportError):
    from pillow_heif import register_heif_opener  # pyright: ignore[reportMissingImports]
    register_heif_opener()

HIGHEST = {'F': 1., 'I': 2 ** 31 - 1}  # Highest value by mode. Other deep modes have 16 bits.
NO_IMAGES = ('BUFR', 'GRIB', 'HDF5', 'MPEG')  # Pillow knows these formats but cannot decode them.
HEIF = ('.heic', '.heics', '.heif', '.heifs', '.hif')  # Photographs of phones, which Pillow reads with pillow-heif.
MODES = {1: 'L', 3: 'RGB'}
TURNS = dict(zip(range(2, 9), (  # By the number of an orientation in EXIF.
    Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90)))


@lru_cache(maxsize=1)
def image_extensions() -> FrozenSet[str]:
    """Extensions of images, in lower case and with their dot: those that Pillow decodes, and `HEIF`."""
    known = Image.registered_extensions()
    # Pillow opens MPO as JPEG.
    return frozenset(HEIF).union(
        extension for extension, kind in known.items()
        if (kind in Image.OPEN or kind == 'MPO') and kind not in NO_IMAGES)


def open_image(path: str, content: Optional[bytes] = None) -> Image.Image:
    """Open an image file, or its content, without decoding. Pipes and devices are refused, since they may block."""
    if content is None and os.path.exists(path) and not os.path.isfile(path):
        raise OSError('it is no file')
    try:
        return Image.open(path if content is None else io.BytesIO(content))
    except UnidentifiedImageError as error:
        if path.lower().endswith(HEIF) and 'HEIF' not in Image.OPEN:
            raise OSError('HEIC is read once pillow-heif is installed: pip install pillow-heif') from error
        raise


def find_turn(image: Image.Image) -> Optional[Image.Transpose]:
    """The transposition that turns an image upright, from its EXIF data. None if it is upright or EXIF is damaged."""
    try:
        return TURNS.get(image.getexif().get(0x0112, 1))
    except Exception:  # Damaged EXIF data can make Pillow raise any error, and is no fault of the pixels.
        return None


@dataclass(frozen=True)
class ImageDecoder:
    """Decodes images to one mode.

    Deep images (16 or 32 bits, or floating point) are scaled by the range of their type: 0 to 65535, 0 to 2^31 - 1,
    and 0 to 1. Pillow's own conversion would clip them.
    """

    channels: int = 3
    pixel_range: Optional[Tuple[float, float]] = None  # Replaces the range of the type.
    exif: bool = False  # Turn images as their EXIF orientation says.

    @staticmethod
    def is_deep(image: Image.Image) -> bool:
        """Whether an image has more than 8 bits a channel."""
        return image.mode == 'F' or image.mode.startswith('I')

    def __call__(self, image: Image.Image) -> Image.Image:
        """Decode an image. A damaged image raises whatever Pillow raises."""
        turn = find_turn(image) if self.exif else None
        if self.is_deep(image):
            image = self._scaled(image)
        # Pillow would warn about transparency in P images. RGBa and La images are premultiplied by alpha.
        if image.mode in ('P', 'RGBa', 'La'):
            image = image.convert('LA' if image.mode == 'La' else 'RGBA')
        elif image.mode == 'LAB':
            raise OSError('LAB colours are not read')
        image = image.convert(MODES[self.channels])  # This also loads an image that has the mode already.
        return image if turn is None else image.transpose(turn)

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
