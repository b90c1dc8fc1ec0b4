"""The registry of data sets: the names that `--dataset` takes."""
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Callable, ClassVar, Dict, Optional, Sequence, Type

from ..errors import InputError
from .config import SourceConfig
from .dataset import AnySet


@dataclass(eq=False)
class DataSource(ABC):
    """A data set. Its methods load a split each. A subclass gives `train` and `evaluation`."""

    config: SourceConfig
    batch_size: int = 1  # For streams.
    seed: int = 42  # Seed of the order, for streams.

    has_imb_factor = False  # Whether `--imb-factor` cuts it to a long tail. `--holdout` then takes the last images.
    eval_split: ClassVar[Optional[str]] = None  # Name of its evaluation split. None if `--val-split` names it.
    num_classes: ClassVar[Optional[int]] = None  # That of a published set, for which other lists may be given.
    has_uncertain_splits = False  # Whether a missing split shows only when the data is read.
    is_undivided = False  # Whether there are no splits, so that all images may be evaluated on.

    @abstractmethod
    def train(self, class_names: Optional[Sequence[str]] = None) -> AnySet:
        """The training set. `class_names` are those of a model, if they are known."""

    @abstractmethod
    def evaluation(self, class_names: Optional[Sequence[str]] = None) -> Optional[AnySet]:
        """The evaluation split, None if there is none."""


DATASETS: Dict[str, Type[DataSource]] = {}


def register_dataset(*names: str) -> Callable[[Type[Any]], Type[Any]]:
    """Register a subclass of `DataSource` by name. A name that ends with a slash stands for all names that begin so.

    A name that is taken is a ValueError.
    """
    def register(source: Type[Any]) -> Type[Any]:
        for name in names:
            if name in DATASETS:
                raise ValueError(f"There is a data set '{name}' already.")
            DATASETS[name] = source
        return source

    return register


def find_dataset(name: str) -> Type[DataSource]:
    """The data set of a name, or of its part up to the first slash in any case."""
    source = DATASETS.get(name) or DATASETS.get(name[:name.find('/') + 1].lower() or name)
    if source is None:
        known = ', '.join(f'{key}...' if key.endswith('/') else key for key in DATASETS if key)
        raise InputError(f"dataset '{name}' is unknown: choose one of {known}, or none for a folder of images.")
    return source
