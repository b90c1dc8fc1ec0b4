"""The common part of the data sets of `timm.data.create_dataset`."""
import re
from abc import abstractmethod
from typing import Any, Optional, Sequence

import timm.data

from ...errors import InputError, one_line
from ..dataset import AnySet
from ..registry import DataSource
from .folder import EVAL_SPLITS


class TimmSource(DataSource):
    """A data set that timm opens by a name with a prefix. A subclass implements `load`."""

    has_uncertain_splits = True

    def create(self, split: str, is_training: bool, **options: Any) -> Any:
        """timm's data set of a split."""
        config = self.config
        root = '' if config.dataset.lower().startswith('wds/') and not config.data_dir else config.data_dir
        try:
            return timm.data.create_dataset(
                config.dataset, root=root, split=split, is_training=is_training, download=config.dataset_download,
                **options)
        except Exception as error:  # Each library raises its own errors.
            raise InputError(
                f"The {split} split of '{config.dataset or root}' cannot be read: {one_line(error)}.") from error

    @abstractmethod
    def load(self, split: str, is_training: bool) -> AnySet:
        """The images of a split."""

    def _load(self, split: str, is_training: bool) -> AnySet:
        data = self.load(split, is_training)
        data.origin = f"the {split} split of '{self.config.dataset}'"
        return data

    def train(self, class_names: Optional[Sequence[str]] = None) -> AnySet:
        return self._load(self.config.train_split, is_training=True)

    def evaluation(self, class_names: Optional[Sequence[str]] = None) -> Optional[AnySet]:
        try:
            return self._load(self.config.val_split, is_training=False)
        except InputError as error:
            known = re.search(r'Unknown split .* Should be one of \[(.*)\]', str(error))
            if known is None or self.config.val_split != EVAL_SPLITS[0]:
                raise
            split = next((name for name in EVAL_SPLITS if f"'{name}'" in known.group(1)), None)
            return self._load(split, is_training=False) if split else None
