"""What `timm.data.create_dataset` reads by names with one of its prefixes; folders and archives apart."""
import io
import json
import os
import re
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import timm.data
from PIL import Image
from timm.data import IterableImageDataset
from torchvision.datasets import QMNIST

from ..errors import InputError, one_line
from .datasets import (
    DataRequest,
    DatasetEntry,
    ImageSet,
    in_memory_set,
    map_labels,
    read_class_stats,
    register_dataset,
    table_set,
)
from .files import ArchiveFiles, Names, archive_members
from .folders import EVAL_SPLITS
from .images import ImageDecoder, image_extensions

PREFIXES = ('torch/', 'hfds/', 'hfids/', 'tfds/', 'wds/')
STREAMS = PREFIXES[2:]
IN_MEMORY = ('torch/cifar10', 'torch/cifar100')  # as uint8 arrays [N, H, W, 3]


class _Decoded:
    """A stream's reader whose images are decoded like all others."""

    def __init__(self, reader: Any, decoder: ImageDecoder):
        self.reader = reader
        self.decoder = decoder

    def __getattr__(self, name: str) -> Any:
        if name == 'reader':  # while it is being unpickled
            raise AttributeError(name)
        return getattr(self.reader, name)

    def __len__(self) -> int:
        return len(self.reader)

    def __iter__(self) -> Iterator[Tuple[Image.Image, Any]]:
        for image, target in self.reader:
            yield self.decoder(image), target


class _HubFiles:
    """Images of a Hugging Face data set in memory-mapped Arrow tables.

    Args:
        reader: timm's reader of it.
        rows: Rows in the order of the images.
        names: Their names.
    """

    def __init__(self, reader: Any, rows: np.ndarray, names: Sequence[str]):
        self.reader = reader
        self.rows = rows
        self.names = Names(names)
        self.root = f'{reader.dataset._fingerprint}'

    def open(self, row: int) -> Image.Image:
        """The image of a row, not decoded yet."""
        image = self.reader.dataset[int(self.rows[row])][self.reader.image_key]
        return Image.open(io.BytesIO(image['bytes']) if image['bytes'] else image['path'])

    def stamp(self, row: int) -> str:
        """What changes when the data set does."""
        return f'{self.root}|{self.rows[row]}'


class _TorchFiles:
    """Images of one of torchvision's data sets."""

    def __init__(self, dataset: Any, rows: np.ndarray, names: Sequence[str]):
        self.dataset = dataset
        self.rows = rows
        self.names = Names(names)
        self.root = str(getattr(dataset, 'root', ''))

    def open(self, row: int) -> Image.Image:
        """The image of a row."""
        return self.dataset[int(self.rows[row])][0]

    def stamp(self, row: int) -> str:
        """The place of a row, of files that do not change."""
        return f'{type(self.dataset).__name__}|{len(self.dataset)}|{self.rows[row]}'


def _create(request: DataRequest, split: str, train: bool) -> Any:
    name, prefix = request.name, request.name.partition('/')[0].lower()
    root = '' if prefix == 'wds' and not request.root else request.root  # shards may be named by whole addresses
    if prefix == 'torch' and not root:
        raise InputError(f"No folder of data was named for dataset '{name}': give it as --data-dir.")
    options: Dict[str, Any] = {}
    if prefix != 'torch':
        options = dict(input_key=request.input_key, target_key=request.target_key)
    if f'{prefix}/' in STREAMS:
        options.update(
            batch_size=request.batch_size, seed=request.seed, input_img_mode='',  # which ours decides
            num_samples=request.train_num_samples if train else request.val_num_samples)
    if prefix == 'hfids':  # the labels of other streams are numbers, which a class map names
        options.update(class_map=request.class_map)
    try:
        return timm.data.create_dataset(
            name, root=root, split=split, is_training=train, download=request.download, **options)
    except Exception as error:  # each library has its own
        raise InputError(f"The {split} split of '{name or root}' cannot be read: {one_line(error)}.") from error


def _labels(request: DataRequest, dataset: Any) -> Tuple[List[str], Optional[List[str]]]:
    """Class name of each image of a Hugging Face data set, and all names in label order where it lists them."""
    reader = dataset.reader
    values = reader.dataset[reader.label_key][:]
    names = getattr(reader.dataset.features[reader.label_key], 'names', None)
    if any(value is None or names and value < 0 for value in values):
        raise InputError(f"'{request.name}' has images without a label in its column '{reader.label_key}'.")
    return [names[value] if names else str(value) for value in values], names


def _hub_set(request: DataRequest, split: str, train: bool) -> ImageSet:
    dataset = _create(request, split, train)
    reader = dataset.reader
    columns = reader.dataset.column_names
    for key, option in ((reader.image_key, '--input-key'), (reader.label_key, '--target-key')):
        if key not in columns:
            raise InputError(f"'{request.name}' has no column '{key}' among {', '.join(columns)}: name it as {option}.")
    labels, order = _labels(request, dataset)
    # Chunk by chunk: all of them as one would read every image, and 2 GiB of bytes are more than Arrow joins.
    chunks = reader.dataset.data[reader.image_key].chunks
    paths = [path for chunk in chunks for path in chunk.field('path').to_pylist()]
    names = [f'{path}' if path else f'{i}' for i, path in enumerate(paths)]
    if len(set(names)) < len(names):
        names = [f'{i}/{name}' for i, name in enumerate(names)]
    groups = None
    if request.group_key in columns:
        groups = [str(value) for value in reader.dataset[request.group_key][:]]
    row_of = {name: row for row, name in enumerate(names)}
    return table_set(
        request, names, labels, [],
        lambda names: _HubFiles(reader, np.array([row_of[name] for name in names]), names), groups, order)


