"""The parts of a backbone from which a SHIKE model is made."""
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Optional, Sequence, Set, Tuple

from torch import nn


@dataclass
class Backbone:
    """A network cut into stages. The output of a stage is the input of the next stage.

    An output is the features, or a tuple of the features and other values that later stages need, such as embeddings.
    """

    stem: nn.Module  # Everything before the first shared stage.
    stages: List[nn.Module]  # The shared stages in order.
    last_stages: Sequence[nn.Module]  # For each expert, one module of its private stages, which returns only features.
    # Each entry describes the stem (if it is a feature level), a shared stage, or the private stages: `num_chs`,
    # `reduction` (input over output resolution), `output_fmt` ('NCHW', 'NHWC' or 'NLC', timm's names),
    # `num_prefix_tokens` (class and register tokens, which come before the patch tokens), and for tokens `has_map`
    # (whether the patch tokens are in the order of the image).
    feature_info: List[Dict[str, Any]]
    first_conv: List[nn.Module]  # The convolutions that take the images.
    initialised: bool  # Whether the parameters have their initial values already.
    name: Optional[str] = None  # Name of the timm model whose pretrained weights fit.
    heads: Optional[Sequence[nn.Module]] = None  # For each expert, a module from features to vectors. None: pooling.
    global_pool: str = 'avg'  # Pooling type of the heads, or of maps without heads.
    head_hidden_size: Optional[int] = None  # Width of the vectors. None: the channels of the features.
    img_size: Optional[Tuple[int, int]] = None  # Image size that the network is made for. None: any.
    fixed_input_size: bool = False  # Whether the network takes no other size.
    no_weight_decay: Set[str] = field(default_factory=set)  # Ends of names of parameters without weight decay.

    def parts(self, num_experts: int) -> Dict[str, nn.Module]:
        """Parts with pretrained weights, by module name in a SHIKE model. All experts get the parts of the first."""
        parts = {'stem': self.stem, **{f'stages.{i}': stage for i, stage in enumerate(self.stages)}}
        for m in range(num_experts) if self.last_stages else ():
            parts[f'experts.{m}.stage'] = self.last_stages[0]
            if self.heads:
                parts[f'experts.{m}.head'] = self.heads[0]
        return parts


def is_column(feature_info: Sequence[Dict[str, Any]]) -> bool:
    """Whether a network is a column of equal blocks, such as ViT, where each block is a stage."""
    trunk = {(level['num_chs'], level['reduction'], level['output_fmt']) for level in feature_info[:-1]}
    return len(trunk) == 1 and feature_info[0]['output_fmt'] != 'NCHW' and (
        feature_info[0]['reduction'] == feature_info[-1]['reduction'])


BackboneFn = Callable[..., Backbone]
