"""Whole runs: what their stages share, the stages in order, the folder they leave."""
import argparse
import json
import logging
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Optional, Sequence, Tuple, cast

import torch
import yaml
from timm.layers import convert_sync_batchnorm
from timm.models import safe_model_name
from timm.scheduler.scheduler import Scheduler
from timm.task import DistillationTeacher, TrainingTask
from timm.utils import NativeScaler
from torch import nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..checkpoints import StageSaver, export_model, load_weights, model_weights, write_text
from ..data import TrainingData, create_eval_loader, create_train_loader
from ..devices import tune_device
from ..distributed import join_processes, local_primary_first, on_primary, rank, world_size
from ..errors import InputError, one_line
from ..metrics import SHOTS, balanced_over, evaluate, format_table, shot_divisions
from ..models import Shike
from ..pretrained.load import Start, load_start, load_teacher, start_from
from .build import (
    check_compiler,
    check_sync_bn,
    create_model,
    create_optimizer,
    create_schedule,
    load_data,
    resolve_autocast,
    resolve_data_config,
)
from .config import RetrainConfig, RunConfig, TrainConfig, run_folder
from .engine import Done, Interrupted, LoopConfig, StopFlag, eval_model, fit, seed_all, stop_signals
from .methods import Stage, plan_stages
from .resuming import load_newest, saved_args, warn_of_changes
from .tasks import ExpertTask
from .trackers import check_trackers, tracking

__all__ = [
    'Run', 'compile_task', 'create_loss_scaler', 'create_task', 'loop_config', 'prepare', 'retrain', 'train',
]

_logger = logging.getLogger(__name__)


@dataclass
class Run:
    """What both stages of a run share, made and checked before anything is written."""

    args: RunConfig
    device: torch.device
    autocast: Optional[torch.dtype]
    data: TrainingData
    data_config: Dict[str, Any]
    model: Any
    train_loader: Any
    test_loader: Any
    teacher: Optional[DistillationTeacher] = None

    def evaluate(self, model: Any) -> Dict[str, Any]:
        return evaluate(model, self.test_loader, self.data.shot_counts, self.device, shots=self.args)


def _check_eval_metric(args: RunConfig, data: TrainingData) -> None:
    if args.eval_metric not in SHOTS:
        return
    classes = shot_divisions(data.shot_counts, args)[args.eval_metric]
    if data.test.class_counts:
        classes = classes & (torch.tensor(data.test.class_counts) > 0)
    if not classes.any():
        raise InputError(
            f"--eval-metric {args.eval_metric} is of no class of the data that has images to evaluate on: choose "
            'another.')


def prepare(
        args: RunConfig,
        stages: Sequence[Stage],
        fresh: bool = True,
        class_names: Optional[Sequence[str]] = None,
        run_folder: Optional[Path] = None,
        start: Optional[Start] = None,
) -> Run:
    """Make and check what the stages of a run share; nothing is written.

    Args:
        args: Arguments of train.py; the share that is held out is set in them.
        stages: Stages to come.
        fresh: Whether the model begins here; otherwise a checkpoint brings its weights.
        class_names: Classes in label order of the checkpoint.
        run_folder: Run of the checkpoint.
        start: Weights to begin with.

    Raises:
        InputError: If anything given cannot work.
    """
    check_trackers(args)
    device = join_processes(args.device)
    tune_device(device)
    autocast = resolve_autocast(args, device)
    with local_primary_first():
        data = load_data(args, class_names, run_folder)
    args = replace(args, holdout=data.holdout)
    _check_eval_metric(args, data)
    seed_all(args.seed, 1, -1)
    model = create_model(args, data.num_classes, fresh).to(device)
    if start is not None:
        start_from(model, start, data.class_names)
    if args.recovery_interval and data.train.is_stream:
        raise InputError('--recovery-interval saves the middle of an epoch, where no stream can begin: leave it out.')
    if args.batch_size * world_size() == 1 and any(isinstance(one, nn.BatchNorm2d) for one in model.modules()):
        raise InputError('--batch-size 1 leaves BatchNorm nothing to average over: choose a larger one.')
    if args.sync_bn and world_size() > 1:
        check_sync_bn(device)
        model = cast(Shike, convert_sync_batchnorm(model))
    if any(stage.compiled for stage in stages):
        check_compiler(args.torchcompile, args.torchcompile_mode, device)
    data_config = resolve_data_config(args, model)
    why_not_mixed = next((stage.indices_only for stage in stages if stage.indices_only), None)
    train_loader = create_train_loader(
        data.train, data_config, args, args, device, args.workers, data.num_classes, why_not_mixed)
    test_loader = create_eval_loader(
        data.test, data_config, args.validation_batch_size or args.batch_size, device, args.workers, args.device_data)
    teacher = None
    if args.kd_model_name and args.distill_loss_weight and stages[0].number == 1:
        held_out = bool(args.holdout or args.val_per_class)
        teacher = load_teacher(args.kd_model_name, data, data_config['input_size'], device, held_out)
    return Run(args, device, autocast, data, data_config, model, train_loader, test_loader, teacher)


