"""Whole runs: stage one with classifier retraining, and classifier retraining alone."""
import logging
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, Dict, Optional, Sequence, Tuple, cast

import torch
from timm.layers import convert_sync_batchnorm
from timm.models import safe_model_name
from torch import nn

from ..checkpoints import load_weights, model_weights, saved_args
from ..data import create_eval_loader, create_train_loader, load_training_data
from ..distributed import join_processes, local_primary_first, world_size
from ..errors import InputError, one_line
from ..metrics import SHOTS, shot_divisions
from ..models import Shike
from ..models.create import create_model, resolve_data_config
from ..models.lora import add_lora
from ..pretrained.load import from_checkpoint, with_trained_options
from ..pretrained.plain import PlainModel, create_plain
from ..pretrained.start import load_start, start_from
from ..pretrained.teacher import load_teacher
from .config import RetrainConfig, RunConfig, TrainConfig
from .optimizer import check_compiler
from .phases import Phase, plan_phases
from .resume import read_newest, run_folder
from .step import seed_all
from .trackers import check_trackers
from .trainer import Trainer

_logger = logging.getLogger(__name__)


def train(config: TrainConfig) -> Dict[str, Any]:
    """Train stage one and, unless `crt_epochs` is 0, retrain the classifiers. Returns the content of `metrics.json`.

    Raises an InputError, before anything is written, if an option cannot work; Interrupted if a signal stops the run;
    and a NonFiniteError if the loss or the weights are no longer finite.
    """
    config = replace(config, experiment=config.experiment or default_experiment(config))
    device = join_processes(config.device)
    phases = plan_phases(config)
    config = replace(config, crt_epochs=sum(phase.epochs for phase in phases[1:]))
    checkpoint = folder = None
    if config.resume is not None:
        folder = Path(run_folder(config) or '')
        config = replace(config, output=str(folder.parent), experiment=folder.name)
        number, checkpoint = read_newest(config, folder)
        if number > len(phases):
            raise InputError(f"Stage two of '{folder}' has begun, which --crt-epochs 0 leaves out: drop it.")
        phases = phases[number - 1:]
    if config.pretrained_backbone and config.fusion_type is None and checkpoint is None:
        config = replace(config, fusion_type='residual')
    class_names, start = saved_args(checkpoint or {}).get('class_names'), None
    if checkpoint is None:
        start = load_start(config, config)
        config = with_trained_options(config, start) if start is not None else config
        if start is None and config.exif is None and not config.dataset:  # Benchmarks and old models ignore EXIF.
            config = replace(config, exif=True)
    trainer = prepare(config, phases, device, checkpoint is None, class_names, folder)
    if start is not None and start_from(trainer.model, start, trainer.data.class_names):
        trainer.phases = [replace(phases[0], class_means=False), *phases[1:]]  # The classifiers are trained already.
    if config.lora and not phases[0].is_retraining:
        add_lora(trainer.model, config.lora, trainer.data_config['input_size'])
    return trainer.train(config.resume is not None, checkpoint)


def retrain(config: RetrainConfig, checkpoint: Dict[str, Any]) -> Dict[str, Any]:
    """Retrain the classifiers of a checkpoint of stage one, as `read_stage_one` returns it, in a new run folder.

    The classes are those of stage one unless `num_classes` differs.
    """
    config, phase, device = _plan_retraining(config)
    saved = saved_args(checkpoint)
    same_classes = config.num_classes == saved.get('num_classes')
    _check_retraining(config, saved, same_classes)
    names = saved.get('class_names')
    path = Path(config.checkpoint)
    source = (path if path.is_dir() else path.absolute().parent.parent) if same_classes else None
    trainer = prepare(config, [phase], device, False, names if same_classes else None, source)
    if same_classes:
        load_weights(trainer.model, model_weights(checkpoint, config.checkpoint), config.checkpoint)
    elif set(trainer.data.class_names) == set(names or ()):
        raise InputError(f'--num-classes {config.num_classes} is for other classes than stage one had: leave it out.')
    else:
        start_from(trainer.model, from_checkpoint(checkpoint, config.checkpoint), trainer.data.class_names)
    return trainer.train()


def rebalance(config: RetrainConfig, plain: PlainModel) -> Dict[str, Any]:
    """Retrain the classifier of a plain network, as a model of one expert without fusion, in a new run folder.

    If the network's own classifier has the classes of the data, its metrics are returned and saved as `before`.
    """
    config, phase, device = _plan_retraining(config)
    trainer = prepare(config, [phase], device, False)
    net = create_plain(plain, trainer.model, trainer.data.class_names)
    try:
        trainer.model.load_backbone(plain.weights)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"checkpoint '{plain.name}' cannot be split: {one_line(error)}.") from error
    if trainer.data.holdout:
        _logger.warning(
            f"The images to evaluate on are held out of the training images, but '{plain.name}' may have been trained "
            'on them, so both accuracies may be too high. Give the split that it was evaluated on, if there is one.')
    if net is None:
        _logger.info(f"'{plain.name}' has other classes than the data, so there are no metrics before.")
    else:
        trainer.before['before'] = trainer.evaluate(net.to(device))
    del net
    return trainer.train()


