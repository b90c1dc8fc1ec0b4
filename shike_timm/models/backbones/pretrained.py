"""Pretrained weights of timm's networks, by tag or from a file, and the preprocessing for them."""
import os
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, Optional, Union

import timm
from huggingface_hub import constants
from huggingface_hub.utils import get_session
from timm.models import get_pretrained_cfg, load_state_dict
from torch import Tensor

from ...errors import one_line

# True for timm's default weights, the tag of other weights, a file with a state dict in timm's layout, or the dict.
Source = Union[bool, str, Path, Dict[str, Tensor]]

_PREPROCESSING = ('input_size', 'pool_size', 'crop_pct', 'crop_mode', 'interpolation', 'mean', 'std')


def _tag(source: Optional[Source]) -> Optional[str]:
    """The tag that a source names, '' for the default weights, None for a file or a state dict."""
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
    """The preprocessing for weights of a timm model, under timm's names.

    True or a tag as `source` adds the `license`. With None, the weights are those that `name` stands for.
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
    except Exception as error:  # A damaged file can make torch or safetensors raise nearly any error.
        raise ValueError(
            f"pretrained_backbone '{source}' cannot be read: expected a state dict of timm's '{name}', saved by "
            'torch or safetensors with nothing but tensors and plain values in it.') from error
    # For a model without classifiers, timm ignores missing weights, so they are looked for here.
    own = timm.create_model(name, num_classes=0, device='meta').state_dict()
    missing = [key for key in own if key not in keys and not key.endswith('num_batches_tracked')]
    if missing:
        raise ValueError(
            f"pretrained_backbone '{source}' has no '{missing[0]}': expected a state dict of timm's '{name}'.")
    cfg = get_pretrained_cfg(name)
    if cfg is None or cfg.num_classes or not cfg.classifier:
        return weights
    heads = (cfg.classifier,) if isinstance(cfg.classifier, str) else cfg.classifier
    # timm drops the classifier of a file only if timm's own weights have a classifier.
    return {key: value for key, value in weights.items() if not key.startswith(tuple(f'{one}.' for one in heads))}


@contextmanager
def fetching(name: str, remote: bool) -> Iterator[None]:
    """Raise an OSError that tells what to do if weights of a timm model cannot be fetched. Without `remote` do nothing.

    If the Hub cannot be reached, only its cache is searched, since the Hub's client would try again for a minute.
    """
    if not remote:
        yield
        return
    offline = constants.HF_HUB_OFFLINE
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # Each version of the Hub's client has errors of its own.
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    except Exception as error:  # Each version of the Hub's client has errors of its own.
        modules = {kind.__module__.split('.')[0] for kind in type(error).__mro__}
        if not modules & {'huggingface_hub', 'httpx', 'requests', 'urllib'}:
            raise
        cfg = get_pretrained_cfg(name)
        place = f'model.safetensors of huggingface.co/{cfg.hf_hub_id}' if cfg and cfg.hf_hub_id else cfg and cfg.url
        raise OSError(
            f"the weights of '{name}' cannot be fetched: download {place} elsewhere and give it as "
            '--pretrained-backbone FILE, in Python to load_backbone, or add --no-pretrained-backbone '
            f'({one_line(error)})') from error
    finally:
        constants.HF_HUB_OFFLINE = offline


def pretrained_options(name: Optional[str], source: Source) -> Dict[str, Any]:
    """The name and the entries of `weights` with which `timm_backbone` loads pretrained weights."""
    tagged_name = _tagged_name(name, source)
    overlay = None
    if _tag(source) is None:
        weights = dict(source) if isinstance(source, dict) else _read_weights(tagged_name, source)
        overlay = dict(state_dict=weights)
    return dict(name=tagged_name, pretrained=True, pretrained_cfg_overlay=overlay)
