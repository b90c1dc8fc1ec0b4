"""Data sets by name, their class counts, and loaders."""
import os
from dataclasses import dataclass
from typing import Any, Dict, List, Optional

import numpy as np
import timm.data
import torch
from torch.utils.data import Dataset, IterableDataset

from ..errors import InputError, one_line
from .augment.transforms import create_train_transform
from .in_memory import DeviceLoader, batch_augment_gap, create_batch_augment, device_data_gap, in_memory_images
from .long_tail import create_long_tailed, hold_out, is_long_tailed

# What `timm.data.create_dataset` reads beside folders and archives.
TIMM_PREFIXES = ('torch', 'hfds', 'hfids', 'tfds', 'wds')

__all__ = ['TrainingData', 'create_eval_dataset', 'create_eval_loader', 'create_train_loader', 'load_training_data']


@dataclass
class TrainingData:
    """A training set, the set it is evaluated on, and what the training set says of the classes.

    Attributes:
        train: Training set, None where there is only noise to measure on.
        test: Evaluation split, None likewise.
        class_counts: Training images of each class, all positive.
        class_names: Names of the classes in label order.
    """

    train: Optional[Dataset]
    test: Optional[Dataset]
    class_counts: List[int]
    class_names: List[str]

    @property
    def num_classes(self) -> int:
        return len(self.class_counts)


def _create_dataset(
        name: str,
        root: Optional[str],
        split: str,
        train: bool,
        imb_factor: float,
        imb_type: str,
        download: bool,
        class_map: Optional[Dict[str, int]] = None,
) -> Dataset:
    if is_long_tailed(name):
        return create_long_tailed(
            name, root, train, imb_factor=imb_factor, imb_type=imb_type, download=download)
    prefix = name.split('/')[0].lower() if '/' in name else ''
    if name and prefix not in TIMM_PREFIXES:
        raise InputError(
            f"dataset '{name}' is unknown: choose cifar10_lt, cifar100_lt, digits_lt, a name of timm's such as "
            "torch/cifar100, or none for a folder of images.")
    if prefix in ('', 'torch'):
        if not root:
            raise InputError(f"No folder of data was named for dataset '{name}': give it as --data-dir.")
        if not prefix and not os.path.exists(root):
            raise InputError(f"data-dir '{root}' does not exist: give a folder with a sub-folder of images per class.")
    try:
        dataset = timm.data.create_dataset(
            name, root=root, split=split, is_training=train, download=download, class_map=class_map)
    except (RuntimeError, ValueError, OSError, AssertionError, ImportError) as error:
        if 'Found 0 images' in str(error):
            raise InputError(f"data-dir '{root}' holds no images for the {split} split: add some.") from error
        raise InputError(f"The {split} split of '{name or root}' cannot be read: {one_line(error)}.") from error
    if not prefix and os.path.isdir(root) and dataset.reader.root == root:
        raise InputError(f"data-dir '{root}' has no {split} split: expected a folder '{os.path.join(root, split)}'.")
    if isinstance(dataset, IterableDataset):
        raise InputError(f"dataset '{name}' is streamed, so its classes cannot be counted: use a folder of images.")
    return dataset


def _targets(dataset: Dataset) -> np.ndarray:
    reader = getattr(dataset, 'reader', None)
    if hasattr(dataset, 'targets'):
        targets = dataset.targets
    elif hasattr(reader, 'iter_targets'):
        targets = list(reader.iter_targets())
    elif hasattr(reader, 'samples'):
        targets = [target for _, target in reader.samples]
    else:
        raise InputError(f'{type(dataset).__name__} does not list its labels: use a folder of images.')
    return np.asarray(targets, dtype=np.int64)


def _class_map(dataset: Dataset) -> Optional[Dict[str, int]]:
    reader = getattr(dataset, 'reader', None)
    return getattr(reader, 'class_to_idx', None) or getattr(dataset, 'class_to_idx', None)


def _empty_class_folders(dataset: Dataset, class_map: Optional[Dict[str, int]]) -> List[str]:
    root = getattr(getattr(dataset, 'reader', None), 'root', None)
    if root is None or not os.path.isdir(root):
        return []
    leaves = [os.path.basename(folder) for folder, subfolders, _ in os.walk(root) if not subfolders and folder != root]
    return [name for name in leaves if name not in (class_map or ()) and not name.startswith('.')]


