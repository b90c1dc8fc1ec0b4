"""WebDataset shards, and streams: `wds/NAME`, `hfids/NAME` and `tfds/NAME`."""
import json
import os
from typing import Any, Dict, List, Optional, Tuple

import numpy as np
from timm.data import IterableImageDataset

from ...errors import InputError, one_line
from ..class_names import read_class_map, read_class_stats
from ..config import SourceConfig
from ..dataset import AnySet, ImageSet, StreamSet, label_images
from ..decode import create_decoder, image_extensions
from ..registry import register_dataset
from .tar import TarImages, tar_members
from .timm_source import TimmSource


def _read_label(file: Any, place: Tuple[int, int], target_key: Optional[str], key: str) -> str:
    file.seek(place[0])
    try:
        content = file.read(place[1]).decode()
        return str(json.loads(content)[target_key]) if target_key else content.strip()
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"The label of '{key}' in '{file.name}' cannot be read: {one_line(error)}.") from error


def _shard_set(config: SourceConfig, root: str, shards: List[str]) -> ImageSet:
    """The images of WebDataset shards that are files here. They can be read in any order."""
    kinds = set(config.input_key.split(';')) if config.input_key else {one[1:] for one in image_extensions()}
    paths: List[str] = []
    labels: List[str] = []
    notes: List[str] = []
    places: List[Tuple[int, int, int]] = []
    for number, shard in enumerate(shards):
        samples: Dict[str, Dict[str, Tuple[int, int]]] = {}
        for name, start, length in tar_members(shard, notes):
            folder, slash, file = name.rpartition('/')
            stem, _, suffix = file.partition('.')
            if length >= 0 and stem:
                samples.setdefault(folder + slash + stem, {})[suffix.lower()] = start, length
        with open(shard, 'rb') as file:
            for key, parts in samples.items():
                suffix = next((part for part in parts if part in kinds), None)
                place = parts.get('json' if config.target_key else 'cls')
                if suffix is None:
                    continue
                if place is None:
                    raise InputError(
                        f"'{key}' in '{shard}' has no label: expected a member '{key}.cls', or one of JSON whose field "
                        '--target-key names.')
                labels.append(_read_label(file, place, config.target_key, key))
                paths.append(f'{key}.{suffix}')
                places.append((number, *parts[suffix]))
    if not paths:
        raise InputError(f"The shards '{shards[0]}', ... hold no images: name their extension with --input-key.")
    order = None
    if config.class_stats and not config.class_map:
        order = read_class_stats(config.class_stats)[1]
        name_of = {str(c): name for c, name in enumerate(order or ())}
        labels = [name_of.get(label, label) for label in labels]
    if len(set(paths)) < len(paths):
        paths = [f'{os.path.basename(shards[place[0]])}/{path}' for path, place in zip(paths, places)]
    source = TarImages(root, paths, np.array(places, dtype=np.int64), shards)
    return label_images(config, source, labels, notes, order=order)


@register_dataset('wds/', 'hfids/', 'tfds/')
class StreamSource(TimmSource):
    """A data set that timm reads as a stream."""

    def load(self, split: str, is_training: bool) -> AnySet:
        config, is_wds = self.config, self.config.dataset.lower().startswith('wds/')
        if is_wds:
            # This opens the stream without its number of images.
            reader: Any = self._create(split, is_training=False).reader
            info = getattr(reader, 'split_info', None)
            shards = [os.path.join(reader.root, name) for name in info.filenames] if info else []
            if shards and all(shard.endswith('.tar') and os.path.isfile(shard) for shard in shards):
                return _shard_set(config, reader.root, shards)
        reader = self._create(split, is_training).reader
        class_map = getattr(reader, 'class_to_idx', None)
        names = [str(name) for name in sorted(class_map, key=class_map.get)] if class_map else None
        return StreamSet(
            reader, create_decoder(config), read_class_map(config.class_map)[0] if config.class_map else names)

    def _create(self, split: str, is_training: bool) -> IterableImageDataset:
        config, options = self.config, {}
        if config.dataset.lower().startswith('hfids/'):  # A class map names the labels of other streams.
            options.update(class_map=config.class_map)
        return self.create(
            split, is_training, input_key=config.input_key, target_key=config.target_key, batch_size=self.batch_size,
            seed=self.seed, input_img_mode='',  # The decoder chooses the mode.
            num_samples=config.train_num_samples if is_training else config.val_num_samples, **options)
