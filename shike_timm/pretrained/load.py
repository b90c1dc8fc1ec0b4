"""Loading of trained models by name or from a checkpoint, with what is known about their training."""
import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import timm

from ..checkpoints import CONFIG_FILE, WEIGHTS_FILE, load_checkpoint, load_weights, model_weights, saved_args
from ..data.config import PreprocessingConfig
from ..errors import InputError, one_line
from ..models import Shike
from ..models.config import ModelConfig
from ..models.create import create_model, is_registered
from ..options import Config, check_saved, checked, option
from .folder import check_classes, check_threshold, find_model, read_config


@dataclass(frozen=True)
class TrainedModelConfig:
    """Trained model."""

    model: Optional[str] = option(
        None, 'run folder, model folder, checkpoint, hf-hub:USER/NAME or a registered name. shike predict also takes '
        'an exported ONNX file')
    pretrained: bool = option(
        False, "load the published weights of a registered name. shike eval and shike predict always load them")
    checkpoint: Optional[str] = option(None, 'checkpoint of shike train, in place of --model', 'FILE')
    experts: Optional[List[int]] = option(None, 'experts to keep, counted from 0', nargs='+')
    target_prior: Optional[str] = option(
        None, 'class frequencies to adjust the logits to: uniform, train (the frequencies of the training set), or a '
        "JSON file with one number for each class. By default the model's own prior", 'uniform|train|FILE')


@dataclass
class TrainedModel:
    """A trained model and the known facts of its training. None stands for unknown."""

    name: str  # Name in messages.
    model: Shike
    class_counts: Optional[List[int]] = None  # Training images of each class.
    class_names: Optional[List[str]] = None  # Class names in label order.
    shot_counts: Optional[List[int]] = None  # Images of each class that decide its shot division.
    run_folder: Optional[str] = None  # Run folder of the training.
    reject_threshold: Optional[float] = None  # Probability below which the class of an image is unknown.
    options: Dict[str, Any] = field(default_factory=dict)  # Options of the training that concern the preprocessing.


def _from_name(name: str, pretrained: bool) -> TrainedModel:
    saved = ':' in name or pretrained and is_registered(name)
    try:
        config = read_config(name) if ':' in name else {}
        model = timm.create_model(name, pretrained=saved)
        if saved and isinstance(model, Shike):
            file = model.pretrained_cfg.get('file')
            config = config or (read_config(name, file) if file else {})
            if config.get('num_classes', model.num_classes) != model.num_classes:
                raise ValueError(f"it is of {config['num_classes']} classes and of {model.num_classes}")
    except Exception as error:  # A damaged folder can make timm, torch or safetensors raise nearly any error.
        raise InputError(f"model '{name}' cannot be loaded: {one_line(error)}.") from error
    if not isinstance(model, Shike):
        raise InputError(f"model '{name}' is a {type(model).__name__}, expected a SHIKE model.")
    counts = config.get('class_counts')
    if model.class_counts is None and counts:
        model.set_training_prior(counts)
    run_folder = str(Path(name.partition(':')[2]).absolute().parent) if name.startswith('local-dir:') else None
    return TrainedModel(
        name, model, counts, config.get('label_names'), config.get('shot_counts', counts), run_folder,
        config.get('reject_threshold'), {key: config.get(key) for key in ('exif', 'pixel_range')})