def load_training_data(
        name: str,
        root: Optional[str] = None,
        train_split: str = 'train',
        val_split: str = 'validation',
        imb_factor: float = 100.,
        imb_type: str = 'exp',
        download: bool = False,
        holdout: float = 0.,
) -> TrainingData:
    """Load a training set and its evaluation split.

    Args:
        name: 'cifar10_lt', 'cifar100_lt', 'digits_lt', any name `timm.data.create_dataset` reads, or '' for a folder.
        root: Folder of the data.
        train_split: Split to train on, for timm's data sets.
        val_split: Split to evaluate on, for timm's data sets.
        imb_factor: Imbalance factor, for the long-tailed data sets.
        imb_type: 'exp' or 'step', for the long-tailed data sets.
        download: Download what is missing, where the data set can.
        holdout: Share of each class's training images to evaluate on instead, for the long-tailed data sets.

    Raises:
        InputError: If data is missing or damaged, or a class has no training image.
    """
    options = dict(name=name, root=root, imb_factor=imb_factor, imb_type=imb_type, download=download)
    train = _create_dataset(split=train_split, train=True, **options)
    held_out = None
    if holdout:
        if not is_long_tailed(name):
            raise InputError(f"holdout {holdout:g} needs one of the *_lt data sets, not '{name or root}': drop it.")
        train, held_out = hold_out(train, holdout)
    class_map = _class_map(train)
    targets = _targets(train)
    if len(targets) and targets.min() < 0:
        raise InputError(f"The {train_split} split of '{name or root}' has images without a label.")
    num_classes = max(len(class_map or ()), int(targets.max()) + 1)
    names = sorted(class_map, key=class_map.get) if class_map else getattr(train, 'classes', range(num_classes))
    names = [str(n) for n in names]
    counts = np.bincount(targets, minlength=num_classes)

    test = held_out or _create_dataset(split=val_split, train=False, **options)
    missing = sorted(set(_class_map(test) or ()) - set(class_map or ()))
    missing += _empty_class_folders(train, class_map) + [names[c] for c in np.flatnonzero(counts == 0)]
    if missing:
        raise InputError(f"Class '{missing[0]}' has no training image: add some, or remove the class.")
    if class_map and _class_map(test) != class_map:
        test = _create_dataset(split=val_split, train=False, class_map=class_map, **options)
        if _class_map(test) != class_map:
            raise InputError(f"The classes of the {val_split} split of '{name or root}' are not those of training.")
    return TrainingData(train, test, counts.tolist(), names)


def create_eval_dataset(
        name: str,
        root: Optional[str] = None,
        split: str = 'validation',
        download: bool = False,
        class_names: Optional[List[str]] = None,
) -> Dataset:
    """Load an evaluation split alone.

    Args:
        name: As for `load_training_data`.
        root: Folder of the data.
        split: Split to evaluate on, for timm's data sets.
        download: Download what is missing, where the data set can.
        class_names: The model's classes in label order; folders are matched to them by name.

    Raises:
        InputError: If data is missing or damaged, or a folder is not among the model's classes.
    """
    options = dict(root=root, split=split, train=False, imb_factor=1., imb_type='exp', download=download)
    dataset = _create_dataset(name, **options)
    class_map = getattr(getattr(dataset, 'reader', None), 'class_to_idx', None)
    if class_map and class_names:
        unknown = sorted(set(class_map) - set(class_names))
        if unknown:
            raise InputError(
                f"Class '{unknown[0]}' of '{name or root}' is not among the {len(class_names)} of the model.")
        dataset = _create_dataset(name, class_map={n: c for c, n in enumerate(class_names)}, **options)
    return dataset


