"""A backbone as SHIKE sees it: a stem, the shared stages, and for every expert the last stage or stages."""
from dataclasses import dataclass
from typing import Callable, Dict, List, Optional, Sequence

from torch import nn

__all__ = ['Backbone', 'BackboneFn']


@dataclass
class Backbone:
    """A convolutional network cut into stages.

    Attributes:
        stem: Everything before the first shared stage.
        stages: The shared stages in order.
        last_stages: What experts have for themselves: the last stage, or the last few as one, once per expert.
        feature_info: Channels `num_chs` and `reduction` (input resolution over the activation's) of the stem, if that
            is one of the network's feature levels, of each shared stage and of the last stage.
        first_conv: The convolutions that see the images.
        initialised: Whether the parameters have the values to start from, or any will do.
        name: Name of the timm model whose pretrained weights fit, None where there is none.
    """

    stem: nn.Module
    stages: List[nn.Module]
    last_stages: Sequence[nn.Module]
    feature_info: List[Dict[str, int]]
    first_conv: List[nn.Module]
    initialised: bool
    name: Optional[str] = None


BackboneFn = Callable[..., Backbone]