def create_task(run: Run, stage: Stage) -> ExpertTask:
    """The training task of a stage, in the run's memory layout."""
    args = run.args
    if stage.number > 1:
        seed_all(args.seed, stage.number, -1)  # new classifiers are the same, however the stage is reached
    task = stage.make_task(run)
    if args.channels_last:
        task.to(memory_format=torch.channels_last)
    if args.model_ema:
        task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)
    return task


def compile_task(task: TrainingTask, args: RunConfig, stage: Stage) -> bool:
    """Compile a task where that is asked for and pays, and say whether."""
    if args.torchcompile and stage.compiled:
        task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
        return True
    return False


def create_loss_scaler(run: Run) -> Optional[NativeScaler]:
    """Loss scaling for float16, None for other data types."""
    return NativeScaler(run.device.type) if run.autocast == torch.float16 else None


def loop_config(run: Run) -> LoopConfig:
    """Settings of the training loop."""
    args = run.args
    return LoopConfig(
        seed=args.seed,
        log_interval=args.log_interval,
        val_interval=args.val_interval,
        clip_grad=args.clip_grad or None,
        clip_mode=args.clip_mode,
        autocast=run.autocast,
        channels_last=args.channels_last,
        grad_accum_steps=args.grad_accum_steps,
        recovery_interval=args.recovery_interval,
        dist_bn=args.dist_bn,
        mixup_off_epoch=args.mixup_off_epoch if args.mixup or args.cutmix else 0,
        eval_metric=args.eval_metric,
    )


def _check_run_folder(folder: Path, resumed: bool) -> None:
    if not resumed and folder.is_dir() and any(folder.iterdir()):
        raise InputError(
            f"output folder '{folder}' already holds a run: add --resume to go on, or choose another --experiment.")


def _create_run_folder(folder: Path, args: RunConfig, stage: Stage) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        values = {key: value for key, value in vars(args).items() if key not in ('hparams', 'resume', 'checkpoint')}
        write_text(folder / 'args.yaml', yaml.safe_dump(values))
        (folder / stage.name).mkdir(exist_ok=True)  # which tells a retraining from a run of its start
    except OSError as error:
        raise InputError(
            f"output folder '{folder}' cannot be written ({error.strerror}): choose another --output.") from error


def _default_experiment(args: RunConfig) -> str:
    dataset = (args.dataset or 'folder').replace('/', '_')
    return '-'.join([datetime.now().strftime('%Y%m%d-%H%M%S'), safe_model_name(args.model), dataset])


Parts = Tuple[ExpertTask, torch.optim.Optimizer, Scheduler]


def _make_parts(run: Run, stage: Stage) -> Parts:
    """Task, optimizer and schedule of a stage."""
    task = create_task(run, stage)
    optimizer = create_optimizer(run.args, stage.lr, run.model)
    return task, optimizer, create_schedule(optimizer, run.args, stage)


