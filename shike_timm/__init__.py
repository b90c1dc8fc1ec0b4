"""SHIKE for timm: importing this package registers its models with `timm.create_model`."""
from typing import Any, Union

import timm

from . import models as models
from .models.backbones import Source
from .version import __version__ as __version__


def shike(backbone: str, pretrained_backbone: Union[None, Source] = None, **kwargs: Any) -> models.Shike:
    """A SHIKE model on any convolutional network of timm.

    Args:
        backbone: Name of timm's network, such as 'regnety_016'.
        pretrained_backbone: Weights of it to start from, as `Shike.load_backbone` takes them; None for none.
        **kwargs: Arguments of `timm.create_model` and of `shike_timm.models.Shike`.

    Raises:
        ValueError: If the network cannot be split, or there are no such weights; the message says why.
        RuntimeError: If timm knows no such tag, or a weight has another shape.
    """
    model = timm.create_model('shike', backbone=backbone, **kwargs)
    if pretrained_backbone:
        model.load_backbone(pretrained_backbone, kwargs.get('cache_dir'))
    return model
