"""What the two stages of a run are made of, put together from parsed arguments."""
import argparse
import os
from dataclasses import dataclass
from typing import Any, Dict, Optional, Sequence

import torch
from timm.task import DistillationTeacher, TrainingTask
from timm.utils import NativeScaler
from torch import nn

from .build import (
    check_compiler,
    create_model,
    create_optimizer,
    create_schedule,
    load_data,
    mixup_options,
    resolve_autocast,
    resolve_data_config,
)
from .data import Augmentation, TrainingData, create_eval_loader, create_train_loader
from .devices import resolve_device, tune_device
from .engine import LoopConfig, seed_all
from .errors import InputError
from .loading import load_teacher
from .metrics import evaluate
from .tasks import ClassifierRetrainingTask, RepresentationTask

__all__ = ['STAGES', 'Run', 'compile_task', 'create_loss_scaler', 'create_task', 'loop_config', 'prepare']

STAGES = ('stage_one', 'stage_two')


@dataclass
class Run:
    """What both stages of a run share, made and checked before anything is written."""

    args: argparse.Namespace
    device: torch.device
    autocast: Optional[torch.dtype]
    data: TrainingData
    data_config: Dict[str, Any]
    model: nn.Module
    train_loader: Any
    test_loader: Any
    teacher: Optional[DistillationTeacher] = None

    def evaluate(self, model: nn.Module) -> Dict[str, Any]:
        return evaluate(model, self.test_loader, self.data.class_counts, self.device)


def prepare(args: argparse.Namespace, stages: Sequence[int], fresh: bool = True) -> Run:
    """Make and check what the stages of a run share; nothing is written.

    Args:
        args: Arguments of train.py.
        stages: Stages to come.
        fresh: Whether the model begins here; otherwise a checkpoint brings its weights.

    Raises:
        InputError: If anything given cannot work.
    """
    if int(os.environ.get('WORLD_SIZE', 1)) > 1:
        raise InputError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but a run is one process: do not use torchrun.")
    device = resolve_device(args.device)
    tune_device(device)
    autocast = resolve_autocast(args, device)
    data = load_data(args)
    seed_all(args.seed, 1, -1)
    model = create_model(args, data.num_classes, fresh).to(device)
    for stage in stages:  # a wrong option shows here rather than after stage one
        create_schedule(create_optimizer(args, stage, model), args, stage)
    if 1 in stages:
        check_compiler(args.torchcompile, args.torchcompile_mode, device)
    data_config = resolve_data_config(args, model)
    augmentation = Augmentation(
        no_aug=args.no_aug,
        train_crop_mode=args.train_crop_mode,
        scale=args.scale,
        ratio=args.ratio,
        hflip=args.hflip,
        vflip=args.vflip,
        color_jitter=args.color_jitter,
        auto_augment=args.aa,
        cutout=args.cutout,
        interpolation=args.train_interpolation,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
    )
    mixup = mixup_options(args, data.num_classes, stages)
    train_loader = create_train_loader(
        data.train, data_config, args.batch_size, device, augmentation, args.workers, mixup, args.device_data)
    test_loader = create_eval_loader(
        data.test, data_config, args.validation_batch_size, device, args.workers, args.device_data)
    teacher = None
    if args.kd_model_name and args.distill_loss_weight and 1 in stages:
        teacher = load_teacher(args.kd_model_name, data, data_config['input_size'], device, bool(args.holdout))
    return Run(args, device, autocast, data, data_config, model, train_loader, test_loader, teacher)


def create_task(run: Run, stage: int) -> TrainingTask:
    """The training task of a stage, in the run's memory layout; stage two gets new classifiers."""
    args = run.args
    if stage == 1:
        teacher, run.teacher = run.teacher, None  # so that its memory is free in stage two
        task = RepresentationTask(
            run.model,
            args.alpha,
            args.beta,
            args.detach_teacher,
            teacher_model=teacher,
            distill_loss_weight=args.distill_loss_weight,
            temperature=args.kd_temperature,
            mean=run.data_config['mean'],
            std=run.data_config['std'],
            device=run.device,
        )
    else:
        seed_all(args.seed, stage, -1)
        task = ClassifierRetrainingTask(run.model, run.data.class_counts, device=run.device)
    if args.channels_last:
        task.to(memory_format=torch.channels_last)
    if args.model_ema:
        task.setup_ema(decay=args.model_ema_decay)
    return task


def compile_task(task: TrainingTask, args: argparse.Namespace, stage: int) -> bool:
    """Compile a task where that is asked for, and say whether; stage two is over before it would pay."""
    if args.torchcompile and stage == 1:
        task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
        return True
    return False


def create_loss_scaler(run: Run) -> Optional[NativeScaler]:
    """Loss scaling for float16, None for other data types."""
    return NativeScaler(run.device.type) if run.autocast == torch.float16 else None


def loop_config(run: Run, stage: int) -> LoopConfig:
    """Settings of the training loop for a stage."""
    args = run.args
    return LoopConfig(
        name=STAGES[stage - 1].replace('_', ' '),
        epochs=args.crt_epochs if stage == 2 else args.epochs,
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
