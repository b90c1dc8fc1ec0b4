"""SHIKE for timm: importing this package registers its models with `timm.create_model`."""
from . import models as models

__version__ = '0.1.0'
