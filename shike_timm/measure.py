"""Measuring instruments: device ceilings, floating-point operations, time by part, peak memory."""
import statistics
import time
import weakref
from collections import defaultdict
from contextlib import contextmanager
from functools import partial
from typing import Any, Callable, Dict, Iterable, Iterator, List, Set

import torch
from timm.task import TrainingTask
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

__all__ = [
    'PARTS', 'count_flops', 'inference_costs', 'measure_ceilings', 'on_paper', 'peak_memory', 'rates_by_turns',
    'seconds_per_call', 'time_parts',
]

PARTS = ('data', 'forward', 'losses', 'backward', 'optimizer')


def _synchronize(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def seconds_per_call(function: Callable[[], Any], device: torch.device, num_calls: int) -> float:
    """Seconds that a call takes on average, the device's work included."""
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(num_calls):
        function()
    _synchronize(device)
    return (time.perf_counter() - start) / num_calls


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Dict[str, float]:
    """What the device reaches at best: the fastest of several matrix products, and a copy in memory.

    Args:
        device: Device to measure.
        dtype: Data type of the matrices; on CUDA float32 means what it means for convolutions, TF32 by default.

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
        if min(times) > 0.2:  # bfloat16 without instructions for it: the next size would take minutes
            break
    torch.backends.cuda.matmul.allow_tf32 = tf32
    source = torch.zeros(2 ** 26, device=device)
    target = torch.zeros_like(source)
    copies = [seconds_per_call(lambda: target.copy_(source), device, 3) for _ in range(4)]
    return dict(
        matmul_gflops=round(max(products) / 1e9, 1),
        copy_gb=round(2 * source.nbytes / min(copies[1:]) / 1e9, 1),
    )


def rates_by_turns(steps: Dict[Callable[[], Any], int], device: torch.device, num_rounds: int) -> List[List[float]]:
    """Calls a second of each step in each round, turn by turn so that the machine's moods fall on all of them.

    Args:
        steps: What is called, and how often in a turn.
        device: Device to wait for.
        num_rounds: Turns of each.
    """
    rounds = [
        [1 / seconds_per_call(step, device, number) for step, number in steps.items()] for _ in range(num_rounds)]
    return [list(rates) for rates in zip(*rounds)]


@torch.inference_mode()
def inference_costs(
        models: Dict[str, nn.Module],
        images: Tensor,
        num_rounds: int = 5,
        seconds_per_turn: float = 0.5,
) -> Dict[str, Dict[str, float]]:
    """What models cost at inference, timed turn by turn.

    Args:
        models: Models in eval mode by name, all on the device of the images.
        images: A batch [B, C, H, W].
        num_rounds: Turns of each model, of which the median counts.
        seconds_per_turn: What a turn takes, about: it has one batch at least.

    Returns:
        By name the `parameters`, the `gmacs` of one image (10^9 multiply-adds) and the `images_per_second`.
    """
    steps = [partial(model, images) for model in models.values()]
    flops = [count_flops(step) for step in steps]  # the first call of each, which is not timed
    turns = {step: max(round(seconds_per_turn / seconds_per_call(step, images.device, 1)), 1) for step in steps}
    rates = rates_by_turns(turns, images.device, num_rounds)
    return {
        name: dict(
            parameters=sum(p.numel() for p in model.parameters()),
            gmacs=flops[i] / 2e9 / len(images),
            images_per_second=len(images) * statistics.median(rates[i]),
        )
        for i, (name, model) in enumerate(models.items())
    }


def _conv_backward(
        grad_out_shape: List[int],
        x_shape: List[int],
        w_shape: List[int],
        _bias: Any,
        _stride: Any,
        _padding: Any,
        _dilation: Any,
        transposed: bool,
        _output_padding: Any,
        _groups: Any,
        output_mask: List[bool],
        **_: Any,
) -> int:
    """Each gradient takes what the forward took; torch's own count of the weight's is not divided by the groups."""
    return sum(output_mask[:2]) * conv_flop_count(x_shape, w_shape, grad_out_shape, transposed)


def count_flops(step: Callable[[], Any]) -> int:
    """Floating-point operations of the convolutions and matrix products of a step, two for each multiply-add."""
    formulas = {torch.ops.aten.convolution_backward: _conv_backward}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        step()
    return counter.get_total_flops()


@contextmanager
def time_parts(
        task: TrainingTask,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
) -> Iterator[Dict[str, float]]:
    """Time the parts of the training steps inside the context, by waiting for the device after each.

    Args:
        task: Task whose `trainable_module` is the forward; the rest of its own forward, a
            teacher's among it, are the losses.
        optimizer: Its step ends the backward.
        device: Device to wait for.

    Yields:
        Seconds by part, summed over steps; what lies between two steps counts as data.
    """
    seconds: Dict[str, float] = defaultdict(float)
    _synchronize(device)
    last = time.perf_counter()

    def mark(part: str) -> None:
        nonlocal last
        _synchronize(device)
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
    """Counts the bytes of the tensors that live at once, those of `held` from the start, on any device.

    torch's own tracker, MemTracker, is not among its public modules and wants to know the modules beforehand.
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
            key, num_bytes = id(storage), storage.nbytes()  # torch keeps one Python object for a storage while it lives
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
    """Most bytes that a step's tensors take at once.

    Args:
        step: Runs one step, not compiled.
        device: On CUDA the allocator is asked; elsewhere the tensors are tracked, a library's scratch space is not.
        held: Tensors that exist before and count, such as weights; nothing else that exists before does.
    """
    held = list(held)
    if device.type != 'cuda':
        with _LiveTensors(held) as tensors:
            step()
        return tensors.peak
    _synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    _synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before + sum(tensor.nbytes for tensor in held)


@contextmanager
def on_paper(module: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
    """Do inside the context what takes neither time nor memory: tensors have shapes and types there, but no values.

    Args:
        module: Module that becomes of such tensors, for good.

    Yields:
        What makes such a tensor of another one, for the inputs.
    """
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for part in module.modules():
            for name, tensor in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
                blank = mode.from_tensor(tensor.detach())
                is_parameter = isinstance(tensor, nn.Parameter)
                setattr(part, name, nn.Parameter(blank, tensor.requires_grad) if is_parameter else blank)
        yield mode.from_tensor