def _plan_retraining(config: RetrainConfig) -> Tuple[RetrainConfig, Phase, torch.device]:
    """Return the phase and the device of a retraining, and its configuration with epochs and run folder filled in."""
    device = join_processes(config.device)
    phase = plan_phases(config, retraining=True)[-1]
    name = config.experiment or f'{default_experiment(config)}-crt'
    return replace(config, crt_epochs=phase.epochs, experiment=name), phase, device


def prepare(
        config: RunConfig, phases: Sequence[Phase], device: torch.device, fresh: bool = True,
        class_names: Optional[Sequence[str]] = None, source: Optional[Path] = None,
) -> Trainer:
    """Load and check everything that the phases of a run need, without writing anything.

    If the model is not `fresh`, the caller loads a checkpoint with these `class_names`, of the run folder `source`.
    """
    check_trackers(config)
    shorter, longer = sorted((config.train_split, config.val_split), key=len)
    if f'{longer}/'.startswith(f'{shorter}/') and not (config.holdout or config.train_list or config.val_list):
        raise InputError(
            f"--val-split '{config.val_split}' has images of --train-split '{config.train_split}': name another one, "
            'or use --holdout.')
    if not all(phase.is_retraining for phase in phases):
        check_compiler(config.torchcompile, config.torchcompile_mode, device)
    data = local_primary_first(lambda: load_training_data(
        config, class_names, source, config.workers, config.batch_size, config.seed))
    if config.num_classes not in (None, data.num_classes):
        raise InputError(
            f'--num-classes {config.num_classes} contradicts the {data.num_classes} classes of the data: leave it out.')
    config = replace(config, holdout=data.holdout)
    share = sys.maxsize if data.train.is_stream else len(data.train) // (world_size() * config.grad_accum_steps)
    if 1 < share < config.batch_size:
        _logger.warning(f'--batch-size {config.batch_size} exceeds the training images: it is lowered to {share}.')
        config = replace(config, batch_size=share)
    if config.eval_metric in SHOTS:
        classes = shot_divisions(data.shot_counts, config)[config.eval_metric]
        if data.test.class_counts:
            classes = classes & (torch.tensor(data.test.class_counts) > 0)
        if not classes.any():
            raise InputError(
                f'No class of the evaluation data is in the division of --eval-metric {config.eval_metric}: choose '
                'another metric.')
    seed_all(config.seed, 1, -1)
    model = create_model(config, data.num_classes, config.channels, fresh, config.image_size).to(device)
    if config.recovery_interval and data.train.is_stream:
        raise InputError('--recovery-interval saves the middle of an epoch, where no stream can begin: leave it out.')
    norms = [one for one in model.modules() if isinstance(one, (nn.BatchNorm1d, nn.BatchNorm2d)) and one.training]
    if config.batch_size * world_size() == 1 and norms:
        raise InputError('--batch-size 1 leaves BatchNorm nothing to average over: choose a larger one.')
    if config.sync_bn and world_size() > 1:
        if device.type == 'cpu':
            raise InputError("--sync-bn needs GPUs, since torch's SyncBatchNorm refuses a CPU: leave it out.")
        model = cast(Shike, convert_sync_batchnorm(model))
    data_config = resolve_data_config(config, model)
    indices_only = next((phase.indices_only for phase in phases if phase.indices_only), None)
    train_loader = create_train_loader(
        data.train, data_config, config, config, device, config.workers, data.num_classes, indices_only)
    eval_loader = create_eval_loader(
        data.test, data_config, config.validation_batch_size or config.batch_size, device, config.workers,
        config.device_data)
    teacher = None
    if config.kd_model_name and config.distill_loss_weight and not phases[0].is_retraining:
        held_out = bool(config.holdout or config.val_per_class)
        teacher = load_teacher(config.kd_model_name, data, data_config['input_size'], device, held_out)
    return Trainer(config, phases, data, data_config, model, train_loader, eval_loader, device, teacher)


def default_experiment(config: RunConfig) -> str:
    """The default name of a run: its time, model and data set."""
    dataset = (config.dataset or 'folder').replace('/', '_')
    return '-'.join([datetime.now().strftime('%Y%m%d-%H%M%S-%f')[:-3], safe_model_name(config.model), dataset])


def _check_retraining(config: RetrainConfig, saved: Dict[str, Any], same_classes: bool) -> None:
    """Check that a retraining evaluates on no training image of stage one, and has the fusion type of stage one."""
    held_out = f'holdout {config.holdout:g}' if config.holdout else ''
    if config.val_per_class:
        held_out = f'val-per-class {config.val_per_class}'
    rules = ('holdout', 'val_per_class', 'dataset', 'imb_factor', 'imb_type') if held_out and same_classes else ()
    for key in rules:
        if getattr(config, key) != saved.get(key, 0):
            raise InputError(
                f"--{held_out} would evaluate on images that stage one was trained on, since its "
                f"--{key.replace('_', '-')} was {saved.get(key)}, not {getattr(config, key)}: leave it out.")
    fusion, before = (one or 'product' for one in (config.fusion_type, saved.get('fusion_type')))
    if config.fusion is not False and fusion != before:
        raise InputError(f"--fusion-type {fusion} differs from stage one's, {before}: leave it out.")