def from_checkpoint(
        checkpoint: Dict[str, Any], path: str, described: Optional[ModelConfig] = None, in_chans: int = 3,
) -> TrainedModel:
    """Create the trained model of a checkpoint that was read from `path`.

    If the checkpoint holds weights alone, `described` and `in_chans` describe the model, except for its classifiers.
    """
    weights, saved = model_weights(checkpoint, path), saved_args(checkpoint)
    if 'class_counts' not in saved:
        if described is None:
            raise InputError(f"checkpoint '{path}' does not say which model it is of: use one of shike train.")
        head = weights.get('classifier.weight')
        linear = 'classifier.bias' in weights
        described = replace(
            described, classifier='linear' if linear else 'cosine',
            cosine_scale=None if linear else described.cosine_scale)
        model = create_model(described, head.shape[1] if head is not None and head.ndim == 3 else 0, in_chans)
        load_weights(model, weights, path)
        return TrainedModel(path, model)
    source, counts, names = f"checkpoint '{path}'", saved['class_counts'], saved.get('class_names')
    shot_counts = saved.get('shot_counts', counts)
    check_classes(source, len(counts) if isinstance(counts, list) else 0, names, counts, shot_counts)
    check_threshold(source, saved.get('reject_threshold'))
    # Options that are missing in checkpoints of older versions get their defaults.
    config = checked(ModelConfig, check_saved(ModelConfig, saved, source))
    preprocessing = checked(PreprocessingConfig, check_saved(PreprocessingConfig, saved, source))
    if config.classifier != 'linear':  # Each phase of training may have its own cosine scale.
        config = replace(config, cosine_scale=saved.get('classifier_scale'))
    try:
        model = create_model(config, len(counts), preprocessing.channels, img_size=preprocessing.image_size)
        load_weights(model, weights, path)
        model.set_training_prior(counts, saved.get('classifier_prior'))
        model.set_temperature(saved.get('temperature', 1.))
    except TypeError as error:
        raise InputError(f'{source} is damaged: {one_line(error)}.') from error
    except ValueError as error:
        raise InputError(str(error)) from error
    return TrainedModel(
        path, model, counts, names, shot_counts, str(Path(path).absolute().parent.parent),
        saved.get('reject_threshold'), vars(preprocessing))


def load_trained_model(
        name: Optional[str] = None, checkpoint: Optional[str] = None, pretrained: bool = False,
        experts: Optional[Sequence[int]] = None, described: Optional[ModelConfig] = None, in_chans: int = 3,
) -> TrainedModel:
    """Load a trained model to the CPU: by a name that `--model` takes, or from a checkpoint, as `from_checkpoint` does.

    `pretrained` loads the published weights of a registered name. `experts` are indices of the experts to keep.
    """
    if bool(name) == bool(checkpoint):
        raise InputError('Give the model, either as --model or as --checkpoint.')
    if name and os.path.exists(name) and not is_registered(name):
        path = Path(name)
        if path.name == WEIGHTS_FILE and path.with_name(CONFIG_FILE).is_file():
            path = path.parent
        if path.is_file():
            name, checkpoint = None, name
        else:
            name = f'local-dir:{find_model(str(path))}'
    if checkpoint:
        trained = from_checkpoint(load_checkpoint(checkpoint), checkpoint, described, in_chans)
    else:
        trained = _from_name(name or '', pretrained)
    if experts is not None:
        try:
            trained.model.set_experts(experts)
            trained.reject_threshold = None  # The threshold was chosen for all experts.
        except ValueError as error:
            raise InputError(f'--experts: {error}') from error
    return trained


def with_trained_options(config: Config, trained: TrainedModel) -> Config:
    """Complete a configuration: options that are not set get the values that the model was trained with."""
    sizes = ('img_size', 'input_size')
    sized = any(getattr(config, key) for key in sizes)
    return replace(config, **{
        key: value for key, value in trained.options.items()
        if key == 'model_kwargs' or getattr(config, key) is None and not (sized and key in sizes)})


def set_target_prior(trained: TrainedModel, prior: Optional[str]) -> None:
    """Set the prior that `--target-prior` names: 'uniform', 'train', a JSON file, or None for the model's own.

    The file holds numbers in label order, as a list or as timm's class statistics, or numbers by class name.
    """
    if prior is None:
        return
    values: Any = prior
    try:
        if prior not in ('uniform', 'train'):
            values = json.loads(Path(prior).read_text(encoding='utf-8'))
            if isinstance(values, dict) and 'pos_counts' in values:
                names, values = values.get('class_names'), values['pos_counts']
                if names and trained.class_names:
                    values = dict(zip(names, values))
            if isinstance(values, dict):
                if not trained.class_names:
                    raise ValueError('it names classes, but the model does not')
                differ = sorted(set(trained.class_names) ^ set(values))
                if differ:
                    lacking = 'the model' if differ[0] in values else 'the file'
                    raise ValueError(f"{lacking} has no class '{differ[0]}'")
                values = [values[name] for name in trained.class_names]
        trained.model.set_target_prior(values)
        trained.reject_threshold = None  # The threshold was chosen for the model's own prior.
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"--target-prior '{prior}' cannot be used: {one_line(error)}.") from error
