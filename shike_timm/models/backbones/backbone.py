"""A backbone as SHIKE sees it."""
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Optional, Sequence, Set, Tuple

from torch import nn


@dataclass
class Backbone:
    """A network cut into stages, each of which is called on what the last one gave.

    This is the features, or a tuple of the features and whatever else later stages need, such as position embeddings.
    """

    stem: nn.Module  # Everything before the first shared stage.
    stages: List[nn.Module]  # The shared stages in order.
    last_stages: Sequence[nn.Module]  # The private stages of each expert, as one module that gives features alone.
    # Each entry describes the stem (if it is a feature level), a shared stage, or the private stages: `num_chs`,
    # `reduction` (input over output resolution), `output_fmt` ('NCHW', 'NHWC' or 'NLC', timm's names),
    # `num_prefix_tokens` (class and register tokens, which come before those of the patches), and for tokens `has_map`
    # (whether the others lie in the order of the image).
    feature_info: List[Dict[str, Any]]
    first_conv: List[nn.Module]  # The convolutions that see the images.
    initialised: bool  # Whether the parameters have their initial values already.
    name: Optional[str] = None  # The timm model that has pretrained weights for it.
    heads: Optional[Sequence[nn.Module]] = None  # For each expert, features to vectors. None is plain pooling of maps.
    global_pool: str = 'avg'  # The pooling of those heads, or of plain maps.
    head_hidden_size: Optional[int] = None  # Width of those vectors. By default the channels of the features.
    img_size: Optional[Tuple[int, int]] = None  # Size of the images that the network is made for, if any.
    fixed_input_size: bool = False  # Whether the network takes no other size.
    no_weight_decay: Set[str] = field(default_factory=set)  # Parameters whose names end so have no weight decay.

    def parts(self, num_experts: int) -> Dict[str, nn.Module]:
        """The parts that have pretrained weights, by their names in a model. Each expert gets those of the first."""
        parts = {'stem': self.stem, **{f'stages.{i}': stage for i, stage in enumerate(self.stages)}}
        for m in range(num_experts) if self.last_stages else ():
            parts[f'experts.{m}.stage'] = self.last_stages[0]
            if self.heads:
                parts[f'experts.{m}.head'] = self.heads[0]
        return parts


def is_column(feature_info: Sequence[Dict[str, Any]]) -> bool:
    """Whether a trunk is a column of equal blocks of tokens, each of which is a stage."""
    trunk = {(level['num_chs'], level['reduction'], level['output_fmt']) for level in feature_info[:-1]}
    return len(trunk) == 1 and feature_info[0]['output_fmt'] != 'NCHW' and (
        feature_info[0]['reduction'] == feature_info[-1]['reduction'])


BackboneFn = Callable[..., Backbone]