def _run_stage(
        run: Run,
        stage: Stage,
        parts: Parts,
        folder: Path,
        stop: StopFlag,
        track: Callable[[Path], None],
        progress: tqdm,
        checkpoint: Optional[Dict[str, Any]] = None,
) -> Dict[str, Any]:
    """Run a stage from its start, or from a checkpoint of it, and give its metrics; the run's model is left trained."""
    args, model = run.args, run.model
    task, optimizer, schedule = parts
    loss_scaler = create_loss_scaler(run)
    start_epoch, done = 0, Done()
    if checkpoint is not None:
        model.load_state_dict(checkpoint['state_dict'])
        if args.model_ema:
            eval_model(task, ema=True).load_state_dict(checkpoint.get('state_dict_ema', checkpoint['state_dict']))
        optimizer.load_state_dict(checkpoint['optimizer'])
        if loss_scaler is not None and loss_scaler.state_dict_key in checkpoint:
            loss_scaler.load_state_dict(checkpoint[loss_scaler.state_dict_key])
        start_epoch, done = checkpoint['epoch'] + 1, Done(**checkpoint['saver'].get('done', {}))
        progress.initial = progress.n = start_epoch * len(run.train_loader) + done.step
        _logger.info(f'Resuming {stage.name} at epoch {start_epoch}, step {done.step}.')
    compile_task(task, args, stage)
    images = args.batch_size * world_size() * args.grad_accum_steps
    _logger.info(f'An update of {stage.name} takes {images} images; the learning rate rises to {stage.lr:g}.')
    if world_size() > 1:
        devices = None if run.device.type == 'cpu' else [run.device]
        # Statistics of BatchNorm come together after the epoch, by --dist-bn, and no step need wait for them.
        task.prepare_distributed(device_ids=devices, broadcast_buffers=False)

    model.set_training_prior(run.data.class_counts, stage.prior)
    on_primary(partial((folder / stage.name).mkdir, exist_ok=True))
    saver = StageSaver(
        folder / stage.name,
        model=model,
        optimizer=optimizer,
        args=argparse.Namespace(
            **vars(args),
            world_size=world_size(),
            class_counts=run.data.class_counts,
            class_names=run.data.class_names,
            shot_counts=run.data.shot_counts,
            classifier_prior=stage.prior,
            classifier_scale=model.cosine_scale,
        ),
        amp_scaler=loss_scaler,
        task=task,
        max_history=args.checkpoint_hist,
        decreasing=args.eval_metric in ('loss', 'ece'),
    )
    if checkpoint is None:
        on_primary(saver.save_last, -1)
    else:
        saver.load_state_dict(checkpoint['saver'])
        if getattr(checkpoint['args'], 'eval_metric', None) != args.eval_metric:
            saver.best_metric = None  # which was another's
    metrics = fit(
        task,
        run.train_loader,
        optimizer,
        schedule,
        saver,
        run.evaluate,
        folder / 'summary.csv',
        stage,
        loop_config(run),
        start_epoch,
        done,
        loss_scaler,
        stop,
        track,
        progress,
    )
    if args.model_ema:
        model.load_state_dict(eval_model(task, ema=True).state_dict())
        _logger.info(
            f"The averaged weights of {stage.name} are kept, with top1 {metrics['top1']}; the plain ones have "
            f"{metrics['plain']['top1']}.")
    return metrics


@contextmanager
def _progress_bar(num_steps: int) -> Iterator[tqdm]:
    """A bar of the whole run with the time that is left, below the log lines; on a terminal alone."""
    shown = rank() == 0 and sys.stderr.isatty()
    bar = tqdm(total=num_steps, unit='step', smoothing=0, dynamic_ncols=True, disable=not shown)
    with bar, logging_redirect_tqdm() if shown else nullcontext():
        yield bar


def _run_stages(
        run: Run,
        stages: Sequence[Stage],
        resumed: bool = False,
        checkpoint: Optional[Dict[str, Any]] = None,
) -> Dict[str, Any]:
    """Run stages in order, the first from a checkpoint if one is given; write metrics and the final model."""
    parts = _make_parts(run, stages[0])  # a wrong option shows here, before there is a folder
    folder = Path(run.args.output, run.args.experiment)
    on_primary(_check_run_folder, folder, resumed)
    path = folder / 'metrics.json'
    metrics = json.loads(path.read_text()) if path.exists() else {}
    num_steps = sum(stage.epochs for stage in stages) * len(run.train_loader)
    with stop_signals() as stop, tracking(run.args, folder) as track, _progress_bar(num_steps) as progress:
        on_primary(_create_run_folder, folder, run.args, stages[0])
        _logger.info(run.data.describe())
        on_primary(run.data.write_split_lists, folder)
        try:
            for stage in stages:
                parts = parts or _make_parts(run, stage)
                metrics[stage.name] = _run_stage(run, stage, parts, folder, stop, track, progress, checkpoint)
                parts = checkpoint = None
                on_primary(write_text, path, json.dumps(metrics, indent=2) + '\n')
        except (RuntimeError, OSError) as error:
            if any(folder.glob('*/last.pth.tar')):
                _logger.error(f'The last checkpoint is kept; go on with train.py --resume {folder}')
            if stop.signum and not isinstance(error, Interrupted):
                raise Interrupted(stop.signum) from error  # a loader whose workers got the signal too
            if 'DataLoader worker' in str(error) or isinstance(error, ConnectionError):  # of the pipe from it
                raise OSError(
                    f'A process that loads images is gone, perhaps for want of memory ({one_line(error)}): go on with '
                    'fewer --workers.') from error
            raise
    on_primary(lambda: export_model(
        run.model, folder / 'model', run.data_config, run.data.class_names, run.data.class_counts,
        shot_counts=run.data.shot_counts, exif=run.args.exif, pixel_range=run.args.pixel_range))
    if find_spec('matplotlib') is not None:  # an extra
        from ..report.figures import write_curves
        on_primary(write_curves, folder)
    if rank() == 0:
        print(format_table(metrics))
        _logger.info(balanced_over(metrics[stages[-1].name], run.data.num_classes))
    _logger.info(f'Run folder: {folder}')
    return metrics


