"""The data sets, a module for each kind. Importing a module registers its data sets."""
from . import folder as folder
from . import huggingface as huggingface
from . import long_tailed as long_tailed
from . import published as published
from . import streams as streams
from . import torchvision as torchvision
