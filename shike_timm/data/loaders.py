"""Loaders over image sets: timm's, or from the device's memory."""
from typing import Any, Dict, Optional

import timm.data
import torch

from ..errors import InputError
from .augment import Augmentation
from .augment.batch import batch_gap
from .augment.transforms import create_train_transform
from .datasets import ImageSet
from .in_memory import DeviceLoader, device_data_gap
from .table import CheckedLoader, ImageTable, readable_collate

__all__ = ['create_eval_loader', 'create_train_loader']


def _create_device_loader(
        data: ImageSet,
        data_config: Dict[str, Any],
        batch_size: int,
        device: torch.device,
        gap: Optional[str],
        device_data: Optional[bool],
        augmentation: Optional[Augmentation] = None,
) -> Optional[DeviceLoader]:
    """A loader over the data on the device, or None where that is not wanted or, unless asked for, not possible."""
    if device_data and gap:
        raise InputError(f'--device-data cannot be had with this data set: {gap}; leave it out.')
    if device_data is False or gap:
        return None
    return DeviceLoader(
        data.images, data.targets, data_config['mean'], data_config['std'], batch_size, device, augmentation)


def create_train_loader(
        data: ImageSet,
        data_config: Dict[str, Any],
        batch_size: int,
        device: torch.device,
        augmentation: Augmentation,
        num_workers: int = 4,
        mixup: Optional[Dict[str, Any]] = None,
        device_data: Optional[bool] = None,
):
    """Loader over a training set; incomplete last batches are dropped.

    Small data sets that are in memory lie on the device as one tensor and are augmented there; others go through
    timm's prefetching loader, whose workers start anew each epoch. Either way an epoch's augmentation depends on
    nothing but the seed at its start.

    Args:
        data: Training set.
        data_config: What `timm.data.resolve_data_config` gives.
        batch_size: Images a batch.
        device: Device of the batches.
        augmentation: What happens to each image.
        num_workers: Worker processes.
        mixup: Arguments of `timm.data.FastCollateMixup`, or None for class indices as targets.
        device_data: Whether the data lies on the device; where None, if data and augmentation allow it.

    Raises:
        InputError: If there are fewer images than a batch holds, the augmentation is not known, or `device_data` is
            asked for where it cannot be had.
    """
    if batch_size > len(data.dataset):
        raise InputError(
            f'batch-size {batch_size} exceeds the {len(data.dataset)} training images: choose a smaller one.')
    option = '--mixup or --cutmix' if mixup else batch_gap(augmentation)
    gap = device_data_gap(data, data_config, is_training=True)
    gap = gap or option and f'{option} works on one image at a time'
    loader = _create_device_loader(data, data_config, batch_size, device, gap, device_data, augmentation)
    if loader is not None:
        return loader
    if isinstance(data.dataset, ImageTable):
        data.dataset.is_training = True
    mean, std = data_config['mean'], data_config['std']
    loader = timm.data.create_loader(
        data.dataset,
        input_size=data_config['input_size'],
        batch_size=batch_size,
        is_training=True,
        mean=mean,
        std=std,
        no_aug=augmentation.no_aug,
        re_prob=augmentation.re_prob,
        re_mode=augmentation.re_mode,
        re_count=augmentation.re_count,
        num_workers=num_workers,
        collate_fn=timm.data.FastCollateMixup(**mixup) if mixup else None,
        pin_memory=device.type == 'cuda',
        device=device,
        persistent_workers=False,
    )
    try:
        data.dataset.transform = create_train_transform(data_config['input_size'], augmentation, mean, std)
    except (AssertionError, KeyError, ValueError) as error:
        raise InputError(f"aa '{augmentation.auto_augment}' is not a policy that timm knows.") from error
    return CheckedLoader(loader, data.dataset) if isinstance(data.dataset, ImageTable) else loader


def create_eval_loader(
        data: ImageSet,
        data_config: Dict[str, Any],
        batch_size: int,
        device: torch.device,
        num_workers: int = 4,
        device_data: Optional[bool] = None,
):
    """Loader over an evaluation split, in order and whole: from the device or timm's, as in `create_train_loader`.

    Args:
        data: Evaluation split.
        data_config: What `timm.data.resolve_data_config` gives.
        batch_size: Images a batch.
        device: Device of the batches.
        num_workers: Worker processes.
        device_data: Whether the data lies on the device; where None, if its images need no resizing.
    """
    gap = device_data_gap(data, data_config, is_training=False)
    loader = _create_device_loader(data, data_config, batch_size, device, gap, device_data)
    if loader is not None:
        return loader
    is_table = isinstance(data.dataset, ImageTable)
    loader = timm.data.create_loader(
        data.dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=readable_collate(data_config['input_size'][0]) if is_table else None,
        pin_memory=device.type == 'cuda',
        device=device,
        persistent_workers=False,
        **data_config,
    )
    return CheckedLoader(loader, data.dataset) if is_table else loader
