"""Data sets by name, and loaders over them. A module that registers data sets is imported here."""
from . import folders as folders
from . import long_tail as long_tail
from . import published as published
from . import timm_sets as timm_sets
from .augment import AugmentationConfig as AugmentationConfig
from .datasets import DataRequest as DataRequest
from .datasets import ImageSet as ImageSet
from .datasets import find_dataset as find_dataset
from .loaders import create_eval_loader as create_eval_loader
from .loaders import create_train_loader as create_train_loader
from .loaders import set_mixup as set_mixup
from .loaders import set_stream_epoch as set_stream_epoch
from .training import TrainingData as TrainingData
from .training import create_eval_dataset as create_eval_dataset
from .training import load_training_data as load_training_data
