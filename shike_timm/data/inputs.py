"""Images without labels: the files that somebody names, read so that a bad one is told and stops nothing."""
import glob
import os
import sys
from collections import Counter
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Tuple

import numpy as np
import timm.data
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import InputError, one_line
from .folders import list_folder
from .images import MODES, ImageDecoder, image_extensions

__all__ = ['create_file_loader', 'find_images']

def _walk(folder: str) -> Iterator[str]:
    """Images below a folder, in the order of their names; hidden names are passed over."""
    for place, files in sorted(list_folder(folder, Counter()).items()):
        for name in sorted(files):
            if os.path.splitext(name)[1].lower() in image_extensions():
                yield os.path.join(folder, place, name)


def _named(name: str) -> List[str]:
    if os.path.isdir(name):
        found = list(_walk(name))
        if not found:
            raise InputError(f"folder '{name}' holds no images: give one that does.")
        return found
    if os.path.exists(name) or not glob.has_magic(name):
        return [name]
    found = sorted(glob.glob(name, recursive=True))
    if not found:
        raise InputError(f"pattern '{name}' fits no file: see that it is right, and quoted.")
    return [path for match in found for path in (_walk(match) if os.path.isdir(match) else [match])]


def find_images(names: Iterable[str]) -> List[str]:
    """Image files by name.

    Args:
        names: Files, folders, which are searched for whatever Pillow reads, patterns such as 'x/**/*.png', or '-' for
            lines of any of these on standard input. A file that does not exist is among what is found.

    Raises:
        InputError: If a folder or a pattern holds no image, or nothing is named.
    """
    paths: List[str] = []
    for name in names:
        # Names are bytes to the system, and need not be of the terminal's encoding.
        lines = (os.fsdecode(line).rstrip('\r\n') for line in sys.stdin.buffer) if name == '-' else [name]
        paths += [path for line in lines if line for path in _named(line)]
    if not paths:
        raise InputError('There are no images to predict: name files, folders or patterns.')
    return paths


class _ImageFiles(Dataset):
    """Gives images as uint8 arrays [C, H, W], or what is wrong with their file."""

    def __init__(self, paths: List[str], decoder: ImageDecoder, transform: Callable[[Image.Image], np.ndarray]):
        self.paths = paths
        self.decoder = decoder
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tuple[Optional[np.ndarray], Optional[str]]:
        try:
            with Image.open(self.paths[index]) as image:
                return self.transform(self.decoder(image)), None
        except Exception as error:  # a decoder may raise anything for a damaged file
            return None, one_line(error)


def _collate(items: List[Tuple[Optional[np.ndarray], Optional[str]]]) -> Tuple[Optional[Tensor], List[Optional[str]]]:
    images = [image for image, _ in items if image is not None]
    return torch.from_numpy(np.stack(images)) if images else None, [error for _, error in items]


def create_file_loader(
        paths: List[str],
        data_config: Dict[str, Any],
        batch_size: int,
        num_workers: int = 4,
        pin_memory: bool = False,
        pixel_range: Optional[Tuple[float, float]] = None,
        exif: bool = False,
) -> Iterable[Tuple[Optional[Tensor], List[Optional[str]]]]:
    """Loader over files, in order.

    Args:
        paths: The files.
        data_config: What `timm.data.resolve_data_config` gives.
        batch_size: Files a batch.
        num_workers: Worker processes.
        pin_memory: Give tensors in pinned memory.
        pixel_range: As for `ImageDecoder`.
        exif: As for `ImageDecoder`.

    Returns:
        An iterable of batches: uint8 images [n, C, H, W] of the n files that could be read, None for none of them,
        and for each file of the batch what is wrong with it, None where nothing is.

    Raises:
        InputError: If the images are to have neither one nor three channels.
    """
    channels = data_config['input_size'][0]
    if channels not in MODES:
        raise InputError(f'The model takes images of {channels} channels, expected 1 or 3: no files have such.')
    transform: Any = timm.data.create_transform(**data_config, is_training=False, use_prefetcher=True)
    dataset = _ImageFiles(paths, ImageDecoder(channels, pixel_range, exif), transform)
    return DataLoader(
        dataset, batch_size, num_workers=num_workers, collate_fn=_collate, pin_memory=pin_memory)
