"""Loaders over image sets: timm's, or from the device's memory."""
from functools import partial
from typing import Any, Callable, Dict, Optional, Union

import timm.data
import torch
from timm.data.loader import PrefetchLoader, fast_collate
from torch.utils.data import DataLoader, IterableDataset

from ..distributed import rank, world_size
from ..errors import InputError
from .augment import AugmentationConfig
from .augment.batch import batch_gap
from .augment.transforms import create_train_transform
from .datasets import ImageSet
from .in_memory import DeviceLoader, device_data_gap
from .sharding import EpochSampler, SeededDataset
from .table import CheckedLoader, ImageTable, readable_collate

__all__ = ['create_eval_loader', 'create_train_loader', 'set_mixup', 'set_stream_epoch']


class _Mixup(timm.data.FastCollateMixup):
    """timm's mixing in collation, which can be switched off for workers that run already."""

    def __init__(self, **options: Any):
        self._enabled = torch.ones(1, dtype=torch.bool).share_memory_()
        super().__init__(**options)

    @property
    def mixup_enabled(self) -> bool:
        return bool(self._enabled)

    @mixup_enabled.setter
    def mixup_enabled(self, enabled: bool) -> None:
        self._enabled.fill_(enabled)


def set_mixup(loader: Any, enabled: bool) -> None:
    """Switch the mixing of images on or off, in a loader that `create_train_loader` made with `mixup`."""
    (loader.loader if isinstance(loader, CheckedLoader) else loader).mixup_enabled = enabled


def set_stream_epoch(loader: Any, epoch: int, seed: int) -> None:
    """Say which epoch of a stream comes and what workers draw from, in a loader that `create_train_loader` made."""
    loader.dataset.set_epoch(epoch)  # or each epoch would have the first one's order
    loader.loader.generator.manual_seed(seed)


def _create_device_loader(
        data: ImageSet,
        data_config: Dict[str, Any],
        batch_size: int,
        device: torch.device,
        gap: Optional[str],
        device_data: Optional[bool],
        augmentation: Optional[AugmentationConfig] = None,
        sampler: Optional[EpochSampler] = None,
) -> Optional[DeviceLoader]:
    """A loader over the data on the device, or None where that is not wanted or, unless asked for, not possible."""
    if device_data and gap:
        raise InputError(f'--device-data cannot be had with this data set: {gap}; leave it out.')
    if device_data is False or gap:
        return None
    assert data.images is not None and data.targets is not None  # or there were a gap
    return DeviceLoader(
        data.images, data.targets, data_config['mean'], data_config['std'], batch_size, device, augmentation, sampler)


def _refuse_shared_streams(data: ImageSet) -> None:
    if world_size() > 1 and isinstance(data.dataset, IterableDataset):
        raise InputError('A stream of images cannot be shared out among processes exactly: use files, or one process.')


def _create_worker_loader(
        data: ImageSet,
        data_config: Dict[str, Any],
        batch_size: int,
        device: torch.device,
        num_workers: int,
        transform: Callable,
        sampler: Union[None, EpochSampler, range],
        collate: Callable,
        **erasing: Any,
) -> Union[PrefetchLoader, CheckedLoader]:
    """timm's prefetching loader over what a sampler gives, in training with seeds; over a stream as it comes."""
    dataset, is_training = data.dataset, isinstance(sampler, EpochSampler)
    dataset.transform = transform
    is_stream = isinstance(dataset, IterableDataset)
    if is_stream:
        dataset.set_loader_cfg(num_workers=num_workers)
        sampler = None
    elif is_training:
        dataset = SeededDataset(dataset)
    loader = DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        drop_last=is_training,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=device.type == 'cuda',
        persistent_workers=num_workers > 0 and not is_stream,  # whose images draw from the past of their worker
        generator=torch.Generator(),  # else workers that start, but not those that stay, draw from torch's own
    )
    loader = PrefetchLoader(
        loader,
        mean=data_config['mean'],
        std=data_config['std'],
        channels=data_config['input_size'][0],
        device=device,
        **erasing,
    )
    return CheckedLoader(loader, data.dataset) if isinstance(data.dataset, ImageTable) else loader


