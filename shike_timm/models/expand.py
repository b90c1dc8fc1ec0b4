"""Conversion of the weights of a timm network to the weights of a SHIKE model."""
import logging
from typing import Any, Dict, Mapping, Optional

import timm
import torch
from timm.models import PretrainedCfg, get_pretrained_cfg
from torch import Tensor, nn

from .backbones import preprocessing, timm_backbone
from .shike import Shike

BACKBONE_TAG = 'backbone_'  # Prefix of the tags of timm's weights of the backbone.

_logger = logging.getLogger(__name__)


def backbone_cfg(backbone: str) -> Dict[str, Any]:
    """Entries for a model's `pretrained_cfg`: the source, classes and preprocessing of timm's weights of a network."""
    cfg: Optional[PretrainedCfg] = get_pretrained_cfg(backbone)
    if cfg is None or not cfg.has_weights:
        raise RuntimeError(f"timm has no weights of '{backbone}': leave out pretrained.")
    keys = ('hf_hub_id', 'hf_hub_filename') if cfg.hf_hub_id else ('url', 'file')
    return dict(preprocessing(backbone), num_classes=cfg.num_classes, **{key: getattr(cfg, key) for key in keys})


def expand(state_dict: Mapping[str, Tensor], model: Shike) -> Dict[str, Tensor]:
    """Convert weights of the backbone, in timm's layout, to weights of the whole model.

    All experts get the same weights. Aligners keep theirs. Every expert gets the backbone's linear classifier if the
    model has linear classifiers, private stages, and residual or no fusion. Otherwise classifiers keep theirs.
    """
    name = model.backbone_name or ''
    chans = preprocessing(name).get('input_size', (3,))[0]
    args = model.backbone_kwargs()
    # timm converts published weights to its own names, and raises an error if any are missing.
    whole = timm.create_model(
        name, pretrained=True, in_chans=chans, pretrained_cfg_overlay=dict(state_dict=dict(state_dict)), **args)
    net = timm_backbone(name, num_experts=1, in_chans=chans, **model._backbone_args, weights=dict(
        pretrained=True, pretrained_cfg_overlay=dict(state_dict=whole.state_dict())))
    weights = model.state_dict()
    for path, part in net.parts(model.num_experts).items():
        weights.update({f'{path}.{key}': value for key, value in part.state_dict().items()})
    head = whole.get_classifier()
    begins_as_backbone = net.last_stages and model.fusion != 'product'
    if not (isinstance(head, nn.Linear) and model.classifier_type == 'linear' and begins_as_backbone):
        if model.num_classes and model.num_classes == whole.num_classes:
            _logger.warning(
                f"The classifiers are new. Only a linear layer of '{name}' is taken over, by linear classifiers on "
                'residual or no fusion, of experts with private stages.')
        return weights
    bias = torch.zeros(head.out_features) if head.bias is None else head.bias.detach()
    for key, value in (('weight', head.weight.detach()), ('bias', bias)):
        weights[f'classifier.{key}'] = value.expand(model.num_experts, *value.shape).clone()
    return weights
