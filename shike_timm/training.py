"""Runs: data, model, both stages and the run folder, put together from parsed arguments."""
import argparse
import difflib
import json
import logging
import os
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import timm
import torch
import yaml
from timm.data import resolve_data_config
from timm.models import safe_model_name
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import NativeScaler
from torch import nn

from .checkpoints import StageSaver, export_model, load_checkpoint, load_weights, model_weights
from .data import TrainingData, create_eval_dataset, create_eval_loader, create_train_loader, load_training_data
from .engine import Interrupted, LoopConfig, NonFiniteError, StopFlag, fit, seed_all, stop_signals
from .errors import InputError
from .evaluation import evaluate, format_table
from .hparams import run_folder
from .models import Shike
from .tasks import ClassifierRetrainingTask, RepresentationTask

__all__ = ['create_schedule', 'evaluate_model', 'retrain', 'saved_args', 'train']

_logger = logging.getLogger(__name__)

STAGES = ('stage_one', 'stage_two')
CRT_PREFIX = 'crt_'


def create_schedule(
        optimizer: torch.optim.Optimizer,
        args: argparse.Namespace,
        stage: int,
) -> Scheduler:
    """timm's scheduler of a stage: a linear warm-up, then the schedule over the epochs that remain.

    Args:
        optimizer: Optimizer whose learning rate is the stage's peak.
        args: Arguments of train.py.
        stage: 1 or 2; stage two reads the options that begin with `crt`.
    """
    prefix = CRT_PREFIX if stage == 2 else ''
    epochs, warmup_epochs = getattr(args, prefix + 'epochs'), getattr(args, prefix + 'warmup_epochs')
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=args.sched,
        num_epochs=epochs - warmup_epochs,
        warmup_epochs=warmup_epochs,
        warmup_lr=getattr(args, prefix + 'warmup_lr'),
        warmup_prefix=True,
        min_lr=args.min_lr,
        decay_epochs=args.decay_epochs,
        decay_rate=args.decay_rate,
    )
    return scheduler


def _resolve_device(name: Optional[str]) -> torch.device:
    name = name or ('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device '{name}' cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def _resolve_autocast(args: argparse.Namespace, device: torch.device) -> Optional[torch.dtype]:
    if not args.amp:
        return None
    name = args.amp_dtype or ('float16' if device.type == 'cuda' else 'bfloat16')
    if name == 'float16' and device.type != 'cuda':
        raise InputError(
            f"--amp-dtype float16 needs loss scaling on CUDA, and the device is '{device.type}': use bfloat16.")
    return getattr(torch, name)


def _create_model(args: argparse.Namespace, num_classes: int) -> Shike:
    known = [name for name in timm.list_models(module='shike')]
    if timm.models.get_arch_name(args.model) not in known:
        nearest = difflib.get_close_matches(args.model, known, n=1, cutoff=0)[0]
        raise InputError(f"model '{args.model}' is not a SHIKE model, the nearest one is '{nearest}'.")
    try:
        return timm.create_model(
            args.model,
            num_classes=num_classes,
            num_experts=args.num_experts,
            depths=args.depths,
            fusion=args.fusion,
            classifier=args.classifier,
            aligner=args.aligner,
            drop_rate=args.drop,
        )
    except ValueError as error:
        raise InputError(f"model '{args.model}': {error}") from error


def _load_data(args: argparse.Namespace) -> TrainingData:
    data = load_training_data(
        args.dataset,
        args.data_dir,
        train_split=args.train_split,
        val_split=args.val_split,
        imb_factor=args.imb_factor,
        imb_type=args.imb_type,
        download=args.dataset_download,
    )
    if args.num_classes is not None and args.num_classes != data.num_classes:
        raise InputError(
            f'--num-classes {args.num_classes} contradicts the data, which has {data.num_classes} classes: leave it out.')
    return data


def _mixup_options(args: argparse.Namespace, num_classes: int, stages: Sequence[int]) -> Optional[Dict[str, Any]]:
    if not (args.mixup or args.cutmix):
        return None
    flag = f'--mixup {args.mixup:g}' if args.mixup else f'--cutmix {args.cutmix:g}'
    if args.alpha and 1 in stages:
        raise InputError(
            f'{flag} mixes labels, but dynamic knowledge transfer leaves one target class out: drop it, or add --alpha 0.')
    if args.batch_size % 2:
        raise InputError(f'{flag} pairs images, but --batch-size {args.batch_size} is odd: choose an even one.')
    return dict(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=0.,
        num_classes=num_classes,
    )


@dataclass
class _Run:
    """What both stages of a run share, made and checked before anything is written."""

    args: argparse.Namespace
    device: torch.device
    autocast: Optional[torch.dtype]
    data: TrainingData
    data_config: Dict[str, Any]
    model: Shike
    train_loader: Any
    test_loader: Any

    def evaluate(self, model: nn.Module) -> Dict[str, Any]:
        return evaluate(model, self.test_loader, self.data.class_counts, self.device)


def _prepare(args: argparse.Namespace, stages: Sequence[int]) -> _Run:
    if int(os.environ.get('WORLD_SIZE', 1)) > 1:
        raise InputError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but training runs in one process: start it without torchrun.")
    device = _resolve_device(args.device)
    autocast = _resolve_autocast(args, device)
    data = _load_data(args)
    seed_all(args.seed, 1, -1)
    model = _create_model(args, data.num_classes).to(device)
    data_config = resolve_data_config(vars(args), model=model)
    train_loader = create_train_loader(
        data.train,
        data_config,
        args.batch_size,
        device,
        args.workers,
        mixup=_mixup_options(args, data.num_classes, stages),
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        train_crop_mode=args.train_crop_mode,
        auto_augment=args.aa,
        cutout=args.cutout,
        no_aug=args.no_aug,
        scale=args.scale,
        ratio=args.ratio,
        hflip=args.hflip,
        vflip=args.vflip,
        color_jitter=args.color_jitter,
        interpolation=args.train_interpolation,
    )
    test_loader = create_eval_loader(data.test, data_config, args.validation_batch_size, device, args.workers)
    return _Run(args, device, autocast, data, data_config, model, train_loader, test_loader)


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + '.tmp')
    temporary.write_text(text)
    temporary.replace(path)


