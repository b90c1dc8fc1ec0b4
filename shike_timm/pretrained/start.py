"""A trained model as the start of training."""
import logging
from dataclasses import replace
from pathlib import Path
from typing import Optional, Sequence

from ..checkpoints import load_weights
from ..data.config import PreprocessingConfig
from ..errors import InputError
from ..models import Shike
from ..models.config import ModelConfig
from ..models.create import is_registered, resolve_data_config, structure
from ..options import checked
from .load import TrainedModel, load_trained_model

_logger = logging.getLogger(__name__)


def load_start(config: ModelConfig, preprocessing: PreprocessingConfig) -> Optional[TrainedModel]:
    """Load the model that `--initial-checkpoint` or `--pretrained` names, with the options to train it with."""
    name = config.initial_checkpoint or (config.model if config.pretrained else None)
    given = [key for key in ('initial_checkpoint', 'pretrained', 'pretrained_backbone') if getattr(config, key)]
    if len(given) > 1:
        flags = ' and '.join(f"--{key.replace('_', '-')}" for key in given)
        raise InputError(f'{flags} both bring weights to start from: drop one of them.')
    if name is None:
        return None
    if config.initial_checkpoint and ':' not in name and not Path(name).exists() and not is_registered(name):
        raise InputError(
            f"--initial-checkpoint '{name}' does not exist: give a file, a run folder, local-dir:FOLDER or "
            'hf-hub:USER/NAME.')
    trained = load_trained_model(name, pretrained=True, described=config, in_chans=preprocessing.channels)
    if not trained.options:  # The checkpoint holds weights alone.
        return trained
    own = checked(PreprocessingConfig, trained.options)
    options = dict(vars(own), **resolve_data_config(own, trained.model), img_size=None, in_chans=None)
    del options['crop_mode']  # No option of training sets crop_mode.
    if preprocessing.img_size or preprocessing.input_size or preprocessing.in_chans:
        options['input_size'] = None
    found, fusion = structure(trained.model), trained.model.fusion
    found['model_kwargs'].update(config.model_kwargs)
    if config.model != 'shike':
        found.pop('backbone', None)  # It belongs to the name of the model.
    if config.classifier == 'linear':
        found.pop('cosine_scale', None)
    if config.depths:
        found.pop('levels', None)
    options.update(found)
    if fusion != 'none' and config.fusion_type not in (None, fusion):
        raise InputError(f"--fusion-type {config.fusion_type} differs from that of '{name}', {fusion}: leave it out.")
    options = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in options.items() if value is not None}
    return replace(trained, name=name, options=options)


def start_from(model: Shike, start: TrainedModel, class_names: Sequence[str]) -> bool:
    """Load weights of a trained model into a new model. If the classes are equal, classifiers match by name.

    Returns whether the classifiers were loaded too.
    """
    own, weights, names = model.state_dict(), start.model.state_dict(), start.class_names
    head = {key: value for key, value in own.items() if key.startswith('classifier.')}
    loaded = [key for key in weights if key.startswith('classifier.')]
    differ = sorted(set(names or class_names) ^ set(class_names))
    shapes = {key: weights[key].shape for key in loaded}
    kept = not differ and shapes == {key: value.shape for key, value in head.items()}
    if not kept:
        why = f"only one of the models has the class '{differ[0]}'" if differ else 'they are of another kind or shape'
        _logger.warning(f"The classifiers of '{start.name}' are left out, since {why}: training begins with new ones.")
        weights = {key: value for key, value in weights.items() if key not in loaded}
        weights.update(head)
    elif names:
        places = [names.index(name) for name in class_names]
        weights.update({key: weights[key][:, places] for key in loaded})
    load_weights(model, weights, start.name)
    scale = start.model.cosine_scale
    if kept and scale != model.cosine_scale:
        _logger.warning(
            f"The classifiers of '{start.name}' were trained at a cosine scale of {scale:g} and go on at "
            f'{model.cosine_scale:g}: give --cosine-scale {scale:g} to keep theirs.')
    return kept
