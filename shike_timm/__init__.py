"""SHIKE for timm: importing this package registers its models with `timm.create_model`."""
from . import models as models
from .version import __version__ as __version__
