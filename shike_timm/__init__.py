"""SHIKE for timm: importing this package registers its models with `timm.create_model`."""
from typing import Any

import timm

from . import models as models
from .version import __version__ as __version__


def shike(backbone: str, **kwargs: Any) -> models.Shike:
    """A SHIKE model on any convolutional network of timm, short for `timm.create_model('shike', backbone=...)`.

    Args:
        backbone: Name of timm's network, such as 'regnety_016'.
        **kwargs: Arguments of `timm.create_model` and of `shike_timm.models.Shike`.

    Raises:
        ValueError: If the network cannot be split; the message says why.
    """
    return timm.create_model('shike', backbone=backbone, **kwargs)
