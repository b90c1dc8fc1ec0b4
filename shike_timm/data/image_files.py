"""Image files without labels, which a user names. An unreadable file is reported, and the others are still read."""
import glob
import os
import sys
from collections import Counter
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import Compose

from ..devices import limit_workers
from ..errors import InputError
from .augment.transforms import create_eval_transform
from .decode import MODES, ImageDecoder, open_image
from .inspect import ImageReader
from .sources.folder import list_folder, list_images
from .workers import create_loader


def _images_below(folder: str) -> List[str]:
    """Images below a folder, sorted by name, followed by the unreadable folders. Hidden names are left out."""
    unread: List[str] = []
    listed = list_images(list_folder(folder, Counter(), unread))
    found = [os.path.join(place, name) for place, files in sorted(listed.items()) for name in sorted(files)]
    return [os.path.join(folder, name) for name in [*found, *sorted(unread)]]


def _find(name: str) -> List[str]:
    """Images of one name: a file, a folder or a pattern."""
    if os.path.isdir(name):
        found = _images_below(name)
        if not found:
            raise InputError(f"folder '{name}' holds no images: give another one.")
        return found
    if os.path.exists(name) or not glob.has_magic(name):
        return [name]
    found = sorted(glob.glob(name, recursive=True))
    if not found:
        raise InputError(f"pattern '{name}' matches no file: check the pattern, and put it in quotes.")
    return [path for match in found for path in (_images_below(match) if os.path.isdir(match) else [match])]


def find_images(names: Sequence[str]) -> List[str]:
    """Find image files. A name is a file, a folder, a pattern such as 'x/**/*.png', or '-' for standard input.

    A file that does not exist is in the result too.
    """
    paths: List[str] = []
    if '-' in names and sys.stdin is None:
        raise InputError('Standard input is closed: name files, folders or patterns instead of -.')
    for name in names:
        # File names are bytes, and need not be valid text.
        lines = (os.fsdecode(line).rstrip('\r\n') for line in sys.stdin.buffer) if name == '-' else [name]
        paths += [path for line in lines if line for path in _find(line)]
    if not paths:
        raise InputError('There are no images to predict: name files, folders or patterns.')
    return paths


def _collate(items: List[Tuple[Any, Optional[str]]]) -> Tuple[Optional[Tensor], List[Optional[str]]]:
    images = [image for image, _ in items if image is not None]
    return torch.from_numpy(np.stack(images)) if images else None, [error for _, error in items]


def normalize(images: Tensor, data_config: Dict[str, Any], device: torch.device) -> Tensor:
    """uint8 images [B, C, H, W] as a model takes them: in float32, on its device."""
    mean, std = (
        torch.tensor(data_config[key], device=device).expand(images.shape[1])[:, None, None] * 255
        for key in ('mean', 'std'))
    return images.to(device, torch.float32).sub_(mean).div_(std)


def create_file_loader(
        paths: List[str], data_config: Dict[str, Any], batch_size: int, num_workers: int = 4, pin_memory: bool = False,
        pixel_range: Optional[Tuple[float, float]] = None, exif: bool = False,
) -> Iterable[Tuple[Optional[Tensor], List[Optional[str]]]]:
    """Loader over image files in order.

    A batch has two parts. The first is the uint8 images [n, C, H, W] of the n readable files, or None if no file is
    readable. The second is a list with the fault of each file, or None for a readable file.
    """
    channels = data_config['input_size'][0]
    if channels not in MODES:
        raise InputError(f'The model takes images of {channels} channels, expected 1 or 3, which image files have.')
    transform: Any = create_eval_transform(data_config)
    reader = ImageReader(open_image, Compose([ImageDecoder(channels, pixel_range, exif), transform]), paths)
    return create_loader(reader, batch_size, limit_workers(num_workers), _collate, pin_memory=pin_memory)
