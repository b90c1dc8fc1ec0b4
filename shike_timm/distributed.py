"""Processes that torchrun or Slurm started: joined, told apart, and of one mind. One process alone is rank 0 of 1."""
import argparse
import logging
import os
from contextlib import contextmanager
from typing import Any, Callable, Iterator, List, Optional

import torch
import torch.distributed as dist
from timm.utils import distribute_bn, init_distributed_device, is_distributed_env, world_info_from_env
from torch import Tensor, nn

from .devices import resolve_device
from .errors import InputError, one_line

__all__ = [
    'Vote', 'equal_statistics', 'join_processes', 'local_primary_first', 'on_primary', 'over_processes', 'rank',
    'world_size',
]

_logger = logging.getLogger(__name__)


def rank() -> int:
    """Number of this process, 0 for the one that writes files and logs."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def join_processes(name: Optional[str]) -> torch.device:
    """Join the processes that torchrun or Slurm started, if any; all but the first fall silent.

    Args:
        name: As for `resolve_device`; of several GPUs on a machine each process takes its own.

    Returns:
        The device of this process.

    Raises:
        InputError: If the device cannot be used, there are fewer GPUs than processes, or these do not find each other.
    """
    if not is_distributed_env():
        return resolve_device(name)
    kind = (name or ('cuda' if torch.cuda.is_available() else 'cpu')).partition(':')[0]
    local_rank, number, count = world_info_from_env()
    if kind == 'cuda' and local_rank >= torch.cuda.device_count():
        raise InputError(
            f'Process {local_rank} of this machine finds {torch.cuda.device_count()} GPUs: start a process for each.')
    if number:
        logging.getLogger().setLevel(logging.CRITICAL)
    elif not dist.is_initialized() and os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True':
        # Its store goes on holding addresses of processes that are gone, which those after them may take for good.
        if os.environ['TORCHELASTIC_MAX_RESTARTS'] != '0':
            _logger.warning(
                'torchrun restarts processes reliably with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 alone: set it.')
    if not dist.is_initialized():
        # Numbers and objects of the host go by gloo, so that agreeing on them waits for no GPU.
        backend = 'cpu:gloo,cuda:nccl' if kind == 'cuda' else 'gloo'
        try:
            init_distributed_device(argparse.Namespace(device=kind, dist_backend=backend))
        except (RuntimeError, ValueError) as error:
            raise InputError(
                f'{count} processes are expected and this one cannot join them ({one_line(error)}): start them with '
                'torchrun.') from error
    return resolve_device(f'cuda:{local_rank}' if kind == 'cuda' else kind)


@contextmanager
def local_primary_first() -> Iterator[None]:
    """The first process of each machine goes before its others, for what leaves files behind that they find.

    What it raises is no reason for them to wait: they meet the same, or else that it is gone.
    """
    waits = world_size() > 1 and world_info_from_env()[0] > 0
    if waits:
        dist.barrier()
    try:
        yield
    finally:
        if world_size() > 1 and not waits:
            dist.barrier()


def on_primary(function: Callable[..., Any], *args: Any) -> None:
    """Call a function in the first process alone, for which the others wait; what it raises is raised in all."""
    errors: List[Optional[Exception]] = [None]
    if rank() == 0:
        try:
            function(*args)
        except Exception as error:
            errors = [error]
    if world_size() > 1:
        dist.broadcast_object_list(errors)
    if errors[0] is not None:
        raise errors[0]


def over_processes(values: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """The sums over all processes of the elements of a tensor, or what another operation makes of them."""
    values = values.clone()
    if world_size() > 1:
        dist.all_reduce(values, op=op)
    return values


def equal_statistics(*models: nn.Module, mode: str = 'reduce') -> None:
    """Give the BatchNorm layers of all processes the same statistics, as timm's `distribute_bn` does.

    Args:
        *models: Models whose parameters are the same in all processes.
        mode: 'reduce' for their mean, 'broadcast' for those of the first process.
    """
    for model in models if world_size() > 1 else ():
        distribute_bn(model, world_size(), mode == 'reduce')


class Vote:
    """The largest of the processes' numbers, told at the next call, the same one in all: no process waits for it."""

    def __init__(self) -> None:
        self.work: Any = None
        self.number = torch.zeros((), dtype=torch.int64)

    def __call__(self, number: int) -> int:
        """Hand in a number, and take the largest of the call before, or the number itself of one process alone."""
        if world_size() == 1:
            return number
        told = 0
        if self.work is not None:
            self.work.wait()
            told = int(self.number)
        self.number = torch.tensor(number)
        self.work = dist.all_reduce(self.number, op=dist.ReduceOp.MAX, async_op=True)
        return told
