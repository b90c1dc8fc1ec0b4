"""A backbone as SHIKE sees it."""
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
        last_stages: The private stages of each expert, as one module.
        feature_info: `num_chs` and `reduction` (input over output resolution) of each feature level: of the stem, if it
            is one, of each shared stage and of the private stages.
        first_conv: The convolutions that see the images.
        initialised: Whether the parameters have their initial values already.
        name: Name of the timm model that has pretrained weights for it, None if there is none.
    """

    stem: nn.Module
    stages: List[nn.Module]
    last_stages: Sequence[nn.Module]
    feature_info: List[Dict[str, int]]
    first_conv: List[nn.Module]
    initialised: bool
    name: Optional[str] = None


BackboneFn = Callable[..., Backbone]
