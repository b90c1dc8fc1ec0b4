"""A training step, and the progress of an epoch in steps."""
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Dict, Optional

import numpy as np
import torch
from timm.task import TrainingTask
from timm.utils import NativeScaler, dispatch_clip_grad, random_seed
from torch import Tensor

from .config import StepConfig


class NonFiniteError(RuntimeError):
    """The loss or the weights stopped being finite. The message says where."""


@dataclass
class Done:
    """The part of an epoch that is finished, over all processes."""

    step: int = 0  # Batches that each process has finished.
    num_images: int = 0
    seconds: float = 0.
    sums: Dict[str, float] = field(default_factory=dict)  # Sums over images of the losses that the task returns.


def seed_all(seed: int, phase: int, epoch: int, part: int = 0) -> None:
    """Seed Python, NumPy and torch for a part of an epoch. Epoch -1 is the initialisation of the phase."""
    random_seed(int(np.random.SeedSequence((seed, phase, epoch + 1, part)).generate_state(1)[0]))


def train_step(
        task: TrainingTask, images: Tensor, target: Tensor, optimizer: torch.optim.Optimizer, config: StepConfig,
        autocast: Optional[torch.dtype] = None, loss_scaler: Optional[NativeScaler] = None, update: bool = True,
        num_updates: Optional[int] = None,
) -> Dict[str, Tensor]:
    """Train on one batch of images [B, C, H, W], and return the result of the task, a dictionary with `loss`.

    Without `update`, gradients are only accumulated. The decay of the averaged weights depends on `num_updates`, which
    includes this update. The step waits for the device only if loss scaling is used with an optimizer that is not
    fused.
    """
    mixed = torch.autocast(task.device.type, dtype=autocast) if autocast else nullcontext()
    is_map = images.ndim == 4  # Cached features are vectors.
    memory_format = torch.channels_last if config.channels_last and is_map else torch.contiguous_format
    with nullcontext() if update else task.no_sync():
        with mixed:
            result = task(images.contiguous(memory_format=memory_format), target)
        loss = result['loss'] / config.grad_accum_steps
        clipped = task.get_clip_parameters(exclude_head='agc' in config.clip_mode) if config.clip_grad else None
        if loss_scaler is not None:
            loss_scaler(
                loss, optimizer, clip_grad=config.clip_grad or None, clip_mode=config.clip_mode, parameters=clipped,
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