def _create_run_folder(args: argparse.Namespace, resumed: bool) -> Path:
    folder = Path(args.output, args.experiment)
    try:
        if not resumed and folder.exists() and any(folder.iterdir()):
            raise InputError(
                f"output folder '{folder}' already holds a run: go on with it by --resume, or choose another --experiment.")
        folder.mkdir(parents=True, exist_ok=True)
        values = {key: value for key, value in vars(args).items() if key not in ('hparams', 'resume', 'checkpoint')}
        _write_text(folder / 'args.yaml', yaml.safe_dump(values))
    except OSError as error:
        raise InputError(f"output folder '{folder}' cannot be written ({error.strerror}): choose another --output.") from error
    return folder


def _default_experiment(args: argparse.Namespace) -> str:
    return '-'.join([datetime.now().strftime('%Y%m%d-%H%M%S'), safe_model_name(args.model), args.dataset or 'folder'])


def _run_stage(
        run: _Run,
        stage: int,
        folder: Path,
        stop: StopFlag,
        checkpoint: Optional[Dict[str, Any]] = None,
) -> Dict[str, Any]:
    """Run a stage from its start, or from a checkpoint of it, and give its metrics; the run's model is left trained."""
    args, model, name = run.args, run.model, STAGES[stage - 1]
    prefix = CRT_PREFIX if stage == 2 else ''
    if stage == 1:
        task = RepresentationTask(model, args.alpha, args.beta, args.detach_teacher, device=run.device)
    else:
        seed_all(args.seed, stage, -1)
        task = ClassifierRetrainingTask(model, run.data.class_counts, device=run.device)
    if args.channels_last:
        task.to(memory_format=torch.channels_last)
    if args.model_ema:
        task.setup_ema(decay=args.model_ema_decay)
    options = dict(optimizer_kwargs(args), lr=getattr(args, prefix + 'lr'))
    try:
        optimizer = create_optimizer_v2(
            model if stage == 1 else model.get_classifier(), **dict(options, **args.opt_kwargs))
    except (ValueError, TypeError, AssertionError) as error:
        raise InputError(f"optimizer '{args.opt}' cannot be made: {error}.") from error
    loss_scaler = NativeScaler(run.device.type) if run.autocast == torch.float16 else None
    start_epoch = 0
    if checkpoint is not None:
        model.load_state_dict(checkpoint['state_dict'])
        if args.model_ema:
            task.get_eval_model(ema=True).load_state_dict(checkpoint.get('state_dict_ema', checkpoint['state_dict']))
        optimizer.load_state_dict(checkpoint['optimizer'])
        if loss_scaler is not None and loss_scaler.state_dict_key in checkpoint:
            loss_scaler.load_state_dict(checkpoint[loss_scaler.state_dict_key])
        start_epoch = checkpoint['epoch'] + 1
        _logger.info(f'Resuming {name} at epoch {start_epoch}.')
    if args.torchcompile:
        task.compile(backend=args.torchcompile)

    (folder / name).mkdir(exist_ok=True)
    saver = StageSaver(
        folder / name,
        model=model,
        optimizer=optimizer,
        args=argparse.Namespace(
            **vars(args), class_counts=run.data.class_counts, class_names=run.data.class_names),
        amp_scaler=loss_scaler,
        task=task,
        max_history=args.checkpoint_hist,
    )
    if checkpoint is None:
        saver.save_initial()
    else:
        saver.load_state_dict(checkpoint['saver'])
    config = LoopConfig(
        name=name.replace('_', ' '),
        epochs=getattr(args, prefix + 'epochs'),
        seed=args.seed,
        stage=stage,
        first_row=args.epochs if stage == 2 else 0,
        log_interval=args.log_interval,
        val_interval=args.val_interval,
        clip_grad=args.clip_grad,
        clip_mode=args.clip_mode,
        autocast=run.autocast,
        channels_last=args.channels_last,
    )
    metrics = fit(
        task,
        run.train_loader,
        optimizer,
        create_schedule(optimizer, args, stage),
        saver,
        run.evaluate,
        folder / 'summary.csv',
        config,
        start_epoch,
        loss_scaler,
        stop,
    )
    if args.model_ema:
        model.load_state_dict(task.get_eval_model(ema=True).state_dict())
    return metrics


