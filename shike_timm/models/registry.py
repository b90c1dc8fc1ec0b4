"""The names that timm knows SHIKE by: their configurations, the weights that come with the package, entry points."""
import json
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

from ..errors import InputError
from .authors import is_authors_layout, translate_authors_weights
from .backbones import BackboneFn, cifar_resnet, preprocessing, timm_backbone
from .shike import Shike

__all__ = ['CIFAR_MEAN', 'CIFAR_STD', 'WEIGHTS', 'default_cfgs']

WEIGHTS = Path(__file__).parents[1] / 'weights'  # what the package brings, a folder NAME.TAG each

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


def _packaged(name: str) -> Dict[str, Any]:
    """Where the weights are that come with the package under `NAME.TAG`, and their labels; nothing without weights."""
    folder = WEIGHTS / name
    if not folder.is_dir():
        return {}
    config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    return dict(file=str(folder / 'model.safetensors'), label_names=tuple(config['label_names']))


def _cifar_cfg(name: str) -> Dict[str, Any]:
    return _cfg(
        num_classes=100, input_size=(3, 32, 32), pool_size=(8, 8), crop_pct=1.0, mean=CIFAR_MEAN, std=CIFAR_STD,
        **_packaged(name))


default_cfgs = generate_default_cfgs({
    'resnet32_shike.cifar100_lt_if100': _cifar_cfg('resnet32_shike.cifar100_lt_if100'),
    'resnet32_shike.paper_cifar100_lt_if100': _cifar_cfg('resnet32_shike.paper_cifar100_lt_if100'),
    'resnet50_shike.untrained': _cfg(),
    'resnext50_shike.untrained': _cfg(),
    'resnet152_shike.untrained': _cfg(),
    'shike.untrained': _cfg(),
})


def _translate_pretrained(state_dict: Dict[str, Tensor], model: Shike) -> Dict[str, Tensor]:
    """Translate before timm adapts weights to other image channels and another number of classes."""
    experts = {int(match[1]) for name in state_dict if (match := re.match(r'experts\.(\d+)\.', name))}
    if experts and len(experts) != model.num_experts:
        few = f', then model.set_experts({list(range(model.num_experts))})' if model.num_experts < len(experts) else ''
        raise InputError(
            f'These weights are of {len(experts)} experts, not of {model.num_experts}: create the model with '
            f'num_experts={len(experts)}{few}.')
    if not is_authors_layout(state_dict):
        return state_dict
    first_conv = get_model_traits(model)['first_conv']
    return translate_authors_weights(
        state_dict, model.state_dict(), model.authors_classifiers, (f'{first_conv}.weight', 'classifier.weight'))


def _check_published(variant: str, kwargs: Dict[str, Any]) -> None:
    cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
    if not (cfg.has_weights or cfg.state_dict):
        raise RuntimeError(
            f"No weights are published for '{variant}': leave pretrained out and train it with train.py, or load a "
            "trained model as 'hf-hub:USER/NAME' or 'local-dir:FOLDER'.")


def _create_shike(
        variant: str,
        backbone: BackboneFn,
        pretrained: bool = False,
        pretrained_model_args: Optional[Dict[str, Any]] = None,
        **kwargs: Any,
) -> Shike:
    overlay = kwargs.get('pretrained_cfg_overlay') or {}
    if overlay.get('url') or overlay.get('hf_hub_id'):
        # timm takes a file before either, and the one that comes with the package is not what was asked for.
        kwargs['pretrained_cfg_overlay'] = {'file': None, **overlay}
    if pretrained:
        _check_published(variant, kwargs)
    if pretrained_model_args:
        kwargs.pop('pretrained_backbone', None)  # an argument of old, of the model when it was made
    model = build_model_with_cfg(
        Shike,
        variant,
        pretrained,
        backbone=backbone,
        pretrained_model_args=pretrained_model_args,
        pretrained_filter_fn=_translate_pretrained,
        feature_cfg=dict(feature_cls='getter', out_indices=None),
        **kwargs,
    )
    model.pretrained_cfg['first_conv'] = get_model_traits(model)['first_conv']
    folder = Path(model.pretrained_cfg.get('file') or '').parent
    if pretrained and isinstance(model, Shike) and folder.parent == WEIGHTS:
        config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
        if config['num_classes'] == model.num_classes:
            model.set_training_prior(config['class_counts'], config['model_args'].get('classifier_prior'))
    return model


@register_model
def resnet32_shike(pretrained: bool = False, **kwargs) -> Shike:
    """SHIKE on the CIFAR ResNet-32, 32x32 images, with the authors' aligner."""
    kwargs.setdefault('aligner', 'conv')
    return _create_shike('resnet32_shike', partial(cifar_resnet, 5), pretrained, **kwargs)


@register_model
def resnet50_shike(pretrained: bool = False, **kwargs) -> Shike:
    """SHIKE on ResNet-50."""
    return _create_shike('resnet50_shike', partial(timm_backbone, 'resnet50'), pretrained, **kwargs)


@register_model
def resnext50_shike(pretrained: bool = False, **kwargs) -> Shike:
    """SHIKE on ResNeXt-50 32x4d."""
    return _create_shike('resnext50_shike', partial(timm_backbone, 'resnext50_32x4d'), pretrained, **kwargs)


@register_model
def resnet152_shike(pretrained: bool = False, **kwargs) -> Shike:
    """SHIKE on ResNet-152."""
    return _create_shike('resnet152_shike', partial(timm_backbone, 'resnet152'), pretrained, **kwargs)


@register_model
def shike(pretrained: bool = False, backbone: str = 'resnet50', **kwargs) -> Shike:
    """SHIKE on any convolutional network of timm, split where its last stage begins.

    Args:
        pretrained: Load weights of the whole model, which only a saved model has.
        backbone: Name of timm's network.
        **kwargs: Arguments of `Shike`.
    """
    # A tag as configuration says no more than the name does.
    if not isinstance(kwargs.get('pretrained_cfg'), (dict, PretrainedCfg)):
        kwargs['pretrained_cfg'] = _cfg(**preprocessing(backbone))
    return _create_shike('shike', partial(timm_backbone, backbone), pretrained, **kwargs)
