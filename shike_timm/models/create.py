"""Functions that create a model and its preprocessing from the options."""
import re
from dataclasses import replace
from typing import Any, Dict, Optional, Tuple, TypeVar, cast

import timm
import timm.data
from timm.models import get_arch_name, get_model_input_config, get_pretrained_cfg

from ..data.config import PreprocessingConfig
from ..errors import InputError, nearest, one_line
from .config import ModelConfig
from .expand import BACKBONE_TAG
from .shike import Shike

_LEVELS = re.compile(r'\d+(\+\d+)*')

Model = TypeVar('Model', bound=ModelConfig)


def is_registered(name: str) -> bool:
    """Whether a name is that of a registered SHIKE model, with or without a tag."""
    return ':' not in name and get_arch_name(name) in timm.list_models(module='registry')


def with_backbone_weights(config: Model) -> Model:
    """Replace `--pretrained` by `--pretrained-backbone` if the published weights are those of the backbone alone."""
    if not config.pretrained or config.pretrained_backbone or not is_registered(config.model):
        return config
    tag = getattr(get_pretrained_cfg(config.model, allow_unregistered=True), 'tag', None) or ''
    if get_arch_name(config.model) != 'shike' and not tag.startswith(BACKBONE_TAG):
        return config
    return replace(config, pretrained=False, pretrained_backbone='default')


def check_model_name(name: str) -> None:
    """Raise an InputError if a name is not that of a registered SHIKE model."""
    known = timm.list_models(module='registry')
    if get_arch_name(name) not in known:
        raise InputError(
            f"model '{name}' is not a SHIKE model{nearest(name, known)}: choose one of {', '.join(known)}.")


def create_model(
        config: ModelConfig, num_classes: int, in_chans: int = 3, fresh: bool = False,
        img_size: Optional[Tuple[int, int]] = None,
) -> Shike:
    """Create the SHIKE model that the options describe. `img_size` matters only to backbones made for one image size.

    A `fresh` model loads the weights of `--pretrained-backbone`. Otherwise the caller loads those of a checkpoint.
    """
    check_model_name(config.model)
    if bool(config.backbone) != (get_arch_name(config.model) == 'shike'):
        raise InputError(
            f"--backbone '{config.backbone}' goes with --model shike, not with '{config.model}': change one of them."
            if config.backbone else '--model shike needs --backbone, the name of a network of timm: add it.')
    if config.freeze_trunk and not config.begins_trained:
        raise InputError('--freeze-trunk would keep random shared stages: add --pretrained-backbone.')
    if config.lora and not config.begins_trained:
        raise InputError('--lora would keep random weights: add --pretrained-backbone.')
    source = True if config.pretrained_backbone == 'default' else config.pretrained_backbone
    depths, num_experts = config.depths, config.num_experts
    if config.levels:
        if 0 not in (config.private_stages, config.private_blocks) or not all(map(_LEVELS.fullmatch, config.levels)):
            raise InputError(
                f"--levels {' '.join(config.levels)} goes with --private-stages 0, expected numbers of stages with + "
                'between them, such as 4+7 5+7 6+7.')
        depths = [[int(stage) for stage in one.split('+')] for one in config.levels]
        num_experts = num_experts or len(depths)
    options = dict(
        num_classes=num_classes, in_chans=in_chans, img_size=img_size, num_experts=num_experts, depths=depths,
        fusion=config.fusion if config.fusion is False else config.fusion_type, backbone=config.backbone,
        private_stages=config.private_stages, private_blocks=config.private_blocks, classifier=config.classifier,
        cosine_scale=config.cosine_scale, aligner=config.aligner, drop_rate=config.drop,
        drop_path_rate=config.drop_path)
    twice = next((name for name in config.model_kwargs if name in options), None)
    if twice:
        raise InputError(f'--model-kwargs {twice} has an option of its own: give that instead.')
    try:
        model = cast(Shike, timm.create_model(config.model, **options, **config.model_kwargs))
        if source and fresh:
            model.load_backbone(source)
        elif source:
            # The checkpoint was trained from these weights, so it uses their preprocessing.
            model.set_preprocessing(source)
    except (ValueError, RuntimeError, OSError) as error:  # Errors of the Hub are OSErrors.
        raise InputError(f"model '{config.model}' cannot be made: {one_line(error)}.") from error
    if fresh and '.' in config.model and model.pretrained_cfg.get('file') and not config.pretrained:
        raise InputError(
            f"--model '{config.model}' names weights, but training starts from them only with --pretrained: add it, "
            f"or give '{get_arch_name(config.model)}'.")
    model.set_grad_checkpointing(config.grad_checkpointing)
    if config.freeze_trunk:
        model.freeze_trunk()
    return model


def structure(model: Shike) -> Dict[str, Any]:
    """Options with which `create_model` makes trunk and experts like those of this model."""
    made_with = getattr(model, '_made_with', {})
    names = 'backbone', 'private_stages', 'private_blocks', 'aligner'
    found = {name: made_with[name] for name in names if name in made_with}
    found.update(num_experts=model.num_experts)
    if model.classifier_type == 'cosine':
        found.update(cosine_scale=getattr(model.get_classifier(), 'scale', model.cosine_scale))
    if model.has_private_stages:
        found.update(depths=list(model.depths))
        found.update(dict(fusion=False) if model.fusion == 'none' else dict(fusion_type=model.fusion))
    else:
        found.update(levels=['+'.join(map(str, one)) for one in model.depths])
    kwargs = model.backbone_kwargs()
    kwargs.pop('img_size', None)
    if made_with.get('output_stride') is not None:
        kwargs.update(output_stride=made_with['output_stride'])
    found.update(model_kwargs=kwargs)
    return found


def resolve_data_config(config: PreprocessingConfig, model: Shike) -> Dict[str, Any]:
    """timm's preprocessing configuration from the options. Where an option is not given, the model's value is used."""
    for name in ('mean', 'std'):
        values = getattr(config, name)
        if values and len(values) not in (1, model.in_chans):
            raise InputError(f'--{name} has {len(values)} values, expected 1 or {model.in_chans}.')
    given = config.in_chans or config.input_size and config.input_size[0]
    if given and given != model.in_chans:
        raise InputError(f'The model takes images of {model.in_chans} channels, not of {given}: drop --in-chans.')
    own = get_model_input_config(model)
    size = config.image_size or own['input_size'][1:]
    if own['fixed_input_size'] and size != own['input_size'][1:]:
        raise InputError(
            'The model takes images of {1} by {2} pixels, not of {3} by {4}: leave out --img-size.'.format(
                *own['input_size'], *size))
    data_config = timm.data.resolve_data_config(dict(vars(config), in_chans=model.in_chans), model=model)
    data_config['input_size'] = (model.in_chans, *size)
    for name in ('mean', 'std'):  # A model of one channel may have the values of three channels.
        values = data_config[name]
        if len(values) != model.in_chans:
            data_config[name] = (sum(values) / len(values),) * model.in_chans
    return data_config
