"""Optimizer, schedule, data type and compiler of a run, from its configuration."""
import inspect
import logging
from typing import Any, Dict, Optional

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from ..devices import computes_bfloat16
from ..errors import InputError, one_line
from .config import LoopConfig, OptimizerConfig, ScheduleConfig
from .phases import Phase

_logger = logging.getLogger(__name__)


def resolve_autocast(config: LoopConfig, device: torch.device) -> Optional[torch.dtype]:
    """Data type of autocast, None without `--amp` or where bfloat16 would be far slower than float32."""
    if not config.amp:
        if config.amp_dtype:
            _logger.warning(f'--amp-dtype {config.amp_dtype} does nothing without --amp: float32 is used.')
        return None
    name = config.amp_dtype or ('float16' if device.type == 'cuda' else 'bfloat16')
    if name == 'bfloat16' and not computes_bfloat16(device):
        if not config.amp_dtype:
            _logger.warning(
                'This CPU is not known to have instructions for bfloat16: --amp is ignored, and float32 is used.')
            return None
        _logger.warning(
            'This device has no known instructions for bfloat16 and may take many times as long as with '
            f"{'float16' if device.type == 'cuda' else 'float32'}.")
    if name == 'float16' and device.type != 'cuda':
        raise InputError(
            f"--amp-dtype float16 needs loss scaling on CUDA, and the device is '{device.type}': use bfloat16.")
    return getattr(torch, name)


def check_compiler(backend: Optional[str], mode: Optional[str], device: torch.device) -> None:
    """Compile and run one addition, so that a missing compiler raises an InputError before anything is written."""
    if mode and not backend:
        raise InputError(f'--torchcompile-mode {mode} goes with --torchcompile, which is not given: add it.')
    if not backend:
        return
    try:
        torch.compile(lambda x: x + 1, backend=backend, mode=mode)(torch.ones(1, device=device))
    except Exception as error:  # Each backend raises its own errors.
        given = f"--torchcompile '{backend}'" + (f" with --torchcompile-mode '{mode}'" if mode else '')
        raise InputError(
            f'{given} does not work here ({one_line(error)}): correct that, or add --no-torchcompile.') from error


def _takes_fused(config: OptimizerConfig) -> bool:
    """Whether the optimizer has a fused implementation, and the options choose no other implementation."""
    if {'fused', 'foreach'} & set(config.opt_kwargs):
        return False
    try:
        opt_class = get_optimizer_info(config.opt).opt_class
    except ValueError:  # The name is unknown, or begins with lookahead_.
        return False
    return inspect.isclass(opt_class) and 'fused' in inspect.signature(opt_class).parameters


def create_optimizer(config: OptimizerConfig, lr: float, model: nn.Module) -> torch.optim.Optimizer:
    """Create timm's optimizer for the parameters that are not frozen, in its fused implementation if there is one."""
    options: Dict[str, Any] = dict(optimizer_kwargs(config), lr=lr)
    if _takes_fused(config):
        options['fused'] = True
    try:
        optimizer = create_optimizer_v2(model, **{**options, **config.opt_kwargs})
    except (ValueError, TypeError, AssertionError, RuntimeError) as error:
        raise InputError(f"optimizer '{config.opt}' cannot be made: {error}") from error
    if getattr(optimizer, 'is_second_order', False):
        raise InputError(f"optimizer '{config.opt}' needs second derivatives: choose one that does not.")
    if isinstance(optimizer, torch.optim.SGD) and 'fused' in options:
        # Fused SGD leaves the momentum unset if loss scaling skips the first step.
        for group in optimizer.param_groups:
            for parameter in group['params'] if group['momentum'] and not group['dampening'] else ():
                if parameter.requires_grad:
                    optimizer.state[parameter]['momentum_buffer'] = torch.zeros_like(parameter)
    return optimizer


def create_schedule(optimizer: torch.optim.Optimizer, config: ScheduleConfig, phase: Phase) -> Scheduler:
    """timm's scheduler of a phase: a linear warm-up, then the schedule over the remaining epochs."""
    scheduler, _ = create_scheduler_v2(
        optimizer, sched=config.sched, num_epochs=phase.epochs - phase.warmup_epochs,
        warmup_epochs=phase.warmup_epochs, warmup_lr=phase.warmup_lr, warmup_prefix=True, min_lr=config.min_lr,
        decay_epochs=config.decay_epochs, decay_rate=config.decay_rate)
    assert scheduler is not None  # The name is one of the choices.
    return scheduler