def _run_stages(
        run: _Run,
        stages: Sequence[int],
        folder: Path,
        checkpoint: Optional[Dict[str, Any]] = None,
) -> Dict[str, Any]:
    """Run stages in order, the first from a checkpoint if one is given; write metrics and the final model."""
    path = folder / 'metrics.json'
    metrics = json.loads(path.read_text()) if path.exists() else {}
    with stop_signals() as stop:
        try:
            for stage in stages:
                metrics[STAGES[stage - 1]] = _run_stage(run, stage, folder, stop, checkpoint)
                checkpoint = None
                _write_text(path, json.dumps(metrics, indent=2) + '\n')
        except (Interrupted, NonFiniteError):
            _logger.error(f'Checkpoints are in {folder}; go on with --resume {folder}.')
            raise
    export_model(run.model, folder / 'model', run.data_config, run.data.class_names, run.data.class_counts)
    print(format_table(metrics))
    _logger.info(f'Run folder: {folder}')
    return metrics


def _resume_point(args: argparse.Namespace) -> Tuple[int, Optional[Path]]:
    """Stage and checkpoint to go on from; stage one and no checkpoint where nothing was saved yet."""
    folder = Path(run_folder(args))
    first, second = (folder / name / 'last.pth.tar' for name in STAGES)
    if args.resume and os.path.isfile(args.resume):
        path = Path(args.resume)
        if path.parent.name not in STAGES:
            raise InputError(f"checkpoint '{path}' is not in a run folder's {' or '.join(STAGES)}: give the run folder.")
        stage = STAGES.index(path.parent.name) + 1
        if stage == 1 and second.exists():
            raise InputError(f"stage two of '{folder}' has begun, so stage one cannot be resumed: give --resume {folder}.")
        return stage, path
    if second.exists():
        return 2, second
    if first.exists():
        return 1, first
    if args.resume and not (folder / 'args.yaml').exists():
        raise InputError(f"'{args.resume}' holds no run to resume: give the folder of a run or a checkpoint in it.")
    return 1, None


def train(args: argparse.Namespace) -> Dict[str, Any]:
    """Run stage one and, unless `crt_epochs` is 0, stage two.

    Args:
        args: What `shike_timm.hparams.parse_train_args` gives.

    Returns:
        What is written to `metrics.json`: metrics and seconds of `stage_one` and `stage_two`.

    Raises:
        InputError: If anything given cannot work; nothing has been written then.
        Interrupted: If a signal stopped the run.
        NonFiniteError: If the loss or the weights stopped being finite.
    """
    stages = [1, 2] if args.crt_epochs else [1]
    resumed = args.resume is not None
    checkpoint = None
    if resumed:
        folder = Path(run_folder(args))
        args.output, args.experiment = str(folder.parent), folder.name
        stage, path = _resume_point(args)
        stages = stages[stage - 1:]
        checkpoint = load_checkpoint(path) if path else None
    else:
        args.experiment = args.experiment or _default_experiment(args)
    run = _prepare(args, stages)
    if checkpoint is not None:
        load_weights(run.model, checkpoint.get('state_dict', checkpoint), path)
    return _run_stages(run, stages, _create_run_folder(args, resumed), checkpoint)