def _create_device_loader(
        dataset: Dataset,
        data_config: Dict[str, Any],
        batch_size: int,
        device: torch.device,
        gap: Optional[str],
        device_data: Optional[bool],
        augment=None,
) -> Optional[DeviceLoader]:
    """A loader over the data on the device, or None where that is not wanted or, unless asked for, not possible."""
    if device_data and gap:
        raise InputError(f'--device-data cannot be had with this data set: {gap}; leave it out.')
    if device_data is False or gap:
        return None
    return DeviceLoader(
        in_memory_images(dataset),
        dataset.targets,
        data_config['mean'],
        data_config['std'],
        batch_size,
        device,
        augment,
    )


def create_train_loader(
        dataset: Dataset,
        data_config: Dict[str, Any],
        batch_size: int,
        device: torch.device,
        num_workers: int = 4,
        mixup: Optional[Dict[str, Any]] = None,
        re_prob: float = 0.,
        re_mode: str = 'const',
        re_count: int = 1,
        device_data: Optional[bool] = None,
        **augmentation: Any,
):
    """Loader over a training set; incomplete last batches are dropped.

    Small data sets that are in memory lie on the device as one tensor and are augmented there; others go through
    timm's prefetching loader, whose workers start anew each epoch. Either way an epoch's augmentation depends on
    nothing but the seed at its start.

    Args:
        dataset: Training set that gives PIL images.
        data_config: What `timm.data.resolve_data_config` gives.
        batch_size: Images a batch.
        device: Device of the batches.
        num_workers: Worker processes.
        mixup: Arguments of `timm.data.FastCollateMixup`, or None for class indices as targets.
        re_prob: Random erasing probability.
        re_mode: Random erasing fill: 'const', 'rand' or 'pixel'.
        re_count: Random erasing regions.
        device_data: Whether the data lies on the device; where None, if data and augmentation allow it.
        **augmentation: Arguments of `create_train_transform`.

    Raises:
        InputError: If there are fewer images than a batch holds, the augmentation is not known, or `device_data` is
            asked for where it cannot be had.
    """
    if len(dataset) < batch_size:
        raise InputError(f'batch-size {batch_size} exceeds the {len(dataset)} training images: choose a smaller one.')
    gap = device_data_gap(dataset, data_config, is_training=True)
    option = batch_augment_gap(mixup=mixup, re_prob=re_prob, **augmentation)
    gap = gap or option and f'{option} works on one image at a time'
    loader = _create_device_loader(
        dataset, data_config, batch_size, device, gap, device_data, create_batch_augment(**augmentation))
    if loader is not None:
        return loader
    loader = timm.data.create_loader(
        dataset,
        input_size=data_config['input_size'],
        batch_size=batch_size,
        is_training=True,
        mean=data_config['mean'],
        std=data_config['std'],
        re_prob=0. if augmentation.get('no_aug') else re_prob,
        re_mode=re_mode,
        re_count=re_count,
        num_workers=num_workers,
        collate_fn=timm.data.FastCollateMixup(**mixup) if mixup else None,
        pin_memory=device.type == 'cuda',
        device=device,
        persistent_workers=False,
    )
    try:
        dataset.transform = create_train_transform(
            data_config['input_size'], mean=data_config['mean'], std=data_config['std'], **augmentation)
    except (AssertionError, KeyError, ValueError) as error:
        raise InputError(f"aa '{augmentation.get('auto_augment')}' is not a policy that timm knows.") from error
    return loader


def create_eval_loader(
        dataset: Dataset,
        data_config: Dict[str, Any],
        batch_size: int,
        device: torch.device,
        num_workers: int = 4,
        device_data: Optional[bool] = None,
):
    """Loader over an evaluation split, in order and whole: from the device or timm's, as in `create_train_loader`.

    Args:
        dataset: Evaluation split that gives PIL images.
        data_config: What `timm.data.resolve_data_config` gives.
        batch_size: Images a batch.
        device: Device of the batches.
        num_workers: Worker processes.
        device_data: Whether the data lies on the device; where None, if its images need no resizing.
    """
    gap = device_data_gap(dataset, data_config, is_training=False)
    loader = _create_device_loader(dataset, data_config, batch_size, device, gap, device_data)
    if loader is not None:
        return loader
    return timm.data.create_loader(
        dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        pin_memory=device.type == 'cuda',
        device=device,
        persistent_workers=False,
        **data_config,
    )
