"""Loaders over sets of images: timm's, or from the memory of the device."""
from functools import partial
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple, Union

import timm.data
import torch
from timm.data.loader import PrefetchLoader, fast_collate
from torch import Tensor
from torch.utils.data import DataLoader

from ..devices import limit_workers
from ..distributed import rank, world_size
from ..errors import InputError
from .augment import AugmentationConfig
from .augment.batch import why_not_batched
from .augment.transforms import create_eval_transform, create_train_transform
from .config import LoaderConfig
from .dataset import AnySet, StreamSet
from .device_loader import DeviceLoader, why_not_on_device
from .sampler import EpochSampler, SeededDataset
from .workers import create_loader


class _Mixup(timm.data.FastCollateMixup):
    """timm's Mixup and CutMix at collation. Mixing can be switched off while workers run."""

    def __init__(self, **options: Any):
        self._enabled = torch.ones(1, dtype=torch.bool).share_memory_()
        super().__init__(**options)

    @property
    def mixup_enabled(self) -> bool:
        return bool(self._enabled)

    @mixup_enabled.setter
    def mixup_enabled(self, enabled: bool) -> None:
        self._enabled.fill_(enabled)


class WorkerLoader(PrefetchLoader):
    """timm's loader, which stops if too many images of its set turn out to be unreadable."""

    def __init__(self, data: AnySet, loader: DataLoader, collate: Callable, **options: Any):
        super().__init__(loader, **options)
        self.data = data
        self.collate = collate

    def __iter__(self) -> Iterator[Tuple[Tensor, Tensor]]:
        for batch in super().__iter__():
            self.data.check_readable()
            yield batch
        self.data.check_readable()


Loader = Union[DeviceLoader, WorkerLoader]


def set_mixup(loader: Any, enabled: bool) -> None:
    """Switch the mixing of images on or off, in a loader that `create_train_loader` made with it."""
    loader.collate.mixup_enabled = enabled


def set_stream_epoch(loader: Any, epoch: int, seed: int) -> None:
    """Set the epoch of a stream and the seed of its workers, in a loader that `create_train_loader` made."""
    loader.dataset.set_epoch(epoch)  # Otherwise each epoch would have the order of the first.
    loader.loader.generator.manual_seed(seed)


def _collate_readable(channels: int, batch: List[Optional[Tuple[Any, int]]]) -> Tuple[Tensor, Tensor]:
    """timm's collation of the readable images of a batch, which may be fewer than the batch size, or none."""
    readable = [item for item in batch if item is not None]
    if readable:
        return fast_collate(readable)
    return torch.zeros(0, channels, 1, 1, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64)


def _is_on_device(data: AnySet, device_data: Optional[bool], why_not: Optional[str]) -> bool:
    if data.is_stream and world_size() > 1:
        raise InputError('Several processes cannot share the images of a stream: use files, or one process.')
    if device_data and why_not:
        raise InputError(f'--device-data does not work with this data set: {why_not}; leave it out.')
    return device_data is not False and not why_not


def _create_worker_loader(
        data: AnySet, data_config: Dict[str, Any], batch_size: int, device: torch.device, num_workers: int,
        transform: Any, sampler: Union[EpochSampler, range], collate: Callable, drop_last: bool = False, **erasing: Any,
) -> WorkerLoader:
    """timm's loader over sampled images, or over a stream as it comes."""
    is_training = isinstance(sampler, EpochSampler)
    data.transform = transform
    options: Dict[str, Any] = dict(drop_last=drop_last, pin_memory=device.type == 'cuda')
    items, collate_items = data, collate
    if isinstance(data, StreamSet):
        # New workers start each epoch, since the images of a stream depend on what its workers did before.
        data.set_loader_cfg(num_workers=num_workers)
    else:
        data.replaces_unreadable |= is_training
        num_workers = limit_workers(num_workers)
        options.update(sampler=sampler, persistent_workers=num_workers > 0)
        if is_training:
            items = SeededDataset(data, collate)
            collate_items = items.collate
    loader = create_loader(items, batch_size, num_workers, collate_items, **options)
    return WorkerLoader(
        data, loader, collate, mean=data_config['mean'], std=data_config['std'], channels=data_config['input_size'][0],
        device=device, **erasing)