def _torch_set(request: DataRequest, split: str, train: bool) -> ImageSet:
    dataset = _create(request, split, train)
    if request.name.lower() in IN_MEMORY:
        return in_memory_set(dataset.data, dataset.targets, dataset.classes)
    targets = getattr(dataset, 'targets', None)
    if targets is None:
        samples = getattr(dataset, 'samples', None)
        targets = [target for _, target in samples] if samples else [
            target for target, _ in getattr(dataset, 'index', ())]  # of iNaturalist
    classes = getattr(dataset, 'classes', None) or getattr(dataset, 'all_categories', None)
    targets = np.asarray(targets)
    if isinstance(dataset, QMNIST):
        targets = targets[:, 0]  # the others are of the scan
    if not len(targets) or targets.ndim > 1 or targets.min() < 0:
        raise InputError(f"The {split} split of '{request.name}' has images without a label.")
    order = [str(name if isinstance(name, str) else name[0]) for name in classes] if classes else None
    if order and len(set(order)) < len(order):  # ImageNet has two cranes
        order = getattr(dataset, 'wnids', None)
    labels = [order[target] if order else str(target) for target in targets]
    return table_set(
        request, [f'{i:08d}' for i in range(len(labels))], labels, [],
        lambda names: _TorchFiles(dataset, np.array([int(name) for name in names]), names), order=order)


def _shard_set(request: DataRequest, reader: Any) -> Optional[ImageSet]:
    """The images of WebDataset shards that are all files here, which are read in any order; None for others."""
    info = getattr(reader, 'split_info', None)
    shards = [os.path.join(reader.root, name) for name in info.filenames] if info else []
    if not shards or not all(shard.endswith('.tar') and os.path.isfile(shard) for shard in shards):
        return None
    kinds = set((request.input_key or '').split(';')) if request.input_key else {
        extension[1:] for extension in image_extensions()}
    names: List[str] = []
    labels: List[str] = []
    places: List[Tuple[int, int, int]] = []
    for number, shard in enumerate(shards):
        samples: Dict[str, Dict[str, Tuple[int, int]]] = {}
        for name, start, length in archive_members(shard):
            folder, slash, file = name.rpartition('/')
            stem, _, suffix = file.partition('.')
            if length >= 0 and stem:
                samples.setdefault(folder + slash + stem, {})[suffix.lower()] = start, length
        with open(shard, 'rb') as file:
            for key, parts in samples.items():
                suffix = next((part for part in parts if part in kinds), None)
                place = parts.get('json' if request.target_key else 'cls')
                if suffix is None:
                    continue
                if place is None:
                    raise InputError(
                        f"'{key}' in '{shard}' has no label: expected a member '{key}.cls', or one of JSON whose field "
                        '--target-key names.')
                file.seek(place[0])
                try:
                    content = file.read(place[1]).decode()
                    label = json.loads(content)[request.target_key] if request.target_key else content.strip()
                except (ValueError, KeyError, TypeError) as error:
                    raise InputError(f"The label of '{key}' in '{shard}' cannot be read: {one_line(error)}.") from error
                labels.append(str(label))
                names.append(f'{key}.{suffix}')
                places.append((number, *parts[suffix]))
    if not names:
        raise InputError(f"The shards '{shards[0]}', ... hold no images: name their extension with --input-key.")
    order = None
    if request.class_stats and not request.class_map:
        order = read_class_stats(request.class_stats)[1]
        number_of = {str(c): name for c, name in enumerate(order or ())}
        labels = [number_of.get(label, label) for label in labels]
    if len(set(names)) < len(names):
        names = [f'{os.path.basename(shards[place[0]])}/{name}' for name, place in zip(names, places)]
    place_of = dict(zip(names, places))
    return table_set(
        request, names, labels, [],
        lambda names: ArchiveFiles(
            reader.root, names, np.array([place_of[name] for name in names], dtype=np.int64).reshape(-1, 3), shards),
        order=order)


def _stream_set(request: DataRequest, split: str, train: bool) -> ImageSet:
    if request.name.lower().startswith('wds/'):
        data = _shard_set(request, _create(request, split, train=False).reader)  # which needs no number of images
        if data is not None:
            return data
    dataset = _create(request, split, train)
    if isinstance(dataset, IterableImageDataset):
        dataset.reader = _Decoded(dataset.reader, request.decoder())
    class_map = getattr(dataset.reader, 'class_to_idx', None)
    names = [str(name) for name in sorted(class_map, key=class_map.get)] if class_map else None
    return ImageSet(dataset, map_labels(request.class_map, [])[0] if request.class_map else names)


def _load(request: DataRequest, split: str, train: bool) -> ImageSet:
    prefix = request.name.partition('/')[0].lower() + '/'
    make = {'torch/': _torch_set, 'hfds/': _hub_set}.get(prefix, _stream_set)
    data = make(request, split, train)
    data.source = f"the {split} split of '{request.name}'"
    return data


def _load_train(request: DataRequest) -> Tuple[ImageSet, None]:
    return _load(request, request.train_split, train=True), None


def _load_eval(request: DataRequest) -> Optional[ImageSet]:
    try:
        return _load(request, request.val_split, train=False)
    except InputError as error:
        known = re.search(r'Unknown split .* Should be one of \[(.*)\]', str(error))
        if known is None or request.val_split != EVAL_SPLITS[0]:
            raise
        split = next((name for name in EVAL_SPLITS if f"'{name}'" in known.group(1)), None)
        return _load(request, split, train=False) if split else None


for _name in PREFIXES:
    register_dataset(DatasetEntry(_name, _load_train, _load_eval))
