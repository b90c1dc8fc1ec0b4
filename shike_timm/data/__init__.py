"""Data sets by name, and loaders over them. A module that registers data sets is imported here."""
from . import long_tail as long_tail
from . import timm_sets as timm_sets
from .augment import Augmentation as Augmentation
from .datasets import ImageSet as ImageSet
from .datasets import TrainingData as TrainingData
from .datasets import create_eval_dataset as create_eval_dataset
from .datasets import find_dataset as find_dataset
from .datasets import load_training_data as load_training_data
from .loaders import create_eval_loader as create_eval_loader
from .loaders import create_train_loader as create_train_loader
