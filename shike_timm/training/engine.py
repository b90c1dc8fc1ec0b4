"""The training loop: epochs over a task, with logs, a summary, checkpoints and orderly stops."""
import csv
import logging
import math
import signal
import threading
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Optional, Set, Tuple

import numpy as np
import torch
import torch.distributed as dist
from timm.optim.lookahead import Lookahead
from timm.scheduler.scheduler import Scheduler
from timm.task import TrainingTask
from timm.utils import NativeScaler, dispatch_clip_grad, random_seed, update_summary
from timm.utils.summary import trim_summary
from tqdm import tqdm

from ..checkpoints import StageSaver
from ..data import set_mixup, set_stream_epoch
from ..distributed import Vote, equal_statistics, on_primary, over_processes, rank, world_size
from ..metrics import METRICS
from .methods import Stage
from .tasks import TERMS, ExpertTask

__all__ = [
    'Interrupted', 'LoopConfig', 'NonFiniteError', 'StopFlag', 'eval_model', 'fit', 'seed_all', 'stop_signals',
    'train_step',
]

CHECK_INTERVAL = 50  # steps between looks at the loss, each of which waits for the device

_logger = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """The loss or the weights stopped being finite; the message says where."""


class Interrupted(RuntimeError):
    """A signal asked the run to stop; `signum` says which."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


@dataclass
class StopFlag:
    """The signal that asked for a stop, 0 for none."""

    signum: int = 0


@contextmanager
def stop_signals() -> Iterator[StopFlag]:
    """Turn SIGINT and SIGTERM into a flag that the loop reads between steps; a second signal acts at once.

    Of several processes each may get a signal twice, as one of them and through torchrun: theirs is just the flag. Only
    the main thread can take signals: in another one the flag stays down.
    """
    flag = StopFlag()
    previous = {}

    def restore() -> None:
        for signum, handler in previous.items():
            signal.signal(signum, handler)

    def handle(signum: int, frame: Any) -> None:
        flag.signum = signum
        if world_size() == 1:
            restore()

    main = threading.current_thread() is threading.main_thread()
    for signum in (signal.SIGINT, signal.SIGTERM) if main else ():
        previous[signum] = signal.signal(signum, handle)
    try:
        yield flag
    finally:
        restore()


@dataclass
class LoopConfig:
    """Settings of `fit`.

    Attributes:
        seed: Seed of the run.
        log_interval: Steps between log lines within an epoch, None for none.
        val_interval: Epochs between evaluations; the last epoch is always evaluated.
        clip_grad: Gradient clipping value, None for none.
        clip_mode: timm's clipping mode: 'norm', 'value' or 'agc'.
        autocast: Data type of autocast, None for none.
        channels_last: Lay images out with channels last.
        grad_accum_steps: Batches of an update.
        recovery_interval: Updates after which the middle of an epoch is saved, None for never.
        mixup_off_epoch: Epoch of the run from which on images are not mixed, 0 for none.
        eval_metric: Metric whose best checkpoint is kept too, None for none.
        dist_bn: How processes come to equal statistics of BatchNorm, as in `equal_statistics`.
    """

    seed: int = 42
    log_interval: Optional[int] = None
    val_interval: int = 1
    clip_grad: Optional[float] = None
    clip_mode: str = 'norm'
    autocast: Optional[torch.dtype] = None
    channels_last: bool = False
    grad_accum_steps: int = 1
    recovery_interval: Optional[int] = None
    dist_bn: str = 'reduce'
    mixup_off_epoch: int = 0
    eval_metric: Optional[str] = None


@dataclass
class Done:
    """What is over of an epoch, over all processes.

    Attributes:
        step: Batches of each process.
        num_images: Images.
        seconds: Training time.
        sums: Sums over images of what the task returns.
    """

    step: int = 0
    num_images: int = 0
    seconds: float = 0.
    sums: Dict[str, float] = field(default_factory=dict)


def seed_all(seed: int, stage: int, epoch: int, part: int = 0) -> None:
    """Seed Python, NumPy and torch for an epoch of a stage, so that it does not depend on the epochs before it.

    Epoch -1 stands for the stage's initial values; parts of an epoch and processes have numbers of their own.
    """
    random_seed(int(np.random.SeedSequence((seed, stage, epoch + 1, part)).generate_state(1)[0]))


def train_step(
        task: TrainingTask,
        images: torch.Tensor,
        target: torch.Tensor,
        optimizer: torch.optim.Optimizer,
        config: LoopConfig,
        loss_scaler: Optional[NativeScaler] = None,
        update: bool = True,
        num_updates: Optional[int] = None,
) -> Dict[str, torch.Tensor]:
    """Train on one batch without waiting for the device, unless an optimizer that is not fused meets loss scaling.

    Args:
        task: What to train.
        images: Images [B, C, H, W].
        target: What the task takes as target.
        optimizer: Optimizer of the task's parameters.
        config: Settings.
        loss_scaler: Loss scaling, for float16.
        update: Whether this is the last batch of an update; the gradients of the others are only added up.
        num_updates: Updates of the stage with this one, which the decay of the average depends on.

    Returns:
        What the task returns, `loss` among it.
    """
    autocast = torch.autocast(task.device.type, dtype=config.autocast) if config.autocast else nullcontext()
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    with nullcontext() if update else task.no_sync():
        with autocast:
            result = task(images.contiguous(memory_format=memory_format), target)
        loss = result['loss'] / config.grad_accum_steps
        clipped = task.get_clip_parameters(exclude_head='agc' in config.clip_mode) if config.clip_grad else None
        if loss_scaler is not None:
            loss_scaler(
                loss, optimizer, clip_grad=config.clip_grad, clip_mode=config.clip_mode, parameters=clipped,
                need_update=update)
        else:
            loss.backward()
    if update:
        if loss_scaler is None:
            if config.clip_grad:
                dispatch_clip_grad(clipped, config.clip_grad, mode=config.clip_mode)
            optimizer.step()
        optimizer.zero_grad()
        task.update_ema(num_updates)
    return result


def _bring_together(optimizer: Lookahead) -> None:
    """Take the slow weights of Lookahead for the fast ones, as it does every few updates."""
    for group in optimizer.param_groups:
        for parameter in group['params']:
            parameter.grad = torch.zeros_like(parameter)  # timm leaves out those without
    optimizer.sync_lookahead()
    optimizer.zero_grad()


def _train_part(
        task: TrainingTask,
        loader,
        optimizer: torch.optim.Optimizer,
        stage: Stage,
        config: LoopConfig,
        epoch: int,
        done: Done,
        end: int,
        loss_scaler: Optional[NativeScaler],
        stop: StopFlag,
        vote: Vote,
        progress: tqdm,
) -> Tuple[Done, str]:
    """Train on batches of an epoch that are not done, up to `end`; gives what is done then and what to tell of it."""
    seed_all(config.seed, stage.number, epoch)
    order_seed = int(torch.randint(2 ** 62, ()))
    if hasattr(loader.sampler, 'set_epoch'):  # which a stream's has not
        loader.sampler.set_epoch(order_seed, done.step, end)
    else:
        set_stream_epoch(loader, stage.first_row + epoch, order_seed)
    part = done.step * world_size() + rank()
    if part:
        seed_all(config.seed, stage.number, epoch, part)
    name = stage.name.replace('_', ' ')
    num_steps = len(loader)
    never = torch.full((), num_steps, dtype=torch.int64, device=task.device)
    first_bad_step = never
    sums: Dict[str, torch.Tensor] = {}
    num_images, images_since_log, done_now, status = 0, 0, done, ''
    lr = max(group['lr'] for group in optimizer.param_groups)  # layer-wise rates are below it
    start = log_start = time.perf_counter()

    progress.set_description_str(f'{name} {epoch}', refresh=False)
    for step, (images, target) in enumerate(loader, done.step):
        signum = vote(stop.signum)
        if signum:
            raise Interrupted(signum)
        last = step == end - 1
        update = last or (step + 1) % config.grad_accum_steps == 0  # a stream may end within an update
        num_updates = (epoch * num_steps + step + 1) // config.grad_accum_steps
        result = train_step(task, images, target, optimizer, config, loss_scaler, update, num_updates)
        finite = result['loss'].detach().isfinite()
        # Loss scaling leaves out the update of a loss that overflowed: only one that stays so is an end.
        first_bad_step = torch.where(
            finite, first_bad_step if loss_scaler is None else never, first_bad_step.clamp(max=step))

        batch_size = len(images)
        num_images += batch_size * world_size()
        images_since_log += batch_size * world_size()
        for key, value in result.items():
            if key != 'output':
                sums[key] = sums.get(key, 0.) + torch.where(finite, value.detach() * batch_size, 0.)

        if last or step % (config.log_interval or CHECK_INTERVAL) == 0:
            bad_step = int(over_processes(first_bad_step, dist.ReduceOp.MIN))
            if bad_step < num_steps:
                raise NonFiniteError(
                    f'The loss is not finite at step {bad_step} of epoch {epoch} of {name}: '
                    'try a lower --lr, --clip-grad, or --amp-dtype bfloat16.')
            reduced = over_processes(torch.stack([result['loss'].detach() / world_size(), *sums.values()]))
            loss, *values = reduced.double().tolist()
            now = time.perf_counter()
            done_now = Done(
                step + 1,
                done.num_images + num_images,
                done.seconds + now - start,
                {key: done.sums.get(key, 0.) + value for key, value in zip(sums, values)},
            )
            means = {key: value / done_now.num_images for key, value in done_now.sums.items()}
            status = (
                f"Loss: {loss:#.3g} ({means.pop('loss'):#.3g})  "
                + ''.join(f'{key.upper()}: {value:#.3g}  ' for key, value in means.items())
                + f'Time: {images_since_log / (now - log_start):>7.2f}/s ({num_images / (now - start):>7.2f}/s)  '
                f'LR: {lr:.3e}'
            )
            progress.set_postfix_str(status, refresh=False)
            if config.log_interval and progress.disable and not last:
                share = 100 * (step + 1) / num_steps
                _logger.info(f'Train: {epoch} [{step:>4d}/{num_steps} ({share:>3.0f}%)]  {status}')
            log_start, images_since_log = now, 0
        progress.update()
    return done_now, status


def _train_one_epoch(
        task: TrainingTask,
        loader,
        optimizer: torch.optim.Optimizer,
        stage: Stage,
        config: LoopConfig,
        epoch: int,
        done: Done,
        saver: StageSaver,
        loss_scaler: Optional[NativeScaler],
        stop: StopFlag,
        vote: Vote,
        progress: tqdm,
) -> Tuple[Done, str]:
    """Train on what is left of an epoch, in parts that each seed themselves, so that what is between can be saved.

    Gives what is done then, and what to tell of it.
    """
    num_steps, status = len(loader), ''
    part = (config.recovery_interval or num_steps) * config.grad_accum_steps
    while done.step < num_steps:
        task.train()
        end = min(done.step + part, num_steps)
        done, status = _train_part(
            task, loader, optimizer, stage, config, epoch, done, end, loss_scaler, stop, vote, progress)
        averages = [eval_model(task, ema=True)] if task.has_ema() else []
        equal_statistics(eval_model(task), *averages, mode=config.dist_bn)
        _check_weights(task, stage, epoch)
        if end < num_steps:
            on_primary(saver.save_last, epoch - 1, asdict(done))
    return done, status


def eval_model(task: TrainingTask, ema: bool = False) -> torch.nn.Module:
    """The model that a task evaluates, or with `ema` its moving average, which must be there."""
    model = task.get_eval_model(ema=ema)
    assert model is not None
    return model


def _check_weights(task: TrainingTask, stage: Stage, epoch: int) -> None:
    tensors = [t for t in eval_model(task).state_dict().values() if t.is_floating_point()]
    if not math.isfinite(float(torch.nn.utils.get_total_norm(tensors))):
        name = stage.name.replace('_', ' ')
        raise NonFiniteError(f'The weights are not finite after epoch {epoch} of {name}: try a lower --lr.')


def _evaluate(task: TrainingTask, evaluate: Callable[[torch.nn.Module], Dict[str, Any]]) -> Dict[str, Any]:
    """Metrics of the model, or of its moving average and under `plain` those of the weights as trained."""
    if not task.has_ema():
        return evaluate(eval_model(task))
    return dict(evaluate(eval_model(task, ema=True)), plain=evaluate(eval_model(task)))


def _columns(summary: Path) -> Set[str]:
    with summary.open(newline='') if summary.exists() else nullcontext(()) as file:
        return set(next(csv.reader(file), ()))


def _training_seconds(summary: Path, first_row: int) -> float:
    if not summary.exists():
        return 0.
    with summary.open(newline='') as file:
        return sum(float(row['train_seconds']) for row in csv.DictReader(file) if int(row['epoch']) >= first_row)


def fit(
        task: ExpertTask,
        loader,
        optimizer: torch.optim.Optimizer,
        scheduler: Scheduler,
        saver: StageSaver,
        evaluate: Callable[[torch.nn.Module], Dict[str, Any]],
        summary: Path,
        stage: Stage,
        config: LoopConfig,
        start_epoch: int = 0,
        done: Optional[Done] = None,
        loss_scaler: Optional[NativeScaler] = None,
        stop: Optional[StopFlag] = None,
        track: Callable[[Path], None] = lambda summary: None,
        progress: Optional[tqdm] = None,
) -> Dict[str, Any]:
    """Train a task for its remaining epochs and evaluate it after the last.

    Args:
        task: What to train.
        loader: Training batches.
        optimizer: Optimizer of the task's parameters.
        scheduler: Learning rates, stepped once an epoch.
        saver: Saves a checkpoint after each epoch.
        evaluate: Gives the metrics of a model.
        summary: CSV file that gets a row an epoch.
        stage: What to train with; the share of its epochs that are over is the task's `progress`.
        config: Settings.
        start_epoch: Epoch to start with, counted from 0.
        done: What is over of that epoch.
        loss_scaler: Loss scaling, for float16.
        stop: Flag that asks the loop to stop.
        track: Called with the summary when it has got a row.
        progress: Bar of the run, which moves a step a batch.

    Returns:
        The metrics of the last epoch and `seconds`, the training time of all epochs, evaluation apart.

    Raises:
        NonFiniteError: If the loss or the weights stop being finite; the last checkpoint is from before.
        Interrupted: If the flag is raised in any process; the last checkpoint is of the last whole epoch, or of the
            last update that `recovery_interval` saved.
    """
    stop, done, vote = stop or StopFlag(), done or Done(), Vote()
    progress = tqdm(disable=True) if progress is None else progress
    on_primary(trim_summary, str(summary), stage.first_row + start_epoch)
    columns = _columns(summary)
    terms = [term for term in TERMS if not columns or f'train_{term}' in columns]  # an older run's has none
    metrics, start = None, time.perf_counter()
    for epoch in range(start_epoch, stage.epochs):
        task.progress = epoch / stage.epochs
        scheduler.step(epoch)
        if config.mixup_off_epoch:
            set_mixup(loader, stage.first_row + epoch < config.mixup_off_epoch)
        lr = max(group['lr'] for group in optimizer.param_groups)
        done, status = _train_one_epoch(
            task, loader, optimizer, stage, config, epoch, done, saver, loss_scaler, stop, vote, progress)
        if isinstance(optimizer, Lookahead):
            _bring_together(optimizer)
        means = {key: round(value / done.num_images, 6) for key, value in done.sums.items()}
        trained = {key: means.get(key) for key in ('loss', 'seconds', *terms)}
        trained['seconds'] = round(done.seconds, 3)
        metrics = None
        if epoch == stage.epochs - 1 or (epoch + 1) % config.val_interval == 0:
            on_primary(saver.save_last, epoch - 1, asdict(done))  # since the evaluation may fail
            metrics = _evaluate(task, evaluate)
            status += '  Eval: ' + '  '.join(f'{key}: {metrics[key]}' for key in METRICS)
        left = (time.perf_counter() - start) / (epoch + 1 - start_epoch) * (stage.epochs - epoch - 1)
        name = stage.name.replace('_', ' ')
        _logger.info(f'Train: {epoch} of {stage.epochs} in {name}, {timedelta(seconds=round(left))} left  {status}')
        evaluated = {key: metrics[key] if metrics else None for key in METRICS}
        on_primary(update_summary, stage.first_row + epoch, trained, evaluated, str(summary), lr)
        on_primary(track, summary)
        on_primary(saver.save_epoch, epoch, metrics[config.eval_metric] if metrics and config.eval_metric else None)
        done = Done()
    if metrics is None:
        metrics = _evaluate(task, evaluate)
    return dict(metrics, seconds=round(_training_seconds(summary, stage.first_row), 1))