def create_train_loader(
        data: ImageSet,
        data_config: Dict[str, Any],
        batch_size: int,
        device: torch.device,
        augmentation: AugmentationConfig,
        num_workers: int = 4,
        mixup: Optional[Dict[str, Any]] = None,
        device_data: Optional[bool] = None,
        accumulated: int = 1,
):
    """Loader over a training set, of which each process has its share; batches that not all of them have are dropped.

    Small data sets that are in memory lie on the device as one tensor and are augmented there; others go through
    timm's prefetching loader, whose workers stay. Either way an epoch's images depend on nothing but the seed that
    `loader.sampler.set_epoch` is given, or `set_stream_epoch`, or that torch's generator gives at its start, and the
    step that it begins at: from a later one on the same images come, but from the device with another augmentation.

    Args:
        data: Training set.
        data_config: What `timm.data.resolve_data_config` gives.
        batch_size: Images a batch of this process.
        device: Device of the batches.
        augmentation: What happens to each image.
        num_workers: Worker processes.
        mixup: Arguments of `timm.data.FastCollateMixup`, or None for class indices as targets.
        device_data: Whether the data lies on the device; where None, if data and augmentation allow it.
        accumulated: Batches of an update, of which an epoch has a whole number.

    Raises:
        InputError: If there are fewer images than an update takes, the augmentation is not known, or `device_data` is
            asked for where it cannot be had.
    """
    _refuse_shared_streams(data)
    sampler = EpochSampler(len(data.dataset), batch_size, accumulated)
    if not sampler.num_batches:
        times = f' times {world_size() * accumulated}' if world_size() * accumulated > 1 else ''
        raise InputError(
            f'batch-size {batch_size}{times} exceeds the {len(data.dataset)} training images: choose a smaller one.')
    option = '--mixup or --cutmix' if mixup else batch_gap(augmentation, device)
    gap = device_data_gap(data, data_config, is_training=True)
    gap = gap or option and f'{option} works on one image at a time'
    loader = _create_device_loader(data, data_config, batch_size, device, gap, device_data, augmentation, sampler)
    if loader is not None:
        return loader
    if isinstance(data.dataset, ImageTable):
        data.dataset.is_training = True
    mean, std = data_config['mean'], data_config['std']
    try:
        transform = create_train_transform(data_config['input_size'], augmentation, mean, std)
    except (AssertionError, KeyError, ValueError) as error:
        raise InputError(f"aa '{augmentation.aa}' is not a policy that timm knows.") from error
    return _create_worker_loader(
        data,
        data_config,
        batch_size,
        device,
        num_workers,
        transform,
        sampler,
        _Mixup(**mixup) if mixup else fast_collate,
        re_prob=0. if augmentation.no_aug else augmentation.reprob,
        re_mode=augmentation.remode,
        re_count=augmentation.recount,
    )


def create_eval_loader(
        data: ImageSet,
        data_config: Dict[str, Any],
        batch_size: int,
        device: torch.device,
        num_workers: int = 4,
        device_data: Optional[bool] = None,
):
    """Loader over an evaluation split, in order and whole: from the device or timm's, as in `create_train_loader`.

    Of several processes each has a share, and none an image of another's.

    Args:
        data: Evaluation split.
        data_config: What `timm.data.resolve_data_config` gives.
        batch_size: Images a batch.
        device: Device of the batches.
        num_workers: Worker processes.
        device_data: Whether the data lies on the device; where None, if its images need no resizing.
    """
    gap = device_data_gap(data, data_config, is_training=False)
    _refuse_shared_streams(data)
    loader = _create_device_loader(data, data_config, batch_size, device, gap, device_data)
    if loader is not None:
        return loader
    transform: Any = timm.data.create_transform(is_training=False, use_prefetcher=True, **data_config)
    stream = isinstance(data.dataset, IterableDataset)
    share = range(0) if stream else range(rank(), len(data.dataset), world_size())
    is_table = isinstance(data.dataset, ImageTable)
    collate = partial(readable_collate, data_config['input_size'][0]) if is_table else fast_collate
    return _create_worker_loader(
        data, data_config, batch_size, device, num_workers, transform, share, collate)
