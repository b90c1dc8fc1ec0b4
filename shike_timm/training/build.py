"""From parsed arguments to models, optimizers, schedules, data and settings, each checked with a clear error."""
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


def resolve_autocast(args: LoopConfig, device: torch.device) -> Optional[torch.dtype]:
    """Data type of autocast, None without `--amp`.

    By default it is float16 on CUDA and bfloat16 elsewhere, but None on a CPU without instructions for bfloat16, where
    that takes many times as long as float32.

    Raises:
        InputError: If float16 is asked for where its loss scaling is not supported.
    """
    if not args.amp:
        if args.amp_dtype:
            _logger.warning(f'--amp-dtype {args.amp_dtype} does nothing without --amp: float32 is used.')
        return None
    name = args.amp_dtype or ('float16' if device.type == 'cuda' else 'bfloat16')
    if name == 'bfloat16' and not computes_bfloat16(device):
        if not args.amp_dtype:
            _logger.warning(
                'This CPU is not known to have instructions for bfloat16: float32 is used in spite of --amp.')
            return None
        _logger.warning(
            'This device has no known instructions for bfloat16 and may take many times as long as with '
            f"{'float16' if device.type == 'cuda' else 'float32'}.")
    if name == 'float16' and device.type != 'cuda':
        raise InputError(
            f"--amp-dtype float16 needs loss scaling on CUDA, and the device is '{device.type}': use bfloat16.")
    return getattr(torch, name)


def check_compiler(backend: Optional[str], mode: Optional[str], device: torch.device) -> None:
    """Compile and run one addition, so that what compiling lacks shows before anything is written.

    Raises:
        InputError: If there is no such backend or mode, or a compiler that it needs is missing.
    """
    if mode and not backend:
        raise InputError(f'--torchcompile-mode {mode} goes with --torchcompile, which is not given: add it.')
    if not backend:
        return
    try:
        torch.compile(lambda x: x + 1, backend=backend, mode=mode)(torch.ones(1, device=device))
    except Exception as error:  # each backend has its own
        given = f"--torchcompile '{backend}'" + (f" with --torchcompile-mode '{mode}'" if mode else '')
        reason = one_line(str(error).splitlines()[0])
        raise InputError(f'{given} does not work here ({reason}): mend that, or add --no-torchcompile.') from error


def _takes_fused(args: OptimizerConfig) -> bool:
    """Whether the optimizer has a fused form, one kernel for all parameters, and the user did not choose another."""
    if {'fused', 'foreach'} & set(args.opt_kwargs):
        return False
    try:
        opt_class = get_optimizer_info(args.opt).opt_class
    except ValueError:  # unknown, or a lookahead_ one
        return False
    return inspect.isclass(opt_class) and 'fused' in inspect.signature(opt_class).parameters


def create_optimizer(args: OptimizerConfig, lr: float, model: nn.Module) -> torch.optim.Optimizer:
    """timm's optimizer, fused where it can be.

    Args:
        args: Arguments of train.py.
        lr: Peak learning rate.
        model: Model whose parameters, but for the frozen ones, it updates.

    Raises:
        InputError: If the optimizer is unknown, takes no such option, or needs second derivatives.
    """
    options: Dict[str, Any] = dict(optimizer_kwargs(args), lr=lr)
    if _takes_fused(args):
        options['fused'] = True
    try:
        # What stage two froze gets no gradient, so that the optimizer leaves it alone.
        optimizer = create_optimizer_v2(model, **{**options, **args.opt_kwargs})
    except (ValueError, TypeError, AssertionError, RuntimeError) as error:
        raise InputError(f"optimizer '{args.opt}' cannot be made: {error}") from error
    if getattr(optimizer, 'is_second_order', False):
        raise InputError(f"optimizer '{args.opt}' needs second derivatives, which are not taken here: choose another.")
    if isinstance(optimizer, torch.optim.SGD) and 'fused' in options:
        # Fused SGD leaves its first momentum unset where loss scaling skips the first step.
        for group in optimizer.param_groups:
            for parameter in group['params'] if group['momentum'] and not group['dampening'] else ():
                if parameter.requires_grad:
                    optimizer.state[parameter]['momentum_buffer'] = torch.zeros_like(parameter)
    return optimizer


def create_schedule(optimizer: torch.optim.Optimizer, args: ScheduleConfig, phase: Phase) -> Scheduler:
    """timm's scheduler of a stage: a linear warm-up, then the schedule over the epochs that remain.

    Args:
        optimizer: Optimizer whose learning rate is the stage's peak.
        args: Arguments of train.py.
        stage: The stage.
    """
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=args.sched,
        num_epochs=phase.epochs - phase.warmup_epochs,
        warmup_epochs=phase.warmup_epochs,
        warmup_lr=phase.warmup_lr,
        warmup_prefix=True,
        min_lr=args.min_lr,
        decay_epochs=args.decay_epochs,
        decay_rate=args.decay_rate,
    )
    assert scheduler is not None  # there is none only of a name that is not among the choices
    return scheduler
