"""The processes of a run, started by torchrun or Slurm. A single process is rank 0 of 1."""
import logging
import os
from datetime import timedelta
from typing import Any, Callable, List, Optional, TypeVar

import torch
import torch.distributed as dist
from timm.utils import is_distributed_env, world_info_from_env
from torch import Tensor

from .devices import resolve_device
from .errors import InputError, one_line

_logger = logging.getLogger(__name__)

LONGEST_WAIT = timedelta(minutes=30)  # A process waits for the others at most this long.
Result = TypeVar('Result')


def rank() -> int:
    """Number of this process, 0 for the one that writes files and logs."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def join_processes(name: Optional[str]) -> torch.device:
    """Join the processes that torchrun or Slurm started, if any. Returns the device of this process, its own GPU."""
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
        # torchrun's store keeps addresses of dead processes. New processes may then connect to those.
        if os.environ['TORCHELASTIC_MAX_RESTARTS'] != '0':
            _logger.warning(
                'torchrun restarts processes reliably only with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1: set it.')
    if not dist.is_initialized():
        # gloo carries CPU tensors and Python objects, so that no process waits for a GPU.
        backend = 'cpu:gloo,cuda:nccl' if kind == 'cuda' else 'gloo'
        try:
            dist.init_process_group(backend, rank=number, world_size=count, timeout=LONGEST_WAIT)
        except (RuntimeError, ValueError) as error:
            raise InputError(
                f'{count} processes are expected and this one cannot join them ({one_line(error)}): start them with '
                'torchrun.') from error
    return resolve_device(f'cuda:{local_rank}' if kind == 'cuda' else kind)


def _call_in(is_called: bool, function: Callable[..., Any], *args: Any) -> Any:
    """Call a function where `is_called` is true. Other processes wait. An error of any process is raised in all."""
    result = error = None
    if is_called:
        try:
            result = function(*args)
        except Exception as raised:
            error = raised
    for one in gather([error]):
        if one is not None:
            raise one
    return result


def local_primary_first(function: Callable[[], Result]) -> Result:
    """Call a function in the first process of each machine, and then in the others, which find the files that it wrote.

    If any process raises an error, all raise it.
    """
    is_first = world_size() == 1 or world_info_from_env()[0] == 0
    first, later = _call_in(is_first, function), _call_in(not is_first, function)
    return first if is_first else later


def on_primary(function: Callable[..., Any], *args: Any) -> None:
    """Call a function in the first process only. The others wait. If it raises an error, all processes raise it."""
    _call_in(rank() == 0, function, *args)


def over_processes(values: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """The tensor summed over all processes, or reduced by another operation."""
    values = values.clone()
    if world_size() > 1:
        dist.all_reduce(values, op=op)
    return values


def gather(items: List[Result]) -> List[Result]:
    """The items of all processes, in the order of their ranks."""
    parts: List[Any] = [items]
    if world_size() > 1:
        parts = [None] * world_size()
        dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


class Vote:
    """The largest number that any process hands in. All get it one call later, so that no process waits."""

    def __init__(self) -> None:
        self.work: Any = None
        self.number = torch.zeros((), dtype=torch.int64)

    def __call__(self, number: int) -> int:
        """Hand in a number. Returns the largest of the previous call (0 at first). A single process gets its own."""
        if world_size() == 1:
            return number
        largest = 0
        if self.work is not None:
            self.work.wait()
            largest = int(self.number)
        self.number = torch.tensor(number)
        self.work = dist.all_reduce(self.number, op=dist.ReduceOp.MAX, async_op=True)
        return largest
