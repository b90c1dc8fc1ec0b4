"""Trained models by name or by checkpoint, with what is known of the data they were trained on."""
import argparse
import json
import logging
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, cast

import timm
import torch
from huggingface_hub import hf_hub_download
from timm.models import get_arch_name, parse_model_name
from timm.task import DistillationTeacher
from torch import Tensor

from ..checkpoints import load_checkpoint, load_weights, model_weights
from ..data import TrainingData
from ..data.config import PreprocessingConfig
from ..errors import InputError, one_line
from ..models import Shike
from ..models.authors import is_authors_layout, num_classes_and_experts
from ..options import Config, checked, option, options
from ..training.build import create_model, resolve_data_config
from ..training.config import TrainConfig

__all__ = [
    'CONFIG', 'WEIGHTS', 'Start', 'TrainedModel', 'find_model', 'is_registered', 'load_start', 'load_teacher',
    'load_trained_model', 'set_target_prior', 'start_from', 'with_data_args',
]

_logger = logging.getLogger(__name__)

WEIGHTS, CONFIG = 'model.safetensors', 'config.json'


@dataclass(frozen=True)
class TrainedModelConfig:
    """Trained model."""

    model: Optional[str] = option(
        None,
        'run folder, model folder, hf-hub:USER/NAME, or a registered name; for predict also an exported ONNX file')
    pretrained: bool = option(False, "load a registered name's published weights, as eval and predict always do")
    checkpoint: Optional[str] = option(None, "checkpoint of shike train, or of the authors' CIFAR code", 'FILE')
    authors_classifiers: str = option(
        'rt_classifiers',
        "which of the two sets in a checkpoint of the authors' code: the retrained ones or those of stage one",
        choices=('rt_classifiers', 'classifiers'))
    experts: Optional[List[int]] = option(None, 'experts to keep, counted from 0', nargs='+')
    target_prior: Optional[str] = option(
        None, 'frequencies of the classes to answer for: uniform, train (those of the training set), or a JSON file of '
        "them; the model's own choice by default", 'uniform|train|FILE')


@dataclass
class TrainedModel:
    """A trained model and what is known of its data.

    Attributes:
        model: The model.
        class_counts: Training images of each class, None where the source does not say.
        class_names: Names of the classes in label order, None where the source does not say.
        shot_counts: Images of each class that make the shot divisions, None likewise.
        run_folder: Run that it is of, None where that is not known.
        data_args: Preprocessing options the model was trained with that differ from its configuration.
    """

    model: Shike
    class_counts: Optional[List[int]] = None
    class_names: Optional[List[str]] = None
    shot_counts: Optional[List[int]] = None
    run_folder: Optional[str] = None
    data_args: Dict[str, Any] = field(default_factory=dict)


def is_registered(name: str) -> bool:
    """Whether a model is one of the registered names, with or without a tag."""
    return ':' not in name and get_arch_name(name) in timm.list_models(module='registry')


