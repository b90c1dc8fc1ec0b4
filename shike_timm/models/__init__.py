"""The SHIKE network, its parts, and the models that are registered with timm."""
from . import registry as registry
from .shike import Shike as Shike
