"""The registered models: their configurations, the weights in the package, and the entry points."""
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

from ..checkpoints import CONFIG_FILE, WEIGHTS_FILE
from ..errors import InputError
from .backbones import BackboneFn, cifar_resnet, preprocessing, timm_backbone
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
    """Configuration of a name for CIFAR images, with the weights of that name in the package."""
    cfg = _cfg(
        num_classes=100, input_size=(3, 32, 32), pool_size=(8, 8), crop_pct=1.0, mean=CIFAR_MEAN, std=CIFAR_STD)
    folder = PACKAGED_WEIGHTS / name
    if folder.is_dir():  # The folder is absent while results/weights.py makes it.
        labels = json.loads((folder / CONFIG_FILE).read_text(encoding='utf-8'))['label_names']
        cfg.update(file=str(folder / WEIGHTS_FILE), label_names=tuple(labels))
    return cfg


default_cfgs = generate_default_cfgs({
    'resnet32_shike.cifar100_lt_if100': _cifar_cfg('resnet32_shike.cifar100_lt_if100'),
    'resnet32_shike.paper_cifar100_lt_if100': _cifar_cfg('resnet32_shike.paper_cifar100_lt_if100'),
    'resnet50_shike.untrained': _cfg(),
    'resnext50_shike.untrained': _cfg(),
    'resnet152_shike.untrained': _cfg(),
    'shike.untrained': _cfg(),
})


def _check_num_experts(state_dict: Dict[str, Tensor], model: Shike) -> Dict[str, Tensor]:
    """Refuse weights with a different number of experts."""
    experts = {int(match[1]) for name in state_dict if (match := re.match(r'experts\.(\d+)\.', name))}
    if experts and len(experts) != model.num_experts:
        few = f', then model.set_experts({list(range(model.num_experts))})' if model.num_experts < len(experts) else ''
        raise InputError(
            f'These weights are of {len(experts)} experts, not of {model.num_experts}: create the model with '
            f'num_experts={len(experts)}{few}.')
    return state_dict


def _create_shike(
        variant: str,
        backbone: BackboneFn,
        pretrained: bool = False,
        pretrained_model_args: Optional[Dict[str, Any]] = None,
        **kwargs: Any,
) -> Shike:
    overlay = kwargs.get('pretrained_cfg_overlay') or {}
    if overlay.get('url') or overlay.get('hf_hub_id'):
        # timm would load the file in the package, not the weights that were asked for.
        kwargs['pretrained_cfg_overlay'] = {'file': None, **overlay}
    cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
    if pretrained and not (cfg.has_weights or cfg.state_dict):
        raise RuntimeError(
            f"No weights are published for '{variant}': leave out pretrained and train it with shike train, or load a "
            "trained model as 'hf-hub:USER/NAME' or 'local-dir:FOLDER'.")
    for name in OLD_ARGUMENTS if pretrained_model_args else ():
        kwargs.pop(name, None)
    model = build_model_with_cfg(
        Shike,
        variant,
        pretrained,
        backbone=backbone,
        pretrained_model_args=pretrained_model_args,
        pretrained_filter_fn=_check_num_experts,
        feature_cfg=dict(feature_cls='getter', out_indices=None),
        **kwargs,
    )
    model.pretrained_cfg['first_conv'] = get_model_traits(model)['first_conv']
    folder = Path(model.pretrained_cfg.get('file') or '').parent
    if pretrained and isinstance(model, Shike) and folder.parent == PACKAGED_WEIGHTS:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding='utf-8'))
        if config['num_classes'] == model.num_classes:
            model.set_training_prior(config['class_counts'], config['model_args'].get('classifier_prior'))
    return model


@register_model
def resnet32_shike(pretrained: bool = False, **kwargs) -> Shike:
    """SHIKE on the CIFAR ResNet-32 for 32x32 images, with the paper's aligner."""
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
    """SHIKE on any convolutional network of timm, split before its last stage.

    Args:
        pretrained: Load weights of the whole model. Only saved models have them.
        backbone: Name of timm's network.
        **kwargs: Arguments of `Shike`.
    """
    # Otherwise pretrained_cfg is a tag, which says no more than the name.
    if not isinstance(kwargs.get('pretrained_cfg'), (dict, PretrainedCfg)):
        kwargs['pretrained_cfg'] = _cfg(**preprocessing(backbone))
    return _create_shike('shike', partial(timm_backbone, backbone), pretrained, **kwargs)
