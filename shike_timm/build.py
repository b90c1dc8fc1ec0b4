"""From parsed arguments to models, optimizers, schedules, data and settings, each checked with a clear error."""
import argparse
import difflib
import importlib.util
import inspect
import logging
import os
import shutil
import sys
from typing import Any, Dict, Optional, Sequence

import timm
import timm.data
import torch
from timm.models import get_arch_name
from timm.optim import create_optimizer_v2, get_optimizer_info, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from .data import TrainingData, load_training_data
from .devices import computes_bfloat16
from .errors import InputError, one_line
from .methods import Stage
from .models import Shike

_logger = logging.getLogger(__name__)


def resolve_autocast(args: argparse.Namespace, device: torch.device) -> Optional[torch.dtype]:
    """Data type of autocast, None without `--amp`.

    By default it is float16 on CUDA and bfloat16 elsewhere, but None on a CPU without instructions for bfloat16, where
    that takes many times as long as float32.

    Raises:
        InputError: If float16 is asked for where its loss scaling is not supported.
    """
    if not args.amp:
        return None
    if not args.amp_dtype and not computes_bfloat16(device):
        _logger.warning('This CPU is not known to have instructions for bfloat16: float32 is used in spite of --amp.')
        return None
    name = args.amp_dtype or ('float16' if device.type == 'cuda' else 'bfloat16')
    if name == 'float16' and device.type != 'cuda':
        raise InputError(
            f"--amp-dtype float16 needs loss scaling on CUDA, and the device is '{device.type}': use bfloat16.")
    return getattr(torch, name)


def check_compiler(backend: Optional[str], mode: Optional[str], device: torch.device) -> None:
    """Check that a model can be compiled, before the first step would find out.

    Raises:
        InputError: If there is no such backend or mode, or the compiler that inductor needs is missing.
    """
    if not backend:
        if mode:
            raise InputError(f'--torchcompile-mode {mode} goes with --torchcompile, which is not given: add it.')
        return
    if backend not in torch.compiler.list_backends(exclude_tags=()):
        raise InputError(f"--torchcompile '{backend}' is not a backend of torch.compile: leave the name out.")
    if mode and backend != 'inductor':
        raise InputError(f"--torchcompile-mode '{mode}' is of inductor, not of '{backend}': leave it out.")
    if mode:
        try:
            torch.compile(nn.Identity(), mode=mode)  # which compiles nothing before a call
        except RuntimeError as error:
            raise InputError(
                f"--torchcompile-mode '{mode}' is unknown to '{backend}': {one_line(error)}.") from error
    if backend != 'inductor':
        return
    if device.type == 'cpu':
        compilers = [os.environ.get('CXX', 'clang++' if sys.platform == 'darwin' else 'g++')]
    else:
        compilers = [os.environ['CC']] if 'CC' in os.environ else ['gcc', 'clang']
    if not any(shutil.which(name) for name in compilers):
        raise InputError(
            f"--torchcompile needs a compiler and there is no '{compilers[0]}': install one or add --no-torchcompile.")
    if device.type == 'cuda' and not importlib.util.find_spec('triton'):
        raise InputError('--torchcompile needs Triton on CUDA: pip install triton, or add --no-torchcompile.')


def check_model_name(name: str) -> None:
    """Check that a model is one of the registered SHIKE models.

    Raises:
        InputError: If it is not; the message names the nearest.
    """
    known = timm.list_models(module='registry')
    if get_arch_name(name) not in known:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
        raise InputError(f"model '{name}' is not a SHIKE model, the nearest one is '{nearest}'.")


def create_model(args: argparse.Namespace, num_classes: int, fresh: bool = False) -> Shike:
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
    if args.freeze_trunk and not args.pretrained_backbone:
        raise InputError('--freeze-trunk would keep random shared stages: add --pretrained-backbone.')
    source = True if args.pretrained_backbone == 'default' else args.pretrained_backbone
    try:
        model = timm.create_model(
            args.model,
            num_classes=num_classes,
            backbone=args.backbone,
            num_experts=args.num_experts,
            depths=args.depths,
            fusion=args.fusion if args.fusion is False else args.fusion_type,
            classifier=args.classifier,
            aligner=args.aligner,
            drop_rate=args.drop,
            drop_path_rate=args.drop_path,
        )
        if source and fresh:
            model.load_backbone(source)
        elif source:
            model.set_preprocessing(source)  # of the weights that those of the checkpoint came from
    except (ValueError, RuntimeError, OSError) as error:  # the Hub's are of the last kind
        raise InputError(f"model '{args.model}' cannot be made: {one_line(error)}.") from error
    if fresh and '.' in args.model and model.pretrained_cfg.get('file'):
        raise InputError(
            f"--model '{args.model}' names weights, from which training does not start: give "
            f"'{get_arch_name(args.model)}'.")
    model.set_grad_checkpointing(args.grad_checkpointing)
    if args.freeze_trunk:
        model.freeze_trunk()
    return model


