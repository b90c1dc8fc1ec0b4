"""The registered models: their configurations, the weights in the package, and the entry points."""
import re
from functools import partial
from pathlib import Path
from typing import Any, Dict, Optional

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    generate_default_cfgs,
    get_model_traits,
    register_model,
    resolve_pretrained_cfg,
)
from torch import Tensor

from ..checkpoints import CONFIG_FILE, WEIGHTS_FILE
from ..errors import InputError
from ..files import read_json
from .backbones import BackboneFn, cifar_resnet, fetching, preprocessing, timm_backbone
from .expand import BACKBONE_TAG, backbone_cfg, expand
from .shike import OLD_ARGUMENTS, Shike

PACKAGED_WEIGHTS = Path(__file__).parents[1] / 'weights'  # Model folders called NAME.TAG.

CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2023, 0.1994, 0.2010)


def _cfg(**kwargs) -> Dict[str, Any]:
    return {
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7),
        'crop_pct': 0.875, 'interpolation': 'bilinear',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'stem.0', 'classifier': 'classifier',
        **kwargs,
    }


def _cifar_cfg(name: str) -> Dict[str, Any]:
    """The `pretrained_cfg` of a model for CIFAR images, with the weights in the package that have the model's name."""
    cfg = _cfg(
        num_classes=100, input_size=(3, 32, 32), pool_size=(8, 8), crop_pct=1.0, mean=CIFAR_MEAN, std=CIFAR_STD)
    folder = PACKAGED_WEIGHTS / name
    if folder.is_dir():  # The folder is absent while results/weights.py makes it.
        labels = read_json(folder / CONFIG_FILE)['label_names']
        cfg.update(file=str(folder / WEIGHTS_FILE), label_names=tuple(labels))
    return cfg


# The timm network of each model and the tag of its ImageNet weights, which were not trained by SHIKE.
BACKBONES = {
    'resnet50_shike': ('resnet50', 'a1_in1k'),
    'resnext50_shike': ('resnext50_32x4d', 'a1h_in1k'),
    'resnet152_shike': ('resnet152', 'a1h_in1k'),
}

default_cfgs = generate_default_cfgs({
    **{
        f'{name}.{BACKBONE_TAG}{tag}': _cfg(**backbone_cfg(f'{backbone}.{tag}'))
        for name, (backbone, tag) in BACKBONES.items()},
    **{name: _cifar_cfg(name) for name in (
        'resnet32_shike.cifar100_lt_if100', 'resnet32_shike.paper_cifar100_lt_if100')},
    **{f'{name}.untrained': _cfg() for name in (*BACKBONES, 'shike')},
})


def _fit_weights(state_dict: Dict[str, Tensor], model: Shike) -> Dict[str, Tensor]:
    """Expand weights of a backbone, and refuse weights of a SHIKE model with another number of experts."""
    if model.backbone_name and not any(name.startswith('experts.') for name in state_dict):
        return expand(state_dict, model)
    experts = {int(match[1]) for name in state_dict if (match := re.match(r'experts\.(\d+)\.', name))}
    if experts and len(experts) != model.num_experts:
        few = f', then model.set_experts({list(range(model.num_experts))})' if model.num_experts < len(experts) else ''
        raise InputError(
            f'These weights are of {len(experts)} experts, not of {model.num_experts}: create the model with '
            f'num_experts={len(experts)}{few}.')
    return state_dict


