"""Hugging Face's data sets in tables, `hfds/NAME`."""
from typing import Any, Sequence

from PIL import Image

from ...errors import InputError
from ..dataset import ImageSet, ImageSource, label_images
from ..decode import open_image
from ..registry import register_dataset
from .timm_source import TimmSource


class _TableImages(ImageSource):
    """Images in memory-mapped Arrow tables. `reader` is timm's."""

    def __init__(self, reader: Any, paths: Sequence[str]):
        super().__init__(reader.dataset._fingerprint, paths)
        self.reader = reader

    def open(self, row: int) -> Image.Image:
        image = self.reader.dataset[row][self.reader.image_key]
        return open_image(image['path'] or '', image['bytes'] or None)


@register_dataset('hfds/')
class HuggingFaceSource(TimmSource):
    """A data set of Hugging Face, or Parquet files in a folder."""

    def load(self, split: str, is_training: bool) -> ImageSet:
        config = self.config
        reader = self.create(
            split, is_training, input_key=config.input_key, target_key=config.target_key).reader
        table, image_key, label_key = reader.dataset, reader.image_key, reader.label_key
        columns = table.column_names
        for key, option in ((image_key, '--input-key'), (label_key, '--target-key')):
            if key not in columns:
                raise InputError(
                    f"'{config.dataset}' has no column '{key}' among {', '.join(columns)}: name it as {option}.")
        values = table[label_key][:]
        order = getattr(table.features[label_key], 'names', None)
        if any(value is None or order and value < 0 for value in values):
            raise InputError(f"'{config.dataset}' has images without a label in its column '{label_key}'.")
        labels = [order[value] if order else str(value) for value in values]
        # Paths are read chunk by chunk. The whole column would read all images, and Arrow joins at most 2 GiB.
        chunks = table.data[image_key].chunks
        paths = [path for chunk in chunks for path in chunk.field('path').to_pylist()]
        paths = [f'{path}' if path else f'{i}' for i, path in enumerate(paths)]
        if len(set(paths)) < len(paths):
            paths = [f'{i}/{path}' for i, path in enumerate(paths)]
        groups = [str(value) for value in table[config.group_key][:]] if config.group_key in columns else None
        return label_images(config, _TableImages(reader, paths), labels, groups=groups, order=order)
