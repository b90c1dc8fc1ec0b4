"""From parsed arguments to models, optimizers, schedules, data and settings, each checked with a clear error."""
import dataclasses
import inspect
import logging
from typing import Any, Dict, List, Optional, Sequence

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from ..data import DataRequest, ImageSet, TrainingData, create_eval_dataset, load_training_data
from ..data.config import PreprocessingConfig
from ..devices import computes_bfloat16
from ..errors import InputError, one_line
from .config import LoopConfig, OptimizerConfig, RunConfig, ScheduleConfig
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


def image_channels(args: PreprocessingConfig) -> int:
    """Channels of the images that the arguments name.

    Raises:
        InputError: If they contradict each other.
    """
    channels = args.in_chans or (args.input_size or (3,))[0]
    if args.input_size and channels != args.input_size[0]:
        raise InputError(
            f'--in-chans {channels} contradicts the {args.input_size[0]} channels of --input-size: drop one of them.')
    if args.input_size and args.img_size:
        raise InputError(f'--input-size and --img-size {args.img_size} contradict each other: drop one of them.')
    return channels


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


def _data_options(args: RunConfig) -> Dict[str, Any]:
    """Fields of `DataRequest` that the arguments have."""
    names = {field.name for field in dataclasses.fields(DataRequest)} - {'name', 'root', 'in_chans', 'class_names'}
    options = {name: value for name, value in vars(args).items() if name in names}
    return dict(options, download=args.dataset_download)


def load_data(
        args: Any,
        class_names: Optional[Sequence[str]] = None,
        run_folder: Optional[Any] = None,
) -> TrainingData:
    """The data that the arguments name.

    Args:
        args: Arguments of train.py.
        class_names: Classes in label order of what the data is to go on with.
        run_folder: Run that it is to go on with, whose lists part the training set.

    Raises:
        InputError: If it cannot be read, has other classes, or `--num-classes` contradicts it.
    """
    data = load_training_data(
        args.dataset, args.data_dir, **_data_options(args), in_chans=image_channels(args), class_names=class_names,
        sides=run_folder)
    num_classes = getattr(args, 'num_classes', None)
    if num_classes is not None and num_classes != data.num_classes:
        raise InputError(
            f'--num-classes {num_classes} contradicts the {data.num_classes} classes of the data: leave it out.')
    return data


def load_eval_data(
        args: Any,
        class_names: Optional[List[str]],
        in_chans: int = 3,
        run_folder: Optional[Any] = None,
) -> ImageSet:
    """The evaluation split that the arguments name.

    Args:
        args: Arguments of eval.py.
        class_names: The model's classes in label order.
        in_chans: Channels of the model's images.
        run_folder: Run that the model is of.

    Raises:
        InputError: If it cannot be read, or has other classes.
    """
    options = _data_options(args)
    return create_eval_dataset(
        args.dataset, args.data_dir, options.pop('val_split'), options.pop('download'), class_names, **options,
        in_chans=in_chans, sides=run_folder)


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


def mixup_options(args: RunConfig, num_classes: int, phases: Sequence[Phase]) -> Optional[Dict[str, Any]]:
    """Arguments of `timm.data.FastCollateMixup`, None where it is off.

    Raises:
        InputError: If one of the stages needs hard labels, or a batch cannot be paired.
    """
    if not (args.mixup or args.cutmix):
        return None
    flag = f'--mixup {args.mixup:g}' if args.mixup else f'--cutmix {args.cutmix:g}'
    for phase in phases:
        if phase.indices_only:
            raise InputError(f'{flag} mixes labels, but {phase.indices_only}.')
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
