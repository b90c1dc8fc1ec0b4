"""From image files of any kind to PIL images of the channels a model takes."""
from dataclasses import dataclass
from functools import lru_cache
from typing import FrozenSet, Optional, Tuple

import numpy as np
from PIL import Image, ImageOps

__all__ = ['ImageDecoder', 'image_extensions']

HIGHEST = {'F': 1., 'I': 2 ** 31 - 1}  # the other deep modes are of 16 bits
NO_IMAGES = ('BUFR', 'GRIB', 'HDF5', 'MPEG')  # formats that Pillow can name, not decode
MODES = {1: 'L', 3: 'RGB'}


@lru_cache(maxsize=1)
def image_extensions() -> FrozenSet[str]:
    """Extensions, in lower case and with their dot, of what Pillow decodes."""
    known = Image.registered_extensions()
    return frozenset(
        extension for extension, kind in known.items() if kind in Image.OPEN and kind not in NO_IMAGES)


@dataclass(frozen=True)
class ImageDecoder:
    """Decodes images to one mode.

    Images of 16 or 32 bits, or of floating point, are scaled by the range of their type, the same for every image,
    where Pillow would clip them: 0 to 65535, 0 to 2^31 - 1, and 0 to 1.

    Attributes:
        channels: Channels of the images, 1 or 3.
        pixel_range: Values of deep images that become black and white, in place of the range of their type.
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
        """The image, decoded; whatever Pillow raises for a damaged one comes through."""
        if self.exif:
            ImageOps.exif_transpose(image, in_place=True)  # a copy would not know its format
        if self.is_deep(image):
            image = self._scaled(image)
        if image.mode in ('P', 'RGBa', 'La'):  # whose transparency Pillow warns of, or has multiplied in
            image = image.convert('LA' if image.mode == 'La' else 'RGBA')
        elif image.mode == 'LAB':
            raise OSError('LAB colours are not read')
        return image.convert(MODES[self.channels])  # which loads the image in any case

    def _scaled(self, image: Image.Image) -> Image.Image:
        # Pillow reads 16-bit portable grey maps, and in older releases 16-bit PNG, as 32-bit images.
        is_short = image.mode not in HIGHEST or image.mode == 'I' and image.format in ('PNG', 'PPM')
        low, high = self.pixel_range or (0, 65535 if is_short else HIGHEST[image.mode])
        values = (np.asarray(image, dtype=np.float64) - low) * (255 / (high - low))
        return Image.fromarray(np.nan_to_num(values).round().clip(0, 255).astype(np.uint8))