def _create_shike(
        variant: str, backbone: BackboneFn, pretrained: bool = False, fetched: str = '',
        pretrained_model_args: Optional[Dict[str, Any]] = None, **kwargs: Any,
) -> Shike:
    overlay = kwargs.get('pretrained_cfg_overlay') or {}
    if overlay.get('url') or overlay.get('hf_hub_id'):
        # Otherwise timm would load the file in the package in place of the weights that were asked for.
        kwargs['pretrained_cfg_overlay'] = {'file': None, **overlay}
    cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
    if pretrained and not (cfg.has_weights or cfg.state_dict):
        raise RuntimeError(
            f"No weights are published for '{variant}': leave out pretrained and train it with shike train, or load a "
            "trained model as 'hf-hub:USER/NAME' or 'local-dir:FOLDER'.")
    implied = {}
    if not pretrained and variant in BACKBONES and not kwargs.get('pretrained_cfg'):
        kwargs['pretrained_cfg'] = 'untrained'  # The preprocessing of weights that are not loaded is not used.
    if pretrained and (cfg.tag or '').startswith(BACKBONE_TAG) and not overlay:
        implied = dict(fusion='residual', classifier='linear')  # So a new model computes what its backbone does.
        kwargs.update({key: value for key, value in implied.items() if kwargs.get(key) is None})
    for name in OLD_ARGUMENTS if pretrained_model_args else ():
        kwargs.pop(name, None)
    with fetching(fetched, remote=pretrained and not (cfg.file or cfg.state_dict)):
        model = build_model_with_cfg(
            Shike, variant, pretrained, backbone=backbone, pretrained_model_args=pretrained_model_args,
            pretrained_filter_fn=_fit_weights, feature_cfg=dict(feature_cls='getter', out_indices=None), **kwargs)
    if isinstance(model, Shike):
        model.implied_args = implied
    model.pretrained_cfg['first_conv'] = get_model_traits(model)['first_conv']
    folder = Path(model.pretrained_cfg.get('file') or '').parent
    if pretrained and isinstance(model, Shike) and folder.parent == PACKAGED_WEIGHTS:
        config = read_json(folder / CONFIG_FILE)
        if config['num_classes'] == model.num_classes:
            model.set_training_prior(config['class_counts'], config['model_args'].get('classifier_prior'))
    return model


def _on_timm(variant: str, pretrained: bool, **kwargs: Any) -> Shike:
    name, tag = BACKBONES[variant]
    return _create_shike(variant, partial(timm_backbone, name), pretrained, f'{name}.{tag}', **kwargs)


@register_model
def resnet32_shike(pretrained: bool = False, **kwargs) -> Shike:
    """SHIKE on the CIFAR ResNet-32 for 32x32 images, with the paper's aligner."""
    kwargs.setdefault('aligner', 'conv')
    return _create_shike('resnet32_shike', partial(cifar_resnet, 5), pretrained, **kwargs)


@register_model
def resnet50_shike(pretrained: bool = False, **kwargs) -> Shike:
    """SHIKE on ResNet-50."""
    return _on_timm('resnet50_shike', pretrained, **kwargs)


@register_model
def resnext50_shike(pretrained: bool = False, **kwargs) -> Shike:
    """SHIKE on ResNeXt-50 32x4d."""
    return _on_timm('resnext50_shike', pretrained, **kwargs)


@register_model
def resnet152_shike(pretrained: bool = False, **kwargs) -> Shike:
    """SHIKE on ResNet-152."""
    return _on_timm('resnet152_shike', pretrained, **kwargs)


@register_model
def shike(pretrained: bool = False, backbone: str = 'resnet50', **kwargs) -> Shike:
    """SHIKE on any network of timm, split before its last stage.

    Args:
        pretrained: Load timm's weights of the backbone into trunk and experts. A saved model loads its own weights.
        backbone: Name of timm's network.
        **kwargs: Arguments of `Shike`.
    """
    # A pretrained_cfg that is None or a tag holds nothing about the backbone.
    if not isinstance(kwargs.get('pretrained_cfg'), (dict, PretrainedCfg)):
        weights = dict(backbone_cfg(backbone), tag=BACKBONE_TAG) if pretrained else preprocessing(backbone)
        kwargs['pretrained_cfg'] = _cfg(**weights)
    return _create_shike('shike', partial(timm_backbone, backbone), pretrained, backbone, **kwargs)
