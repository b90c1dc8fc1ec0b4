"""Checkpoints of other trainers: plain networks of timm with one classifier."""
from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, Optional, Sequence, cast

import timm
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from ..checkpoints import model_weights, saved_args
from ..errors import InputError, one_line
from ..models import Shike

# timm's names for preprocessing, in the arguments of its train.py and in the configuration of a model.
_PREPROCESSING = ('img_size', 'input_size', 'in_chans', 'mean', 'std', 'crop_pct', 'interpolation')


@dataclass
class PlainModel:
    """The weights of a network of timm, and what is known of its training."""

    name: str  # For messages.
    backbone: str
    weights: Dict[str, Tensor]
    class_names: Optional[List[str]] = None  # In label order, None if unknown.
    options: Dict[str, Any] = field(default_factory=dict)  # Options of its preprocessing.


def _preprocessing(values: Mapping[str, Any]) -> Dict[str, Any]:
    known = {key: values.get(key) for key in _PREPROCESSING}
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in known.items()
        if value not in (None, '') and (key, value) != ('interpolation', 'random')}


def _backbone(name: str, backbone: Optional[str], arch: Any) -> str:
    backbone = backbone or arch
    if not isinstance(backbone, str) or not timm.is_model(backbone.split('.')[0]):
        raise InputError(
            f"checkpoint '{name}' is of no model of shike train: give --backbone NAME, the network of timm that it is "
            f'of{f", which is not {backbone!r}" if backbone else ""}.')
    return backbone


def load_plain(name: str, backbone: Optional[str] = None) -> PlainModel:
    """Load a plain network of timm from `local-dir:FOLDER` or `hf-hub:USER/NAME`."""
    try:
        net = timm.create_model(name, pretrained=True)
    except Exception as error:  # A damaged folder can make timm, torch or safetensors raise nearly any error.
        raise InputError(f"checkpoint '{name}' cannot be loaded: {one_line(error)}.") from error
    if isinstance(net, Shike):
        raise InputError(f"checkpoint '{name}' is a SHIKE model: give the folder of its run, or its stage one.")
    cfg = cast(Dict[str, Any], net.pretrained_cfg)
    names = cfg.get('label_names')
    return PlainModel(
        name, _backbone(name, backbone, cfg['architecture']), net.state_dict(), list(names) if names else None,
        _preprocessing(cfg))


def plain_from_checkpoint(
        checkpoint: Dict[str, Any], name: str, backbone: Optional[str] = None) -> Optional[PlainModel]:
    """The plain network in a checkpoint of timm or torchvision, or in a state dict. None for a SHIKE model."""
    values, weights = saved_args(checkpoint), model_weights(checkpoint, name)
    if 'class_counts' in values or any(key.startswith('experts.') for key in weights):
        return None
    weights.pop('n_averaged', None)  # This is the number of updates of torch's AveragedModel.
    return PlainModel(
        name, _backbone(name, backbone, checkpoint.get('arch')), weights, options=_preprocessing(values))


class OneExpert(nn.Module):
    """A plain network as a model of one expert, for `shike_timm.metrics.evaluate`."""

    num_experts = 1

    def __init__(self, net: nn.Module, places: Optional[Sequence[int]] = None):
        super().__init__()
        self.net = net
        self.places = places

    def forward_experts(self, x: Tensor) -> Tensor:
        """Logits [B, 1, C] from images. `places` holds, for each class of the data, its label in the network."""
        logits = self.net(x)
        return (logits if self.places is None else logits[:, self.places])[:, None]


def create_plain(plain: PlainModel, model: Shike, class_names: Sequence[str]) -> Optional[OneExpert]:
    """Create the network with its own classifier, or return None if its classes are not those of the data.

    Its other arguments, such as the image size, are those of the backbone of `model`.
    """
    cfg = get_pretrained_cfg(plain.backbone)
    head = getattr(cfg, 'classifier', None)
    names = [head] if isinstance(head, str) else head or ()
    weight = next((plain.weights[f'{one}.weight'] for one in names if f'{one}.weight' in plain.weights), None)
    num_classes = 0 if weight is None else len(weight)
    overlay = dict(state_dict=dict(plain.weights), num_classes=num_classes, label_offset=0)
    try:
        net = timm.create_model(
            plain.backbone, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=num_classes,
            in_chans=model.in_chans, **model.backbone_kwargs())
    except Exception as error:  # The filters of timm's networks raise nearly any error on weights of another one.
        raise InputError(
            f"checkpoint '{plain.name}' does not fit timm's '{plain.backbone}': {one_line(error)}.") from error
    known = plain.class_names
    if num_classes != len(class_names) or known and set(known) != set(class_names):
        return None
    return OneExpert(net, [known.index(one) for one in class_names] if known else None)
