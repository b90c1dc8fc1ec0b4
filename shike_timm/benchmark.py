"""Throughput, time per part, peak memory and achieved FLOP/s of models, side by side in one run."""
import argparse
import json
import statistics
import time
import weakref
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Set, Tuple

import numpy as np
import timm
import timm.data
import torch
from timm.task import ClassificationTask, TrainingTask
from timm.utils import NativeScaler
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from .builders import check_compiler, check_model_name, create_model, create_optimizer, resolve_autocast, resolve_device
from .checkpoints import write_text
from .data import TrainingData
from .data.device_loader import DeviceLoader
from .engine import LoopConfig, train_step
from .errors import InputError
from .memory import keep_freed_memory
from .models import Shike
from .stages import Run, compile_task, create_loss_scaler, create_task, loop_config, prepare

__all__ = ['benchmark', 'format_report', 'measure_ceilings', 'peak_memory', 'time_parts']

PARTS = ('data', 'forward', 'losses', 'backward', 'optimizer')


def _synchronize(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def _seconds(function: Callable[[], Any], device: torch.device, repeats: int) -> float:
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    _synchronize(device)
    return (time.perf_counter() - start) / repeats


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Dict[str, float]:
    """What the device reaches at best: the fastest of several matrix products, and a copy in memory.

    Args:
        device: Device to measure.
        dtype: Data type of the matrices.

    Returns:
        `matmul_gflops`, 10^9 floating-point operations a second, and `copy_gb`, 10^9 bytes read and written a second.
    """
    sizes = (1024, 2048, 4096) if device.type == 'cpu' else (4096, 8192)
    products = []
    for size in sizes:
        left, right, out = (torch.rand(size, size, device=device).to(dtype) for _ in range(3))
        times = [_seconds(lambda: torch.mm(left, right, out=out), device, 3) for _ in range(4)]  # noqa: B023
        products.append(2 * size ** 3 / min(times[1:]))
    source = torch.zeros(2 ** 26, device=device)
    target = torch.zeros_like(source)
    copies = [_seconds(lambda: target.copy_(source), device, 3) for _ in range(4)]
    return dict(
        matmul_gflops=round(max(products) / 1e9, 1),
        copy_gb=round(2 * source.nbytes / min(copies[1:]) / 1e9, 1),
    )


@contextmanager
def time_parts(task: TrainingTask, optimizer: torch.optim.Optimizer, device: torch.device) -> Iterator[Counter]:
    """Time the parts of the training steps inside the context, by waiting for the device after each.

    Args:
        task: Task whose `trainable_module` is the forward; the rest of its own forward are the losses.
        optimizer: Its step ends the backward.
        device: Device to wait for.

    Yields:
        Seconds by part, summed over steps; what lies between two steps counts as data.
    """
    seconds: Counter = Counter()
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
    """Counts the bytes of the tensors that live at once; those of `held` from the start."""

    def __init__(self, held: Iterable[Tensor]):
        super().__init__()
        self.known: Set[int] = set()
        self.live = self.peak = 0
        for tensor in held:
            self._add(tensor)

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() and storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._remove, storage._cdata, storage.nbytes())

    def _remove(self, key: int, num_bytes: int) -> None:
        self.known.discard(key)
        self.live -= num_bytes

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._add, result)
        return result


def peak_memory(step: Callable[[], Any], device: torch.device, held: Iterable[Tensor] = ()) -> int:
    """Most bytes that tensors take at once during a step.

    Args:
        step: Runs one step, not compiled.
        device: On CUDA the allocator is asked; elsewhere the tensors are tracked, a library's scratch space is not.
        held: Tensors that exist before, such as weights.
    """
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
        step()
        _synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    with _LiveTensors(held) as tensors:
        step()
    return tensors.peak


@dataclass
class _Contestant:
    """A model ready to be timed; `step` works on one batch."""

    model: str
    bench: str
    batch_size: int
    step: Callable[[], Any]
    result: Dict[str, Any]
    rates: List[float] = field(default_factory=list)


def _cycle(loader: Any) -> Iterator[Tuple[Tensor, Tensor]]:
    while True:
        yield from loader


