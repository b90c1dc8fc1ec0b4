from .factory import TrainingData as TrainingData
from .factory import create_eval_dataset as create_eval_dataset
from .factory import create_eval_loader as create_eval_loader
from .factory import create_train_loader as create_train_loader
from .factory import load_training_data as load_training_data