def train(args: TrainConfig) -> Dict[str, Any]:
    """Run stage one and, unless `crt_epochs` is 0, stage two.

    Args:
        args: What `shike_timm.cli.train.parse_train_args` gives.

    Returns:
        What is written to `metrics.json`: metrics and seconds of each stage by name, `stage_one` and `stage_two`.

    Raises:
        InputError: If anything given cannot work; nothing has been written then.
        Interrupted: If a signal stopped the run.
        NonFiniteError: If the loss or the weights stopped being finite.
    """
    join_processes(args.device)
    stages = plan_stages(args)
    args = replace(args, crt_epochs=sum(stage.epochs for stage in stages[1:]))
    resumed = args.resume is not None
    checkpoint = path = folder = None
    if resumed:
        folder = Path(run_folder(args) or '')
        args = replace(args, output=str(folder.parent), experiment=folder.name)
        number, path, checkpoint = load_newest(args)
        if number > len(stages):
            raise InputError(f"Stage two of '{folder}' has begun, which --crt-epochs 0 leaves out: drop it.")
        stages = stages[number - 1:]
    else:
        args = replace(args, experiment=args.experiment or _default_experiment(args))
    if args.pretrained_backbone and args.fusion_type is None and checkpoint is None:
        args = replace(args, fusion_type='residual')
    saved = saved_args(checkpoint or {})
    start = load_start(args) if checkpoint is None else None
    if start is not None:
        args = replace(args, **{key: value for key, value in start.args.items() if getattr(args, key) is None})
    run = prepare(args, stages, checkpoint is None, saved.get('class_names'), folder, start)
    if checkpoint is not None:
        load_weights(run.model, checkpoint['state_dict'], path or '')
        warn_of_changes(run.data, saved.get('class_counts'))
    return _run_stages(run, stages, resumed, checkpoint)


def retrain(args: RetrainConfig, checkpoint: Dict[str, Any]) -> Dict[str, Any]:
    """Run stage two alone, on the trunk and experts of stage one, into a run folder of its own.

    Classes are those of stage one, unless `num_classes` says that there are others.

    Args:
        args: Those that `shike_timm.cli.retrain_classifier.parse_retrain_args` gives.
        checkpoint: What `load_stage_one` gives.

    Returns:
        What is written to `metrics.json`: metrics and seconds of `stage_two`.

    Raises:
        InputError: If anything given cannot work; nothing has been written then.
        Interrupted: If a signal stopped the run.
        NonFiniteError: If the loss or the weights stopped being finite.
    """
    join_processes(args.device)
    stage = plan_stages(args, retraining=True)[-1]
    args = replace(args, crt_epochs=stage.epochs)
    saved = saved_args(checkpoint)
    same = args.num_classes == saved.get('num_classes')
    held_out = f'holdout {args.holdout:g}' if args.holdout else ''
    if args.val_per_class:
        held_out = f'val-per-class {args.val_per_class}'
    for key in ('holdout', 'val_per_class', 'dataset', 'imb_factor', 'imb_type') if held_out and same else ():
        if getattr(args, key) != saved.get(key, 0):
            raise InputError(
                f"--{held_out} would evaluate on images that stage one was trained on, since its "
                f"--{key.replace('_', '-')} was {saved.get(key)}, not {getattr(args, key)}: leave it out.")
    fusion, before = (one or 'product' for one in (args.fusion_type, saved.get('fusion_type')))
    if args.fusion is not False and fusion != before:
        raise InputError(f"--fusion-type {fusion} differs from stage one's, {before}: leave it out.")
    weights = model_weights(checkpoint, args.checkpoint)
    args = replace(args, experiment=args.experiment or _default_experiment(args) + '-crt')
    stage_one = Path(args.checkpoint)
    run_of_it = stage_one if stage_one.is_dir() else stage_one.absolute().parent.parent
    run = prepare(args, [stage], False, saved.get('class_names') if same else None, run_of_it if same else None)
    if same:
        load_weights(run.model, weights, args.checkpoint)
    elif set(run.data.class_names) == set(saved.get('class_names') or ()):
        raise InputError(f'--num-classes {args.num_classes} is for other classes than stage one had: leave it out.')
    else:
        start_from(run.model, Start(args.checkpoint, weights, saved.get('class_names')), run.data.class_names)
    return _run_stages(run, [stage])