def _count_flops(step: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def _synthetic_run(args: argparse.Namespace, model: nn.Module) -> Run:
    """A run over one batch of noise."""
    device = resolve_device(args.device)
    data_config = timm.data.resolve_data_config(vars(args), model=model)
    channels, height, width = data_config['input_size']
    rng = np.random.default_rng(args.seed)
    loader = DeviceLoader(
        rng.integers(0, 256, (args.batch_size, height, width, channels), dtype=np.uint8),
        rng.integers(0, args.num_classes, args.batch_size),
        data_config['mean'],
        data_config['std'],
        args.batch_size,
        device,
    )
    data = TrainingData(None, None, [1] * args.num_classes, [str(c) for c in range(args.num_classes)])
    return Run(args, device, resolve_autocast(args, device), data, data_config, model.to(device), loader, loader)


def _plain_task(run: Run) -> TrainingTask:
    task = ClassificationTask(run.model, device=run.device, verbose=False)
    if run.args.channels_last:
        task.to(memory_format=torch.channels_last)
    return task


def _create_run(args: argparse.Namespace, name: str, with_data: bool) -> Run:
    if name == args.model and with_data:
        return prepare(args, [args.stage])
    if name == args.model:
        return _synthetic_run(args, create_model(args, args.num_classes))
    try:
        return _synthetic_run(args, timm.create_model(name, num_classes=args.num_classes))
    except (ValueError, RuntimeError) as error:
        raise InputError(f"model '{name}' cannot be made: {' '.join(str(error).split())}") from error


def _training(args: argparse.Namespace, name: str, with_data: bool) -> _Contestant:
    run = _create_run(args, name, with_data)
    stage = args.stage
    task = create_task(run, stage) if isinstance(run.model, Shike) else _plain_task(run)
    optimizer = create_optimizer(args, stage, run.model)
    scaler: Optional[NativeScaler] = create_loss_scaler(run)
    config: LoopConfig = loop_config(run, stage)
    batches = _cycle(run.train_loader)
    task.train()

    def step() -> None:
        images, target = next(batches)
        train_step(task, images, target, optimizer, config, scaler)

    step()  # the optimizer's state exists from here on
    held = [*run.model.parameters(), *run.model.buffers()]
    held += [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    result = dict(
        parameters=sum(p.numel() for p in run.model.parameters()),
        gflops=_count_flops(step) / args.batch_size / 1e9,
        peak_memory_mb=round(peak_memory(step, run.device, held) / 2 ** 20, 1),
    )
    if isinstance(run.model, Shike):
        compile_task(task, args, stage)
    elif args.torchcompile:
        task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
    for _ in range(args.num_warm_iter):
        step()
    with time_parts(task, optimizer, run.device) as seconds:
        for _ in range(args.num_bench_iter):
            step()
    result['part_ms'] = {part: round(1000 * seconds[part] / args.num_bench_iter, 3) for part in PARTS}
    return _Contestant(name, f'train, stage {stage}' if name == args.model else 'train', args.batch_size, step, result)


def _inference(args: argparse.Namespace, name: str) -> _Contestant:
    run = _create_run(args, name, with_data=False)
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    model = run.model.eval().to(memory_format=memory_format)
    images = next(iter(run.test_loader))[0].contiguous(memory_format=memory_format)
    autocast = torch.autocast(run.device.type, dtype=run.autocast) if run.autocast else nullcontext()
    network: Callable[[Tensor], Tensor] = model

    def step() -> None:
        with torch.inference_mode(), autocast:
            network(images)

    result = dict(
        parameters=sum(p.numel() for p in model.parameters()),
        gflops=_count_flops(step) / args.batch_size / 1e9,
        peak_memory_mb=round(peak_memory(step, run.device, model.parameters()) / 2 ** 20, 1),
    )
    if args.torchcompile:
        network = torch.compile(model, backend=args.torchcompile, mode=args.torchcompile_mode)
    for _ in range(args.num_warm_iter):
        step()
    return _Contestant(name, 'inference', args.batch_size, step, result)


def benchmark(args: argparse.Namespace) -> Dict[str, Any]:
    """Time the model that the arguments describe, and those it is compared with, turn by turn.

    Args:
        args: What `shike_timm.hparams.parse_benchmark_args` gives.

    Returns:
        `device`, `threads`, `dtype`, `ceilings` and `results`, one for each model and kind of work: images a second
        as the median of rounds and all rounds, parameters, floating-point operations per image, peak memory,
        achieved FLOP/s and, for training, milliseconds by part.

    Raises:
        InputError: If anything given cannot work.
    """
    if args.results_file and not Path(args.results_file).absolute().parent.is_dir():
        raise InputError(f"results-file '{args.results_file}' is in a folder that does not exist: make it first.")
    device = resolve_device(args.device)
    if device.type == 'cpu':
        keep_freed_memory()
    if args.torchcompile:
        check_compiler(args.torchcompile, args.torchcompile_mode, device)
    with_data = bool(args.dataset or args.data_dir)
    dtype = resolve_autocast(args, device) or torch.float32
    ceilings = measure_ceilings(device, dtype)
    check_model_name(args.model)
    # What is compared gets the same images and classes.
    args.img_size = args.img_size or timm.get_pretrained_cfg_value(args.model, 'input_size')[-1]
    args.num_classes = args.num_classes or timm.get_pretrained_cfg_value(args.model, 'num_classes')
    names = [args.model, *args.compare]
    contestants = []
    if args.bench in ('train', 'both'):
        contestants += [_training(args, name, with_data) for name in names]
    if args.bench in ('inference', 'both'):
        contestants += [_inference(args, name) for name in names]
    for _ in range(args.num_rounds):
        for one in contestants:
            one.rates.append(args.batch_size / _seconds(one.step, device, args.num_bench_iter))
    report = dict(
        device=torch.cuda.get_device_name(device) if device.type == 'cuda' else str(device),
        threads=torch.get_num_threads(),
        dtype=str(dtype).split('.')[1],
        channels_last=args.channels_last,
        torchcompile=args.torchcompile,
        data=(args.dataset or args.data_dir) if with_data else 'noise',
        ceilings=ceilings,
        results=[],
    )
    for one in contestants:
        rate = statistics.median(one.rates)
        achieved = rate * one.result['gflops']
        report['results'].append(dict(
            model=one.model,
            bench=one.bench,
            batch_size=one.batch_size,
            images_per_second=round(rate, 2),
            rounds=[round(r, 2) for r in one.rates],
            achieved_gflops=round(achieved, 1),
            share_of_matmul=round(achieved / ceilings['matmul_gflops'], 3),
            **dict(one.result, gflops=round(one.result['gflops'], 4)),
        ))
    print(format_report(report))
    if args.results_file:
        write_text(Path(args.results_file), json.dumps(report, indent=2) + '\n')
    return report


def format_report(report: Dict[str, Any]) -> str:
    """Text tables of what `benchmark` measured, with each comparison's ratio of throughputs beside the predicted one.

    Args:
        report: What `benchmark` returns.
    """
    ceilings = report['ceilings']
    rows = [('model', 'bench', 'params M', 'GFLOP', 'img/s', 'GFLOP/s', 'of peak', 'MiB')]
    rows += [
        (
            r['model'],
            r['bench'],
            f"{r['parameters'] / 1e6:.2f}",
            f"{r['gflops']:.3f}",
            f"{r['images_per_second']:.1f}",
            f"{r['achieved_gflops']:.1f}",
            f"{r['share_of_matmul']:.1%}",
            f"{r['peak_memory_mb']:.1f}",
        )
        for r in report['results']
    ]
    lines = [
        f"{report['device']}, {report['threads']} threads, {report['dtype']}, data: {report['data']}; matrix product "
        f"{ceilings['matmul_gflops']:g} GFLOP/s, copy {ceilings['copy_gb']:g} GB/s",
        *(f'{model:24}{bench:16}' + ''.join(f'{cell:>10}' for cell in cells) for model, bench, *cells in rows),
    ]
    for r in report['results']:
        if 'part_ms' in r:
            parts = ', '.join(f'{part} {ms:.1f}' for part, ms in r['part_ms'].items())
            lines.append(f"{r['model']}, ms a step: {parts}")
    first = None
    for r in report['results']:
        if r['model'] == report['results'][0]['model']:
            first = r  # what is compared with it follows
        else:
            ratio = first['images_per_second'] / r['images_per_second']
            predicted = r['gflops'] / first['gflops']
            lines.append(
                f"{first['model']} over {r['model']}, {r['bench']}: {ratio:.3f} of its images a second, by their FLOPs "
                f'{predicted:.3f}: {ratio / predicted:.3f}; memory {first["peak_memory_mb"] / r["peak_memory_mb"]:.2f}')
    return '\n'.join(lines)
