"""Pretrained weights of timm's networks, by tag or from a file, and the preprocessing that they expect."""
import os
from pathlib import Path
from typing import Any, Dict, Optional, Union

import timm
from timm.models import get_pretrained_cfg, load_state_dict
from torch import Tensor

__all__ = ['Source', 'preprocessing', 'pretrained_options']

Source = Union[bool, str, Path]  # True for timm's default weights, the tag of others, or a file in timm's layout

_PREPROCESSING = ('input_size', 'pool_size', 'crop_pct', 'crop_mode', 'interpolation', 'mean', 'std')


def _tag(source: Optional[Source]) -> Optional[str]:
    """The tag of timm's weights that a source stands for, '' for the default ones, None for a file."""
    if source is True:
        return ''
    if isinstance(source, str) and not (os.path.isfile(source) or os.sep in source or '.' in source):
        return source
    return None


def _tagged_name(name: Optional[str], source: Optional[Source]) -> str:
    if name is None:
        raise ValueError(f"pretrained_backbone '{source}': timm has no weights of this model's backbone, leave it out.")
    tag = _tag(source)
    return f"{name.split('.')[0]}.{tag}" if tag else name


def preprocessing(name: Optional[str], source: Optional[Source] = None) -> Dict[str, Any]:
    """What weights of a timm model expect of images, under the names of timm's configurations.

    Args:
        name: Name of the model, None for a network that timm does not have.
        source: The weights, whose license is given too unless they are in a file; None for what the name stands for.

    Raises:
        ValueError: If timm does not have the network.
        RuntimeError: If timm knows no such tag.
    """
    cfg = get_pretrained_cfg(_tagged_name(name, source))
    keys = _PREPROCESSING if _tag(source) is None else (*_PREPROCESSING, 'license')
    return {key: getattr(cfg, key) for key in keys if getattr(cfg, key, None) is not None}


def _read_weights(name: str, source: Source) -> Dict[str, Tensor]:
    try:
        weights = load_state_dict(str(source))
        keys = [key for key, value in weights.items() if isinstance(value, Tensor)]
    except FileNotFoundError:
        raise ValueError(f"pretrained_backbone '{source}' is neither a file nor a tag of '{name}'.") from None
    except Exception as error:  # a damaged file can make torch or safetensors raise nearly anything
        raise ValueError(
            f"pretrained_backbone '{source}' cannot be read: expected a state dict of timm's '{name}', saved by "
            'torch or safetensors with nothing but tensors and plain values in it.') from error
    # timm would load what fits and stay silent about the rest, since the classifier is left out.
    own = timm.create_model(name, num_classes=0, device='meta').state_dict()
    missing = [key for key in own if key not in keys and not key.endswith('num_batches_tracked')]
    if missing:
        raise ValueError(
            f"pretrained_backbone '{source}' has no '{missing[0]}': expected a state dict of timm's '{name}'.")
    return weights


def pretrained_options(name: Optional[str], source: Source) -> Dict[str, Any]:
    """Arguments that `timm.create_model` makes a network with pretrained weights from, as for `pretrained_parts`."""
    tagged_name = _tagged_name(name, source)
    overlay = dict(state_dict=_read_weights(tagged_name, source)) if _tag(source) is None else None
    return dict(model_name=tagged_name, pretrained=True, pretrained_cfg_overlay=overlay)
