"""The network, its parts, and the names that timm knows it by."""
from . import registry as registry
from .shike import Shike as Shike
