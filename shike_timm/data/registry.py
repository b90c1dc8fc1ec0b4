"""The registry of data sets: the names that `--dataset` takes."""
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Callable, ClassVar, Dict, Optional, Sequence, Type

from ..errors import InputError
from .config import SourceConfig
from .dataset import AnySet


@dataclass(eq=False)
class DataSource(ABC):
    """A data set. Its methods load a split each. A subclass implements `train` and `evaluation`."""

    config: SourceConfig
    batch_size: int = 1  # For streams.
    seed: int = 42  # Seed of the order, for streams.

    has_imb_factor = False  # Whether `--imb-factor` cuts a long tail. If so, `--holdout` takes the last images.
    eval_split: ClassVar[Optional[str]] = None  # Name of its evaluation split. None if `--val-split` names it.
    num_classes: ClassVar[Optional[int]] = None  # Only of a published set, which may take other lists.
    has_uncertain_splits = False  # Whether a missing split shows only when the data is read.
    is_undivided = False  # Whether the data has no splits. Then all images may be evaluated.

    @abstractmethod
    def train(self, class_names: Optional[Sequence[str]] = None) -> AnySet:
        """The training set. `class_names` are those of a model, if they are known."""

    @abstractmethod
    def evaluation(self, class_names: Optional[Sequence[str]] = None) -> Optional[AnySet]:
        """The evaluation split, or None if the data set has no such split."""


DATASETS: Dict[str, Type[DataSource]] = {}


def register_dataset(*names: str) -> Callable[[Type[Any]], Type[Any]]:
    """Register a subclass of `DataSource` by name. A name that ends with a slash stands for all names that begin so.

    Raises a ValueError if a name is already registered.
    """
    def register(source: Type[Any]) -> Type[Any]:
        for name in names:
            if name in DATASETS:
                raise ValueError(f"There is a data set '{name}' already.")
            DATASETS[name] = source
        return source

    return register


def find_dataset(name: str) -> Type[DataSource]:
    """Find the data set of a name, else that of the part up to its first slash, in upper or lower case."""
    source = DATASETS.get(name) or DATASETS.get(name[:name.find('/') + 1].lower() or name)
    if source is None:
        known = ', '.join(f'{key}...' if key.endswith('/') else key for key in DATASETS if key)
        raise InputError(f"dataset '{name}' is unknown: choose one of {known}, or none for a folder of images.")
    return source
