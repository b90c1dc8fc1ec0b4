"""The training loop: epochs over a task, with logs, a summary, checkpoints and orderly stops."""
import csv
import logging
import math
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Optional, Set, Tuple

import numpy as np
import torch
from timm.scheduler.scheduler import Scheduler
from timm.task import TrainingTask
from timm.utils import NativeScaler, dispatch_clip_grad, random_seed, update_summary
from timm.utils.summary import trim_summary
from tqdm import tqdm

from .checkpoints import StageSaver
from .methods import Stage
from .metrics import METRICS
from .tasks import TERMS

__all__ = ['Interrupted', 'LoopConfig', 'NonFiniteError', 'StopFlag', 'fit', 'seed_all', 'stop_signals', 'train_step']

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
    """Turn SIGINT and SIGTERM into a flag that the loop reads between steps; a second signal acts at once."""
    flag = StopFlag()
    previous = {}

    def restore() -> None:
        for signum, handler in previous.items():
            signal.signal(signum, handler)

    def handle(signum: int, frame: Any) -> None:
        flag.signum = signum
        restore()

    for signum in (signal.SIGINT, signal.SIGTERM):
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
    """

    seed: int = 42
    log_interval: Optional[int] = None
    val_interval: int = 1
    clip_grad: Optional[float] = None
    clip_mode: str = 'norm'
    autocast: Optional[torch.dtype] = None
    channels_last: bool = False


def seed_all(seed: int, stage: int, epoch: int) -> None:
    """Seed Python, NumPy and torch for an epoch of a stage, so that it does not depend on the epochs before it.

    Epoch -1 stands for the stage's initial values.
    """
    random_seed(int(np.random.SeedSequence((seed, stage, epoch + 1)).generate_state(1)[0]))


def train_step(
        task: TrainingTask,
        images: torch.Tensor,
        target: torch.Tensor,
        optimizer: torch.optim.Optimizer,
        config: LoopConfig,
        loss_scaler: Optional[NativeScaler] = None,
) -> Dict[str, torch.Tensor]:
    """Train on one batch without waiting for the device, unless an optimizer that is not fused meets loss scaling.

    Args:
        task: What to train.
        images: Images [B, C, H, W].
        target: What the task takes as target.
        optimizer: Optimizer of the task's parameters.
        config: Settings.
        loss_scaler: Loss scaling, for float16.

    Returns:
        What the task returns, `loss` among it.
    """
    autocast = torch.autocast(task.device.type, dtype=config.autocast) if config.autocast else nullcontext()
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    with autocast:
        result = task(images.contiguous(memory_format=memory_format), target)
    clipped = task.get_clip_parameters(exclude_head='agc' in config.clip_mode) if config.clip_grad else None
    if loss_scaler is not None:
        loss_scaler(
            result['loss'], optimizer, clip_grad=config.clip_grad, clip_mode=config.clip_mode, parameters=clipped)
    else:
        result['loss'].backward()
        if config.clip_grad:
            dispatch_clip_grad(clipped, config.clip_grad, mode=config.clip_mode)
        optimizer.step()
    optimizer.zero_grad()
    task.update_ema()
    return result


def _train_one_epoch(
        task: TrainingTask,
        loader,
        optimizer: torch.optim.Optimizer,
        stage: Stage,
        config: LoopConfig,
        epoch: int,
        loss_scaler: Optional[NativeScaler],
        stop: StopFlag,
) -> Tuple[Dict[str, Optional[float]], str]:
    """Train for an epoch; gives its means and seconds, and what to tell of it."""
    task.train()
    name = stage.name.replace('_', ' ')
    first_bad_step = torch.full((), -1, dtype=torch.int64, device=task.device)
    sums: Dict[str, torch.Tensor] = {}
    num_steps, num_images, images_since_log, status = len(loader), 0, 0, ''
    lr = max(group['lr'] for group in optimizer.param_groups)  # layer-wise rates are below it
    start = log_start = time.perf_counter()

    def check_finite() -> None:
        step = int(first_bad_step)
        if step >= 0:
            raise NonFiniteError(
                f'The loss is not finite at step {step} of epoch {epoch} of {name}: '
                'try a lower --lr, --clip-grad, or --amp-dtype bfloat16.')

    progress = tqdm(
        loader, desc=f'{name} {epoch}', leave=False, disable=not sys.stderr.isatty(), dynamic_ncols=True)
    for step, (images, target) in enumerate(progress):
        if stop.signum:
            progress.close()
            raise Interrupted(stop.signum)
        result = train_step(task, images, target, optimizer, config, loss_scaler)
        loss = result['loss'].detach()
        first_bad_step = torch.where((first_bad_step < 0) & ~loss.isfinite(), step, first_bad_step)

        batch_size = len(images)
        num_images += batch_size
        images_since_log += batch_size
        for key, value in result.items():
            if key != 'output':
                sums[key] = sums.get(key, 0.) + value.detach() * batch_size

        last = step == num_steps - 1
        if last or step % (config.log_interval or CHECK_INTERVAL) == 0:
            check_finite()
            now = time.perf_counter()
            means = {key: float(value) / num_images for key, value in sums.items()}
            status = (
                f"Loss: {float(loss):#.3g} ({means.pop('loss'):#.3g})  "
                + ''.join(f'{key.upper()}: {value:#.3g}  ' for key, value in means.items())
                + f'Time: {images_since_log / (now - log_start):>7.2f}/s ({num_images / (now - start):>7.2f}/s)  '
                f'LR: {lr:.3e}'
            )
            if last:
                progress.close()
            elif not progress.disable:
                progress.set_postfix_str(status)
            elif config.log_interval:
                done = 100 * (step + 1) / num_steps
                _logger.info(f'Train: {epoch} [{step:>4d}/{num_steps} ({done:>3.0f}%)]  {status}')
            log_start, images_since_log = now, 0
    means = {key: round(float(value) / num_images, 6) for key, value in sums.items()}
    return dict(means, seconds=round(time.perf_counter() - start, 3)), status


def _eval_model(task: TrainingTask, ema: bool = False) -> torch.nn.Module:
    model = task.get_eval_model(ema=ema)
    assert model is not None  # there is none only of an average that the task does not keep
    return model


def _check_weights(task: TrainingTask, stage: Stage, epoch: int) -> None:
    tensors = [t for t in _eval_model(task).state_dict().values() if t.is_floating_point()]
    if not math.isfinite(float(sum(torch._foreach_norm(tensors)))):
        name = stage.name.replace('_', ' ')
        raise NonFiniteError(f'The weights are not finite after epoch {epoch} of {name}: try a lower --lr.')


def _columns(summary: Path) -> Set[str]:
    with summary.open(newline='') if summary.exists() else nullcontext(()) as file:
        return set(next(csv.reader(file), ()))


def _training_seconds(summary: Path, first_row: int) -> float:
    if not summary.exists():
        return 0.
    with summary.open(newline='') as file:
        return sum(float(row['train_seconds']) for row in csv.DictReader(file) if int(row['epoch']) >= first_row)


def fit(
        task: TrainingTask,
        loader,
        optimizer: torch.optim.Optimizer,
        scheduler: Scheduler,
        saver: StageSaver,
        evaluate: Callable[[torch.nn.Module], Dict[str, Any]],
        summary: Path,
        stage: Stage,
        config: LoopConfig,
        start_epoch: int = 0,
        loss_scaler: Optional[NativeScaler] = None,
        stop: Optional[StopFlag] = None,
        track: Callable[[Path], None] = lambda summary: None,
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
        loss_scaler: Loss scaling, for float16.
        stop: Flag that asks the loop to stop.
        track: Called with the summary when it has got a row.

    Returns:
        The metrics of the last epoch and `seconds`, the training time of all epochs, evaluation apart.

    Raises:
        NonFiniteError: If the loss or the weights stop being finite; the last checkpoint is from before.
        Interrupted: If the flag is raised; the last checkpoint is of the last whole epoch.
    """
    stop = stop or StopFlag()
    trim_summary(str(summary), stage.first_row + start_epoch)
    columns = _columns(summary)
    terms = [term for term in TERMS if not columns or f'train_{term}' in columns]  # an older run's has none
    metrics, start = None, time.perf_counter()
    for epoch in range(start_epoch, stage.epochs):
        seed_all(config.seed, stage.number, epoch)
        task.progress = epoch / stage.epochs
        scheduler.step(epoch)
        lr = max(group['lr'] for group in optimizer.param_groups)
        means, status = _train_one_epoch(task, loader, optimizer, stage, config, epoch, loss_scaler, stop)
        _check_weights(task, stage, epoch)
        metrics = None
        if epoch == stage.epochs - 1 or (epoch + 1) % config.val_interval == 0:
            metrics = evaluate(_eval_model(task, ema=task.has_ema()))
            status += '  Eval: ' + '  '.join(f'{key}: {metrics[key]}' for key in METRICS)
        left = (time.perf_counter() - start) / (epoch + 1 - start_epoch) * (stage.epochs - epoch - 1)
        name = stage.name.replace('_', ' ')
        _logger.info(f'Train: {epoch} of {stage.epochs} in {name}, {timedelta(seconds=round(left))} left  {status}')
        update_summary(
            stage.first_row + epoch,
            {key: means.get(key) for key in ('loss', 'seconds', *terms)},
            {key: metrics[key] if metrics else None for key in METRICS},
            str(summary),
            lr=lr,
        )
        track(summary)
        saver.save_checkpoint(epoch)
    if metrics is None:
        metrics = evaluate(_eval_model(task, ema=task.has_ema()))
    return dict(metrics, seconds=round(_training_seconds(summary, stage.first_row), 1))
