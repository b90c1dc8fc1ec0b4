from .datasets import TrainingData as TrainingData
from .datasets import create_eval_dataset as create_eval_dataset
from .datasets import create_eval_loader as create_eval_loader
from .datasets import create_train_loader as create_train_loader
from .datasets import load_training_data as load_training_data