def _stage_one_checkpoint(path: str) -> Path:
    return Path(path, STAGES[0], 'last.pth.tar') if os.path.isdir(path) else Path(path)


def saved_args(path: str) -> Dict[str, Any]:
    """Arguments that a checkpoint, or the stage one of a run folder, was trained with; empty if it has none."""
    return vars(load_checkpoint(_stage_one_checkpoint(path)).get('args', argparse.Namespace()))


def retrain(args: argparse.Namespace) -> Dict[str, Any]:
    """Run stage two alone, on the trunk and experts of a stage-one checkpoint, into a run folder of its own.

    Args:
        args: What `shike_timm.hparams.parse_retrain_args` gives.

    Returns:
        What is written to `metrics.json`: metrics and seconds of `stage_two`.

    Raises:
        InputError: If anything given cannot work; nothing has been written then.
        Interrupted: If a signal stopped the run.
        NonFiniteError: If the loss or the weights stopped being finite.
    """
    if not args.crt_epochs:
        raise InputError('--crt-epochs 0 leaves nothing to do: give at least 1.')
    path = _stage_one_checkpoint(args.checkpoint)
    weights = model_weights(load_checkpoint(path))
    args.experiment = args.experiment or _default_experiment(args) + '-crt'
    run = _prepare(args, [2])
    load_weights(run.model, weights, path)
    return _run_stages(run, [2], _create_run_folder(args, resumed=False))


def _load_local_counts(name: str) -> Optional[List[int]]:
    config = Path(name.split(':', 1)[1], 'config.json')
    return json.loads(config.read_text()).get('class_counts')


def _load_eval_model(args: argparse.Namespace) -> Tuple[nn.Module, Optional[List[int]], Optional[List[str]]]:
    """Model to evaluate, the class counts and class names it was trained with if it says."""
    if args.checkpoint:
        checkpoint = load_checkpoint(args.checkpoint)
        saved = checkpoint.get('args')
        if not hasattr(saved, 'class_counts'):
            raise InputError(f"checkpoint '{args.checkpoint}' does not say how its model was made: use one of train.py.")
        for key in ('img_size', 'mean', 'std', 'crop_pct'):
            if getattr(args, key) is None:
                setattr(args, key, getattr(saved, key))
        args.interpolation = args.interpolation or saved.interpolation
        model = _create_model(saved, len(saved.class_counts))
        load_weights(model, model_weights(checkpoint), args.checkpoint)
        return model, saved.class_counts, saved.class_names
    local = args.model.startswith('local-dir:')
    try:
        model = timm.create_model(args.model, pretrained=args.pretrained or ':' in args.model)
        counts = _load_local_counts(args.model) if local else None
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(f"model '{args.model}' cannot be loaded: {' '.join(str(error).split())}") from error
    if not isinstance(model, Shike):
        raise InputError(f"model '{args.model}' is a {type(model).__name__}, expected a SHIKE model.")
    return model, counts, model.pretrained_cfg.get('label_names')


def evaluate_model(args: argparse.Namespace) -> Dict[str, Any]:
    """Evaluate a trained model, in float32.

    Args:
        args: What `shike_timm.hparams.parse_eval_args` gives.

    Returns:
        The metrics of `shike_timm.evaluation.evaluate`.

    Raises:
        InputError: If anything given cannot work.
    """
    if bool(args.model) == bool(args.checkpoint):
        raise InputError('Give the model to evaluate, either as --model or as --checkpoint.')
    device = _resolve_device(args.device)
    model, counts, names = _load_eval_model(args)
    if counts is None:
        data = load_training_data(
            args.dataset, args.data_dir, val_split=args.val_split, imb_factor=args.imb_factor, imb_type=args.imb_type,
            download=args.dataset_download)
        dataset, counts = data.test, data.class_counts
    else:
        dataset = create_eval_dataset(args.dataset, args.data_dir, args.val_split, args.dataset_download, names)
    num_classes = len(getattr(dataset, 'classes', counts))
    if len({num_classes, len(counts), model.num_classes}) > 1:
        raise InputError(f'The model has {model.num_classes} classes, but the data has {num_classes}: choose its own data.')
    data_config = resolve_data_config(vars(args), model=model)
    loader = create_eval_loader(dataset, data_config, args.batch_size, device, args.workers)
    metrics = evaluate(model.to(device), loader, counts, device)
    print(format_table({'': metrics}))
    if args.results_file:
        _write_text(Path(args.results_file), json.dumps(metrics, indent=2) + '\n')
    return metrics
