"""What `timm.data.create_dataset` reads: folders of images, tar files, and names with one of its prefixes."""
import os
from typing import Any, List, Optional, Sequence, Tuple

import numpy as np
import timm.data

from ..errors import InputError, one_line
from .datasets import DataRequest, DatasetEntry, ImageSet, in_memory_set, register_dataset

PREFIXES = ('torch/', 'hfds/', 'hfids/', 'tfds/', 'wds/')
IN_MEMORY = ('torch/cifar10', 'torch/cifar100')  # as uint8 arrays [N, H, W, 3]


def _create(request: DataRequest, split: str, train: bool) -> Any:
    name, root = request.name, request.root
    prefix = name.partition('/')[0].lower()
    if prefix in ('', 'torch'):
        if not root:
            raise InputError(f"No folder of data was named for dataset '{name}': give it as --data-dir.")
        if not prefix and not os.path.exists(root):
            raise InputError(f"data-dir '{root}' does not exist: give a folder with a sub-folder of images per class.")
    try:
        dataset = timm.data.create_dataset(
            name, root=root, split=split, is_training=train, download=request.download)
    except (RuntimeError, ValueError, OSError, AssertionError, ImportError) as error:
        if 'Found 0 images' in str(error):
            raise InputError(f"data-dir '{root}' holds no images for the {split} split: add some.") from error
        raise InputError(f"The {split} split of '{name or root}' cannot be read: {one_line(error)}.") from error
    # An archive is one split, so it can be evaluated on alone.
    if not prefix and dataset.reader.root == root and (train or os.path.isdir(root or '')):
        expected = os.path.join(root or '', split)
        raise InputError(f"data-dir '{root}' has no {split} split: expected a folder '{expected}'.")
    return dataset


def _class_names(dataset: Any) -> Optional[List[str]]:
    reader = getattr(dataset, 'reader', None)
    # The latter is a tar's.
    class_map = getattr(reader, 'class_to_idx', None) or getattr(reader, 'class_name_to_idx', None)
    names = sorted(class_map, key=class_map.get) if class_map else getattr(dataset, 'classes', None)
    return [str(name) for name in names] if names else None


def _targets(dataset: Any) -> Optional[np.ndarray]:
    """Class indices in order, None where they are not listed, as in a stream."""
    reader = getattr(dataset, 'reader', dataset)
    if hasattr(reader, 'targets'):
        targets = reader.targets
    elif hasattr(reader, 'iter_targets'):
        targets = list(reader.iter_targets())
    elif hasattr(reader, 'samples'):
        targets = [target for _, target in reader.samples]
    else:
        return None
    return np.asarray(targets, dtype=np.int64)


def _load(request: DataRequest, split: str, train: bool) -> ImageSet:
    dataset = _create(request, split, train)
    names = _class_names(dataset)
    if request.name.lower() in IN_MEMORY:
        return in_memory_set(dataset.data, dataset.targets, names or [])
    return ImageSet(dataset, names)


def _empty_folders(root: str, samples: Sequence[Tuple[str, int]]) -> List[str]:
    """Names of the folders at the leaves that hold no image; those that hold one are not listed again."""
    full = {os.path.dirname(path) for path, _ in samples}
    empty = []
    for folder, subfolders, _ in os.walk(root, followlinks=True):
        if not subfolders and folder != root:
            empty.append(os.path.basename(folder))
        subfolders[:] = [name for name in subfolders if os.path.join(folder, name) not in full]
    return [name for name in empty if not name.startswith('.')]


def _load_train(request: DataRequest) -> Tuple[ImageSet, None]:
    data = _load(request, request.train_split, train=True)
    targets = None if data.class_counts else _targets(data.dataset)
    if targets is None:
        return data, None
    if len(targets) and targets.min() < 0:
        raise InputError(
            f"The {request.train_split} split of '{request.name or request.root}' has images without a label.")
    data.class_counts = np.bincount(targets, minlength=len(data.class_names or ())).tolist()
    if not request.name:
        reader = data.dataset.reader
        empty = [name for name in _empty_folders(reader.root, reader.samples) if name not in data.class_names]
        data.class_names += empty
        data.class_counts += [0] * len(empty)
    return data, None


def _load_eval(request: DataRequest) -> ImageSet:
    data = _load(request, request.val_split, train=False)
    names = request.class_names
    if not names or not data.class_names or data.class_names == names:
        return data
    label = {name: c for c, name in enumerate(names)}
    unknown = [name for name in data.class_names if name not in label]
    if unknown:
        raise InputError(
            f"Class '{unknown[0]}' of the {request.val_split} split of '{request.name or request.root}' is not among "
            f'the {len(names)} of training: remove it, or add training images of it.')
    labels = [label[name] for name in data.class_names]
    if data.images is not None and data.targets is not None:
        return in_memory_set(data.images, np.take(labels, data.targets), names)
    data.dataset.target_transform = labels.__getitem__
    data.class_names = names
    return data


for _name in ('', *PREFIXES):
    register_dataset(DatasetEntry(_name, _load_train, _load_eval))