def find_model(path: str) -> Path:
    """The model folder of a run folder, or the model folder itself.

    Raises:
        InputError: If there is no model.
    """
    for folder in (Path(path), Path(path, 'model')):
        if (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file():
            return folder
    raise InputError(
        f"'{path}' holds no model, {CONFIG} and {WEIGHTS}: give the run folder of a finished training, or the model "
        'folder in it.')


def _read_config(name: str, weights: Optional[str]) -> Dict[str, Any]:
    """The config.json of a saved model, which lies beside the weights of a registered name."""
    source, model_id = parse_model_name(name)
    if source == 'local-dir':
        path = Path(model_id, 'config.json')
    elif source == 'hf-hub':
        repo_id, _, revision = model_id.partition('@')
        path = Path(hf_hub_download(repo_id, 'config.json', revision=revision or None))
    else:
        path = Path(weights or '').with_name('config.json')
    return json.loads(path.read_text())


def _load_by_name(name: str, pretrained: bool) -> TrainedModel:
    saved, config = ':' in name or pretrained and is_registered(name), {}
    try:
        model = timm.create_model(name, pretrained=saved)
        if saved and isinstance(model, Shike):
            config = _read_config(name, model.pretrained_cfg.get('file'))
    except Exception as error:  # whatever a damaged folder makes timm, torch or safetensors raise
        raise InputError(f"model '{name}' cannot be loaded: {one_line(error)}.") from error
    if not isinstance(model, Shike):
        raise InputError(f"model '{name}' is a {type(model).__name__}, expected a SHIKE model.")
    counts = config.get('class_counts')
    if model.class_counts is None and counts:
        model.set_training_prior(counts)
    return TrainedModel(
        model, counts, config.get('label_names'), config.get('shot_counts', counts),
        str(Path(name.partition(':')[2]).absolute().parent) if name.startswith('local-dir:') else None,
        {name: config.get(name) for name in ('exif', 'pixel_range')})


def _load_authors(weights: Dict[str, Tensor], classifiers: str) -> TrainedModel:
    num_classes, num_experts = num_classes_and_experts(weights)
    model = cast(Shike, timm.create_model(
        'resnet32_shike', num_classes=num_classes, num_experts=num_experts, authors_classifiers=classifiers))
    model.load_state_dict(weights)
    model.set_training_prior(None, 'uniform' if classifiers == 'rt_classifiers' else 'train')
    return TrainedModel(model)


def _load_checkpoint(path: str, authors_classifiers: str) -> TrainedModel:
    checkpoint = load_checkpoint(path)
    weights = model_weights(checkpoint, path)
    if is_authors_layout(weights):
        return _load_authors(weights, authors_classifiers)
    saved = checkpoint.get('args')
    if not isinstance(saved, argparse.Namespace) or not hasattr(saved, 'class_counts'):
        raise InputError(f"checkpoint '{path}' does not say what model it is of: use one of train.py.")
    # What an older version did not know of has its default.
    config = checked(TrainConfig, vars(saved))
    if config.classifier != 'linear':  # of the stage that it was saved in
        config = replace(config, cosine_scale=getattr(saved, 'classifier_scale', None))
    model = create_model(config, len(saved.class_counts))
    load_weights(model, weights, path)
    model.set_training_prior(saved.class_counts, getattr(saved, 'classifier_prior', None))
    data_args = {name: getattr(config, name) for name in options(PreprocessingConfig)}
    return TrainedModel(
        model, saved.class_counts, saved.class_names, getattr(saved, 'shot_counts', saved.class_counts),
        str(Path(path).absolute().parent.parent), data_args)


def with_data_args(args: Config, trained: TrainedModel) -> Config:
    """Arguments with the preprocessing that the model was trained with, where they do not say another."""
    sizes = ('img_size', 'input_size')
    sized = any(getattr(args, key) for key in sizes)
    return replace(args, **{
        key: value for key, value in trained.data_args.items()
        if getattr(args, key) is None and not (sized and key in sizes)})


def set_target_prior(trained: TrainedModel, prior: Optional[str]) -> None:
    """Set the prior that `--target-prior` names.

    Args:
        trained: The model.
        prior: 'uniform', 'train', or a JSON file: numbers in label order, as a list or as timm's class statistics, or
            by the names of the classes. None leaves the model as it is.

    Raises:
        InputError: If the file cannot be read or does not fit, or what the model was trained on is not known.
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
                for name in sorted(set(trained.class_names) ^ set(values)):
                    raise ValueError(f"{'the model' if name in values else 'the file'} has no class '{name}'")
                values = [values[name] for name in trained.class_names]
        trained.model.set_target_prior(values)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"--target-prior '{prior}' cannot be used: {one_line(error)}.") from error


def load_trained_model(
        name: Optional[str] = None,
        checkpoint: Optional[str] = None,
        pretrained: bool = False,
        experts: Optional[Sequence[int]] = None,
        authors_classifiers: str = 'rt_classifiers',
) -> TrainedModel:
    """Load a trained model, on the CPU.

    Args:
        name: A registered name, `local-dir:FOLDER`, `hf-hub:USER/NAME`, or the path of a run folder, model folder or
            checkpoint.
        checkpoint: A checkpoint of train.py or of the authors' CIFAR code, instead of a name.
        pretrained: Load the published weights of a registered name.
        experts: Experts to keep, all by default.
        authors_classifiers: Which classifiers to take from a checkpoint of the authors' code: 'rt_classifiers' or
            'classifiers'.

    Raises:
        InputError: If not exactly one of name and checkpoint is given, or it cannot be loaded.
    """
    if bool(name) == bool(checkpoint):
        raise InputError('Give the model, either as --model or as --checkpoint.')
    if name and os.path.exists(name) and not is_registered(name):
        if os.path.isfile(name):
            name, checkpoint = None, name
        else:
            name = f'local-dir:{find_model(name)}'
    trained = _load_by_name(name, pretrained) if name else _load_checkpoint(checkpoint or '', authors_classifiers)
    if experts is not None:
        try:
            trained.model.set_experts(experts)
        except ValueError as error:
            raise InputError(f'--experts: {error}') from error
    return trained


@dataclass
class Start:
    """Weights that training begins with.

    Attributes:
        name: Where they come from.
        weights: State dict of a SHIKE model.
        class_names: Its classes in label order, None where that is not known.
        args: Options that they expect, of preprocessing and the kind of fusion.
        cosine_scale: Scale of its classifiers' cosines, None where it is not known.
    """

    name: str
    weights: Dict[str, Tensor]
    class_names: Optional[List[str]] = None
    args: Dict[str, Any] = field(default_factory=dict)
    cosine_scale: Optional[float] = None


def load_start(args: TrainConfig) -> Optional[Start]:
    """The weights that `--initial-checkpoint` or `--pretrained` names, None without them.

    Raises:
        InputError: If both are given, or the weights cannot be loaded.
    """
    name = args.initial_checkpoint or (args.model if args.pretrained else None)
    given = [key for key in ('initial_checkpoint', 'pretrained', 'pretrained_backbone') if getattr(args, key)]
    if len(given) > 1:
        flags = ' and '.join(f"--{key.replace('_', '-')}" for key in given)
        raise InputError(f'{flags} both bring weights to start from: drop one of them.')
    if name is None:
        return None
    path = Path(name)
    if path.name == WEIGHTS and path.with_name(CONFIG).is_file():
        name = str(path.parent)
    elif path.is_file():
        checkpoint = load_checkpoint(path)
        weights = model_weights(checkpoint, path)
        if not hasattr(checkpoint.get('args'), 'class_counts') and not is_authors_layout(weights):
            return Start(name, weights)  # of the model that the arguments describe, or else it shows when loaded
    elif args.initial_checkpoint and ':' not in name and not path.exists() and not is_registered(name):
        raise InputError(
            f"--initial-checkpoint '{name}' does not exist: give a file, a run folder, local-dir:FOLDER or "
            'hf-hub:USER/NAME.')
    trained = load_trained_model(name, pretrained=True, authors_classifiers='classifiers')
    theirs = with_data_args(PreprocessingConfig(), trained)
    expected = dict(vars(theirs), **resolve_data_config(theirs, trained.model), img_size=None, in_chans=None)
    del expected['crop_mode']  # which no option says
    if args.img_size or args.input_size or args.in_chans:
        expected['input_size'] = None
    if trained.model.fusion != 'none':
        expected['fusion_type'] = trained.model.fusion  # which the weights do not show
        if args.fusion_type not in (None, trained.model.fusion):
            raise InputError(
                f"--fusion-type {args.fusion_type} differs from that of '{name}', {trained.model.fusion}: leave it "
                'out.')
    expected = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in expected.items() if value is not None}
    return Start(name, trained.model.state_dict(), trained.class_names, expected, trained.model.cosine_scale)


def start_from(model: Shike, start: Start, class_names: Sequence[str]) -> None:
    """Give a model the weights to start from, its classifiers by the names of the classes where those are the same.

    Args:
        model: The model.
        start: The weights.
        class_names: The model's classes in label order.

    Raises:
        InputError: If they are of another architecture; the model is left as it was.
    """
    own, weights, names = model.state_dict(), dict(start.weights), start.class_names
    head = {key: value for key, value in own.items() if key.startswith('classifier.')}
    loaded = [key for key in weights if key.startswith('classifier.')]
    differ = sorted(set(names or class_names) ^ set(class_names))
    kept = not differ and all(key in weights and weights[key].shape == value.shape for key, value in head.items())
    if not kept:
        why = f"'{differ[0]}' is a class of one alone" if differ else 'they have another shape'
        _logger.warning(f"The classifiers of '{start.name}' are left out, since {why}: training begins with new ones.")
        weights = {key: value for key, value in weights.items() if key not in loaded}
        weights.update(head)
    elif names:
        places = [names.index(name) for name in class_names]
        weights.update({key: weights[key][:, places] for key in loaded})
    load_weights(model, weights, start.name)
    if kept and start.cosine_scale and start.cosine_scale != model.cosine_scale:
        _logger.warning(
            f"The classifiers of '{start.name}' were trained at a cosine scale of {start.cosine_scale:g} and go on at "
            f'{model.cosine_scale:g}: give --cosine-scale {start.cosine_scale:g} to keep theirs.')


def load_teacher(
        name: str,
        data: TrainingData,
        input_size: Sequence[int],
        device: torch.device,
        held_out: bool = False,
) -> DistillationTeacher:
    """Load the trained model of `--kd-model-name`, of whatever family, to learn from.

    Args:
        name: A registered name, `local-dir:FOLDER` or `hf-hub:USER/NAME`.
        data: The data, for its classes.
        input_size: Channels, height and width of the images.
        device: Where to put the model.
        held_out: Whether images of the training set are kept for evaluation, which it must not have learnt from.

    Raises:
        InputError: If it cannot be loaded, takes no such images, knows other classes, or is not known to have left out
            what is held out.
    """
    try:
        teacher = DistillationTeacher(name, in_chans=input_size[0], device=device)
        if input_size[0] == 1:  # of a teacher for colours
            teacher.mean_kd, teacher.std_kd = (
                value.mean(1, keepdim=True) for value in (teacher.mean_kd, teacher.std_kd))
        with torch.no_grad():
            num_classes = teacher(torch.zeros(1, *input_size, device=device)).shape[-1]
        cfg = getattr(teacher.model, 'pretrained_cfg', {})
        config = _read_config(name, cfg.get('file')) if ':' in name or cfg.get('file') else {}
    except Exception as error:  # whatever a wrong name or a damaged folder makes timm, torch or safetensors raise
        raise InputError(f"--kd-model-name '{name}' cannot teach: {one_line(error)}.") from error
    if num_classes != data.num_classes:
        raise InputError(
            f"--kd-model-name '{name}' knows {num_classes} classes, the data has {data.num_classes}: name a model that "
            'was trained on the same.')
    its, counts = list(cfg.get('label_names') or data.class_names), config.get('class_counts')
    if its != data.class_names:
        strays = [c for c, name in enumerate(its) if name not in data.class_names]
        if strays:
            raise InputError(
                f"--kd-model-name '{name}' calls class {strays[0]} '{its[strays[0]]}', which the data does not have "
                f"('{data.class_names[strays[0]]}' in its place): name a model that was trained on the same classes.")
        places = torch.tensor([its.index(own) for own in data.class_names], device=device)
        teacher.register_forward_hook(lambda module, images, logits: logits[:, places])
        counts = counts and [counts[place] for place in places.tolist()]
    if held_out and counts != list(data.class_counts):
        raise InputError(
            f"--kd-model-name '{name}' may have learnt from the images that --holdout keeps for evaluation: train the "
            'teacher with the same --holdout.')
    return teacher