def mixup_options(
        config: LoaderConfig, augmentation: AugmentationConfig, num_classes: int, why_not: Optional[str] = None,
) -> Optional[Dict[str, Any]]:
    """Arguments of `timm.data.FastCollateMixup`, or None if both are off. `why_not` says why labels cannot be mixed."""
    if not (augmentation.mixup or augmentation.cutmix):
        return None
    flag = f'--mixup {augmentation.mixup:g}' if augmentation.mixup else f'--cutmix {augmentation.cutmix:g}'
    if why_not:
        raise InputError(f'{flag} mixes labels, but {why_not}.')
    if config.batch_size % 2:
        raise InputError(f'{flag} pairs images, but --batch-size {config.batch_size} is odd: choose an even one.')
    return dict(
        mixup_alpha=augmentation.mixup, cutmix_alpha=augmentation.cutmix, prob=augmentation.mixup_prob,
        switch_prob=augmentation.mixup_switch_prob, mode=augmentation.mixup_mode, label_smoothing=0.,
        num_classes=num_classes)


def create_train_loader(
        data: AnySet, data_config: Dict[str, Any], config: LoaderConfig, augmentation: AugmentationConfig,
        device: torch.device, num_workers: int = 4, num_classes: int = 0, why_not_mixed: Optional[str] = None,
        every_image: bool = False,
) -> Loader:
    """Make a loader over a training set. Each process has its share, and all have the same number of whole batches.

    Small sets in memory lie on the device as one tensor and are augmented there. Others go through timm's loader and
    its workers. The images of an epoch depend only on its first step and on the seed for `loader.sampler.set_epoch` or
    `set_stream_epoch`; the default seed is random. `why_not_mixed` says why labels must be class indices, if they must.
    `every_image` is for a single pass that drops no image and mixes none.
    """
    mixup = None if every_image else mixup_options(config, augmentation, num_classes, why_not_mixed)
    sampler = EpochSampler(len(data), config.batch_size, config.grad_accum_steps)
    if not sampler.num_batches:
        factor = world_size() * config.grad_accum_steps
        times = f' times {factor}' if factor > 1 else ''
        raise InputError(
            f'batch-size {config.batch_size}{times} exceeds the {len(data)} training images: choose a smaller one.')
    if every_image:
        sampler.take_all()
    mean, std = data_config['mean'], data_config['std']
    option = '--mixup or --cutmix' if mixup else why_not_batched(augmentation, device)
    why_not = why_not_on_device(data, data_config, is_training=True)
    why_not = why_not or option and f'{option} works on one image at a time'
    if _is_on_device(data, config.device_data, why_not):
        return DeviceLoader(
            data.images, data.targets, mean, std, config.batch_size, device, augmentation, sampler)
    try:
        transform = create_train_transform(data_config['input_size'], augmentation, mean, std)
    except (AssertionError, KeyError, ValueError) as error:
        raise InputError(f"aa '{augmentation.aa}' is not a policy that timm knows.") from error
    return _create_worker_loader(
        data, data_config, config.batch_size, device, num_workers, transform, sampler,
        _Mixup(**mixup) if mixup else fast_collate, drop_last=not every_image,
        re_prob=0. if augmentation.no_aug else augmentation.reprob, re_mode=augmentation.remode,
        re_count=augmentation.recount)


def create_eval_loader(
        data: AnySet, data_config: Dict[str, Any], batch_size: int, device: torch.device, num_workers: int = 4,
        device_data: Optional[bool] = None,
) -> Loader:
    """Make a loader over an evaluation split in order. It yields the share of this process."""
    if _is_on_device(data, device_data, why_not_on_device(data, data_config, is_training=False)):
        return DeviceLoader(
            data.images, data.targets, data_config['mean'], data_config['std'], batch_size, device)
    transform = create_eval_transform(data_config)
    share = range(0) if data.is_stream else range(rank(), len(data), world_size())
    collate = partial(_collate_readable, data_config['input_size'][0])
    return _create_worker_loader(data, data_config, batch_size, device, num_workers, transform, share, collate)
