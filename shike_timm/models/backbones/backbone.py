"""A backbone as SHIKE sees it."""
from dataclasses import dataclass
from typing import Callable, Dict, List, Optional, Sequence

from torch import nn


@dataclass
class Backbone:
    """A convolutional network cut into stages."""

    stem: nn.Module  # everything before the first shared stage
    stages: List[nn.Module]  # the shared stages in order
    last_stages: Sequence[nn.Module]  # the private stages of each expert, as one module
    # `num_chs` and `reduction` (input over output resolution) of the stem, if it is a feature level, of each shared
    # stage and of the private stages.
    feature_info: List[Dict[str, int]]
    first_conv: List[nn.Module]  # the convolutions that see the images
    initialised: bool  # whether the parameters have their initial values already
    name: Optional[str] = None  # of the timm model that has pretrained weights for it


BackboneFn = Callable[..., Backbone]
