"""Data sets by name, and loaders over them."""
from . import sources as sources  # This import registers the data sets.
from .augment import AugmentationConfig as AugmentationConfig
from .config import LoaderConfig as LoaderConfig
from .config import SourceConfig as SourceConfig
from .dataset import ImageSet as ImageSet
from .dataset import StreamSet as StreamSet
from .dataset import in_memory_set as in_memory_set
from .load import TrainingData as TrainingData
from .load import load_eval_data as load_eval_data
from .load import load_training_data as load_training_data
from .loaders import create_eval_loader as create_eval_loader
from .loaders import create_train_loader as create_train_loader
from .loaders import set_mixup as set_mixup
from .loaders import set_stream_epoch as set_stream_epoch
from .registry import DataSource as DataSource
from .registry import find_dataset as find_dataset
from .registry import register_dataset as register_dataset