def _takes_fused(args: argparse.Namespace) -> bool:
    """Whether the optimizer has a fused form, one kernel for all parameters, and the user did not choose another."""
    if {'fused', 'foreach'} & set(args.opt_kwargs):
        return False
    try:
        opt_class = get_optimizer_info(args.opt).opt_class
    except ValueError:  # unknown, or a lookahead_ one
        return False
    return inspect.isclass(opt_class) and 'fused' in inspect.signature(opt_class).parameters


def create_optimizer(args: argparse.Namespace, lr: float, model: nn.Module) -> torch.optim.Optimizer:
    """timm's optimizer, fused where it can be.

    Args:
        args: Arguments of train.py.
        lr: Peak learning rate.
        model: Model whose parameters, but for the frozen ones, it updates.

    Raises:
        InputError: If the optimizer is unknown or takes no such option.
    """
    options = dict(optimizer_kwargs(args), lr=lr)
    if _takes_fused(args):
        options['fused'] = True
    try:
        # What stage two froze gets no gradient, so that the optimizer leaves it alone.
        optimizer = create_optimizer_v2(model, **dict(options, **args.opt_kwargs))
    except (ValueError, TypeError, AssertionError, RuntimeError) as error:
        raise InputError(f"optimizer '{args.opt}' cannot be made: {error}") from error
    if isinstance(optimizer, torch.optim.SGD) and 'fused' in options:
        # Fused SGD leaves its first momentum unset where loss scaling skips the first step.
        for group in optimizer.param_groups:
            for parameter in group['params'] if group['momentum'] and not group['dampening'] else ():
                if parameter.requires_grad:
                    optimizer.state[parameter]['momentum_buffer'] = torch.zeros_like(parameter)
    return optimizer


def resolve_data_config(args: argparse.Namespace, model: Shike) -> Dict[str, Any]:
    """Preprocessing: the model's own, overridden by the arguments.

    Raises:
        InputError: If there are not as many means or standard deviations as channels.
    """
    for name in ('mean', 'std'):
        values = getattr(args, name)
        if values and len(values) not in (1, model.in_chans):
            raise InputError(f'--{name} has {len(values)} values, expected 1 or {model.in_chans}.')
    return timm.data.resolve_data_config(vars(args), model=model)


def load_data(args: argparse.Namespace) -> TrainingData:
    """The data that the arguments name.

    Raises:
        InputError: If it cannot be read, or `--num-classes` contradicts it.
    """
    data = load_training_data(
        args.dataset,
        args.data_dir,
        train_split=args.train_split,
        val_split=args.val_split,
        imb_factor=args.imb_factor,
        imb_type=args.imb_type,
        download=args.dataset_download,
        holdout=args.holdout,
        val_per_class=args.val_per_class,
    )
    if args.num_classes is not None and args.num_classes != data.num_classes:
        raise InputError(
            f'--num-classes {args.num_classes} contradicts the {data.num_classes} classes of the data: leave it out.')
    return data


def create_schedule(optimizer: torch.optim.Optimizer, args: argparse.Namespace, stage: Stage) -> Scheduler:
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
    return scheduler


def mixup_options(args: argparse.Namespace, num_classes: int, stages: Sequence[Stage]) -> Optional[Dict[str, Any]]:
    """Arguments of `timm.data.FastCollateMixup`, None where it is off.

    Raises:
        InputError: If one of the stages needs hard labels, or a batch cannot be paired.
    """
    if not (args.mixup or args.cutmix):
        return None
    flag = f'--mixup {args.mixup:g}' if args.mixup else f'--cutmix {args.cutmix:g}'
    for stage in stages:
        if stage.indices_only:
            raise InputError(f'{flag} mixes labels, but {stage.indices_only}.')
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
