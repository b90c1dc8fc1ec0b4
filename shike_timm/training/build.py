"""From parsed arguments to models, optimizers, schedules, data and settings, each checked with a clear error."""
import inspect
import logging
from typing import Any, Dict, Optional, Sequence, cast

import timm
import timm.data
import torch
from timm.models import get_arch_name
from timm.optim import create_optimizer_v2, get_optimizer_info, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from ..data import TrainingData, load_training_data
from ..data.config import PreprocessingConfig
from ..data.decode import image_channels
from ..devices import computes_bfloat16
from ..errors import InputError, nearest, one_line
from ..models import Shike
from .config import LoopConfig, OptimizerConfig, RunConfig, ScheduleConfig
from .methods import Stage

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


def check_sync_bn(device: torch.device) -> None:
    """Check that BatchNorm can be synchronised.

    Raises:
        InputError: If torch cannot do so on the device.
    """
    if device.type == 'cpu':
        raise InputError("--sync-bn needs GPUs, since torch's SyncBatchNorm refuses a CPU: leave it out.")


def check_model_name(name: str) -> None:
    """Check that a model is one of the registered SHIKE models.

    Raises:
        InputError: If it is not; the message names the nearest.
    """
    known = timm.list_models(module='registry')
    if get_arch_name(name) not in known:
        raise InputError(
            f"model '{name}' is not a SHIKE model{nearest(name, known)}: choose one of {', '.join(known)}.")


def create_model(args: RunConfig, num_classes: int, fresh: bool = False) -> Shike:
    """The SHIKE model that the arguments describe.

    Args:
        args: Arguments of train.py.
        num_classes: Classes.
        fresh: Load the weights of the backbone that the arguments name; otherwise a checkpoint brings weights.

    Raises:
        InputError: If it is not one of the registered names, or an option of it is out of range.
    """
    check_model_name(args.model)
    if bool(args.backbone) != (get_arch_name(args.model) == 'shike'):
        raise InputError(
            f"--backbone '{args.backbone}' goes with --model shike, not with '{args.model}': change one of them."
            if args.backbone else '--model shike needs --backbone, the name of a network of timm: add it.')
    if args.freeze_trunk and not (args.pretrained_backbone or args.initial_checkpoint or args.pretrained):
        raise InputError('--freeze-trunk would keep random shared stages: add --pretrained-backbone.')
    source = True if args.pretrained_backbone == 'default' else args.pretrained_backbone
    try:
        model = cast(Shike, timm.create_model(
            args.model,
            num_classes=num_classes,
            in_chans=image_channels(args),
            backbone=args.backbone,
            num_experts=args.num_experts,
            private_stages=args.private_stages,
            depths=args.depths,
            fusion=args.fusion if args.fusion is False else args.fusion_type,
            classifier=args.classifier,
            cosine_scale=args.cosine_scale,
            aligner=args.aligner,
            drop_rate=args.drop,
            drop_path_rate=args.drop_path,
        ))
        if source and fresh:
            model.load_backbone(source)
        elif source:
            model.set_preprocessing(source)  # of the weights that those of the checkpoint came from
    except (ValueError, RuntimeError, OSError) as error:  # the Hub's are of the last kind
        raise InputError(f"model '{args.model}' cannot be made: {one_line(error)}.") from error
    if fresh and '.' in args.model and model.pretrained_cfg.get('file') and not args.pretrained:
        raise InputError(
            f"--model '{args.model}' names weights, from which training starts with --pretrained alone: add it, or "
            f"give '{get_arch_name(args.model)}'.")
    model.set_grad_checkpointing(args.grad_checkpointing)
    if args.freeze_trunk:
        model.freeze_trunk()
    return model


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


def resolve_data_config(args: PreprocessingConfig, model: Shike) -> Dict[str, Any]:
    """Preprocessing: the model's own, overridden by the arguments.

    Raises:
        InputError: If there are not as many means or standard deviations as channels.
    """
    for name in ('mean', 'std'):
        values = getattr(args, name)
        if values and len(values) not in (1, model.in_chans):
            raise InputError(f'--{name} has {len(values)} values, expected 1 or {model.in_chans}.')
    given = args.in_chans or args.input_size and args.input_size[0]
    if given and given != model.in_chans:
        raise InputError(f'The model takes images of {model.in_chans} channels, not of {given}: drop --in-chans.')
    config = timm.data.resolve_data_config(dict(vars(args), in_chans=model.in_chans), model=model)
    config['input_size'] = (model.in_chans, *config['input_size'][1:])
    for name in ('mean', 'std'):  # a model of one channel may tell those of three
        if len(config[name]) != model.in_chans:
            config[name] = (sum(config[name]) / len(config[name]),) * model.in_chans
    return config


def load_data(
        args: RunConfig,
        class_names: Optional[Sequence[str]] = None,
        run_folder: Optional[Any] = None,
) -> TrainingData:
    """The data of a run, whose number of classes is checked."""
    data = load_training_data(args, class_names, run_folder, args.workers, args.batch_size, args.seed)
    if args.num_classes is not None and args.num_classes != data.num_classes:
        raise InputError(
            f'--num-classes {args.num_classes} contradicts the {data.num_classes} classes of the data: leave it out.')
    return data


def create_schedule(optimizer: torch.optim.Optimizer, args: ScheduleConfig, stage: Stage) -> Scheduler:
    """timm's scheduler of a stage: a linear warm-up, then the schedule over the epochs that remain.

    Args:
        optimizer: Optimizer whose learning rate is the stage's peak.
        args: Arguments of train.py.
        stage: The stage.
    """
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=args.sched,
        num_epochs=stage.epochs - stage.warmup_epochs,
        warmup_epochs=stage.warmup_epochs,
        warmup_lr=stage.warmup_lr,
        warmup_prefix=True,
        min_lr=args.min_lr,
        decay_epochs=args.decay_epochs,
        decay_rate=args.decay_rate,
    )
    assert scheduler is not None  # there is none only of a name that is not among the choices
    return scheduler
