"""What benchmark.py measures: limits of the device, time by part of a step, peak memory."""
import time
import weakref
from collections import defaultdict
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterable, Iterator, List, Set

import torch
from timm.task import TrainingTask
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import conv_flop_count

from shike_timm.costs import count_flops, seconds_per_call, synchronize

PARTS = ('data', 'forward', 'losses', 'backward', 'optimizer')


def _conv_backward(grad_out: Any, x: Any, weight: Any, *others: Any, **_: Any) -> int:
    """FLOPs of a convolution's backward by its shapes: each gradient costs as much as the forward.

    torch's own formula does not divide the work on the weight's gradient by the groups of the convolution.
    """
    transposed, output_mask = others[4], others[7]
    return sum(output_mask[:2]) * conv_flop_count(x, weight, grad_out, transposed)


def count_training_flops(step: Callable[[], Any]) -> int:
    """Floating-point operations of a step that may go backward through convolutions with groups."""
    return count_flops(step, {torch.ops.aten.convolution_backward: _conv_backward})


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Dict[str, float]:
    """The limits of the device: the fastest of several matrix products, and a copy in memory.

    Args:
        device: Device to measure.
        dtype: Data type of the matrices. On CUDA float32 means what it means for convolutions, by default TF32.

    Returns:
        `matmul_gflops`, 10^9 floating-point operations a second, and `copy_gb`, 10^9 bytes read and written a second.
    """
    sizes = (512, 1024, 2048, 4096) if device.type == 'cpu' else (4096, 8192)
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    products = []
    for size in sizes:
        left, right, out = (torch.rand(size, size, device=device).to(dtype) for _ in range(3))
        times = [seconds_per_call(lambda: torch.mm(left, right, out=out), device, 3) for _ in range(4)]  # noqa: B023
        products.append(2 * size ** 3 / min(times[1:]))
        if min(times) > 0.2:  # a CPU without instructions for bfloat16 takes minutes for the next size
            break
    torch.backends.cuda.matmul.allow_tf32 = tf32
    source = torch.zeros(2 ** 26, device=device)
    target = torch.zeros_like(source)
    copies = [seconds_per_call(lambda: target.copy_(source), device, 3) for _ in range(4)]
    return dict(
        matmul_gflops=round(max(products) / 1e9, 1),
        copy_gb=round(2 * source.nbytes / min(copies[1:]) / 1e9, 1),
    )


@contextmanager
def time_parts(
        task: TrainingTask,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
) -> Iterator[Dict[str, float]]:
    """Time the parts of the training steps inside the context. Waits for the device after each part.

    Args:
        task: Its `trainable_module` is the forward. The rest of the task, such as a teacher, counts as losses.
        optimizer: Its step ends the backward.
        device: Device to wait for.

    Yields:
        Seconds by part, summed over steps. The time between two steps counts as data.
    """
    seconds: Dict[str, float] = defaultdict(float)
    synchronize(device)
    last = time.perf_counter()

    def mark(part: str) -> None:
        nonlocal last
        synchronize(device)
        now = time.perf_counter()
        seconds[part] += now - last
        last = now

    hooks = [
        task.trainable_module.register_forward_pre_hook(lambda *_: mark('data')),
        task.trainable_module.register_forward_hook(lambda *_: mark('forward')),
        task.register_forward_hook(lambda *_: mark('losses')),
        optimizer.register_step_pre_hook(lambda *_: mark('backward')),
        optimizer.register_step_post_hook(lambda *_: mark('optimizer')),
    ]
    try:
        yield seconds
    finally:
        for hook in hooks:
            hook.remove()


class _LiveTensors(TorchDispatchMode):
    """Counts the bytes of all living tensors on any device, beginning with those of `held`.

    torch has the tracker MemTracker, but it is not public and must know the modules beforehand.
    """

    def __init__(self, held: List[Tensor]):
        super().__init__()
        self.known: Set[int] = set()
        self.live = self.peak = 0
        self._add(held)

    def _add(self, result: Any) -> None:
        if isinstance(result, (list, tuple)):
            for one in result:
                self._add(one)
        elif isinstance(result, Tensor):
            storage = result.untyped_storage()
            key, num_bytes = id(storage), storage.nbytes()  # torch keeps one Python object of a living storage
            if key not in self.known:
                self.known.add(key)
                self.live += num_bytes
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._remove, key, num_bytes)

    def _remove(self, key: int, num_bytes: int) -> None:
        self.known.discard(key)
        self.live -= num_bytes

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self._add(result)
        return result


def peak_memory(step: Callable[[], Any], device: torch.device, held: Iterable[Tensor] = ()) -> int:
    """Most bytes that the tensors of a step take at once.

    Args:
        step: Runs one step, not compiled.
        device: On CUDA the allocator counts. Elsewhere tensors are tracked, without the scratch space of libraries.
        held: Tensors from before the step that count too, such as weights.
    """
    held = list(held)
    if device.type != 'cuda':
        with _LiveTensors(held) as tensors:
            step()
        return tensors.peak
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before + sum(tensor.nbytes for tensor in held)


@contextmanager
def on_paper(module: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
    """Run a module on tensors without values inside the context. They have shapes and types, but take no memory.

    Args:
        module: Its parameters and buffers lose their values for good.

    Yields:
        A function that makes a tensor without values from an input.
    """
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for part in module.modules():
            for name, tensor in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
                blank = mode.from_tensor(tensor.detach())
                is_parameter = isinstance(tensor, nn.Parameter)
                setattr(part, name, nn.Parameter(blank, tensor.requires_grad) if is_parameter else blank)
        yield mode.from_tensor
