"""Throughput, time per part, peak memory and achieved FLOP/s of models, side by side in one run."""
import json
import os
import statistics
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import timm
import torch
from timm.task import ClassificationTask, TrainingTask
from timm.utils import is_distributed_env
from torch import Tensor

from ..checkpoints import check_results_file, write_text
from ..data import TrainingData, find_dataset
from ..data.dataset import in_memory_set
from ..data.device_loader import DeviceLoader
from ..devices import resolve_device, tune_device
from ..errors import InputError, one_line
from ..measure import PARTS, count_flops, measure_ceilings, on_paper, peak_memory, rates_by_turns, time_parts
from ..models import Shike
from ..options import option, parse
from ..training.build import (
    check_compiler,
    check_model_name,
    create_model,
    create_optimizer,
    resolve_autocast,
    resolve_data_config,
)
from ..training.config import RunConfig
from ..training.engine import train_step
from ..training.methods import Stage, plan_stages
from ..training.runs import Run, compile_task, create_loss_scaler, create_task, loop_config, prepare
from .script import run_script


@dataclass(frozen=True)
class BenchmarkConfig(RunConfig):
    """Benchmark."""

    bench: str = option(
        'both', 'what to time; memory: nothing, but what a training step needs on any device',
        choices=('both', 'train', 'inference', 'memory'))
    stage: int = option(1, 'stage whose training step is timed', choices=(1, 2))
    compare: List[str] = option(
        [], "timm's models to time beside it, turn by turn, on noise of the same size", nargs='+')
    num_warm_iter: int = option(10, 'steps before timing', low=1)
    num_bench_iter: Optional[int] = option(
        None, 'steps of a round; an epoch of data or 40 on noise by default', low=1)
    num_rounds: int = option(5, 'rounds, of which the median counts', low=1)
    results_file: Optional[str] = option(None, 'JSON file to write the figures to', 'FILE')

NUM_BENCH_ITER = 40  # steps of a round on noise


@dataclass
class _Contestant:
    """A model ready to be timed; `step` works on one batch, `num_iter` of them make a round."""

    step: Callable[[], Any]
    num_iter: int
    result: Dict[str, Any]


def _noise_run(args: BenchmarkConfig, model: Any, data_config: Dict[str, Any]) -> Run:
    """A run of a model of timm over one batch of noise."""
    device = resolve_device(args.device)
    channels, height, width = data_config['input_size']
    rng = np.random.default_rng(args.seed)
    images = rng.integers(0, 256, (args.batch_size, height, width, channels), dtype=np.uint8)
    targets = rng.integers(0, model.num_classes, args.batch_size)
    loader = DeviceLoader(
        images,
        targets,
        data_config['mean'],
        data_config['std'],
        args.batch_size,
        device,
    )
    names = [str(c) for c in range(model.num_classes)]
    noise = in_memory_set(images, targets, names)
    data = TrainingData(noise, noise, [1] * model.num_classes, names)
    return Run(args, device, resolve_autocast(args, device), data, data_config, model.to(device), loader, loader)


def _stage(args: Any) -> Stage:
    stages = plan_stages(args)
    if args.stage > len(stages):
        raise InputError(f'--stage {args.stage} is left out by --method {args.method} without --crt-epochs: add some.')
    return stages[args.stage - 1]


def _shike_run(args: BenchmarkConfig) -> Run:
    published = find_dataset(args.dataset).num_classes  # of a set that is a folder, which may not be here
    if args.data_dir or args.dataset and not published:
        return prepare(args, [_stage(args)])
    if args.kd_model_name:
        raise InputError(
            f"--kd-model-name '{args.kd_model_name}' teaches the classes of a data set: add --dataset or --data-dir.")
    known: Any = args.num_classes or published or timm.get_pretrained_cfg_value(args.model, 'num_classes')
    model = create_model(args, known)
    return _noise_run(args, model, resolve_data_config(args, model))


def _plain_run(args: BenchmarkConfig, name: str, like: Run) -> Run:
    """A plain timm model on noise of the size, and with the classes, of the SHIKE model's run."""
    channels = like.data_config['input_size'][0]
    try:
        model = timm.create_model(name, num_classes=like.data.num_classes, in_chans=channels)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"model '{name}' cannot be made: {one_line(error)}.") from error
    return _noise_run(args, model, like.data_config)


def _describe(step: Callable[[], Any], run: Run, held: Iterable[Tensor], **result: Any) -> Dict[str, Any]:
    batch_size = run.args.batch_size
    return dict(
        **result,
        batch_size=batch_size,
        parameters=sum(p.numel() for p in run.model.parameters()),
        gflops=count_flops(step) / batch_size / 1e9,
        peak_memory_mb=round(peak_memory(step, run.device, held) / 2 ** 20, 1),
    )


def _create_task(run: Run, stage: Stage) -> TrainingTask:
    if isinstance(run.model, Shike):
        return create_task(run, stage)
    task = ClassificationTask(run.model, device=run.device, verbose=False)
    task.to(memory_format=torch.channels_last if run.args.channels_last else torch.contiguous_format)
    return task


def _training_step(
        run: Run,
        task: TrainingTask,
        batches: Iterator[Sequence[Tensor]],
) -> Tuple[torch.optim.Optimizer, Callable[[], None], Dict[str, Any]]:
    """Optimizer of a task, a step of training it, and what such a step is and costs."""
    args, stage = run.args, _stage(run.args)
    optimizer = create_optimizer(args, stage.lr, run.model)
    scaler, config = create_loss_scaler(run), loop_config(run)
    task.train()

    def step() -> None:
        images, target = next(batches)
        train_step(task, images, target, optimizer, config, scaler)

    step()  # the optimizer's state exists from here on
    held = [*task.parameters(), *task.buffers()]
    held += [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    what = f'train, stage {stage.number}' if isinstance(run.model, Shike) else 'train'
    return optimizer, step, _describe(step, run, held, bench=what)


def _memory(run: Run, name: str) -> Dict[str, Any]:
    """What a training step takes that is not run; of half precision whichever the device has."""
    run = replace(run, autocast=torch.bfloat16 if run.args.amp else None)
    task = _create_task(run, _stage(run.args))
    batch = next(iter(run.train_loader))
    with on_paper(task) as blank:
        return dict(model=name, **_training_step(run, task, repeat([blank(tensor) for tensor in batch]))[-1])


def _training(run: Run, name: str) -> _Contestant:
    args, stage = run.args, _stage(run.args)
    task = _create_task(run, stage)
    optimizer, step, costs = _training_step(run, task, chain.from_iterable(repeat(run.train_loader)))
    result: Dict[str, Any] = dict(model=name, **costs)
    result['compiled'] = compile_task(task, args, stage if isinstance(run.model, Shike) else plan_stages(args)[0])
    # With data a round is an epoch, since many batches are augmented at once; noise is one batch.
    num_iter = args.num_bench_iter or (len(run.train_loader) if len(run.train_loader) > 1 else NUM_BENCH_ITER)
    for _ in range(args.num_warm_iter):
        step()
    with time_parts(task, optimizer, run.device) as seconds:
        for _ in range(num_iter):
            step()
    result['part_ms'] = {part: round(1000 * seconds[part] / num_iter, 3) for part in PARTS}
    return _Contestant(step, num_iter, result)


def _inference(run: Run, name: str) -> _Contestant:
    args = run.args
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    model: Callable[[Tensor], Tensor] = run.model.eval().to(memory_format=memory_format)
    images = next(iter(run.train_loader))[0].contiguous(memory_format=memory_format)

    def step() -> None:
        with torch.inference_mode(), torch.autocast(run.device.type, run.autocast, enabled=run.autocast is not None):
            model(images)

    result = _describe(step, run, run.model.parameters(), model=name, bench='inference')
    result['compiled'] = bool(args.torchcompile)
    if args.torchcompile:
        model = torch.compile(run.model, backend=args.torchcompile, mode=args.torchcompile_mode)
    for _ in range(args.num_warm_iter):
        step()
    return _Contestant(step, args.num_bench_iter or NUM_BENCH_ITER, result)


def _tell_memory(args: BenchmarkConfig) -> Dict[str, Any]:
    args = replace(args, device='cpu', amp_dtype='bfloat16')
    run = _shike_run(args)
    results = [_memory(run, args.model)] + [_memory(_plain_run(args, other, run), other) for other in args.compare]
    size = ' x '.join(map(str, run.data_config['input_size'])) + (' in half precision' if args.amp else '')
    for r in results:
        print(
            f"{r['model']}, {r['bench']}, {r['batch_size']} images of {size}: "
            f"{r['peak_memory_mb'] / 1024:.1f} GiB of tensors, {r['gflops']:.1f} GFLOP an image, "
            f"{r['parameters'] / 1e6:.1f} M parameters")
    report = dict(results=[dict(r, gflops=round(r['gflops'], 4)) for r in results])
    if args.results_file:
        write_text(Path(args.results_file), json.dumps(report, indent=2) + '\n')
    return report


def benchmark(args: BenchmarkConfig) -> Dict[str, Any]:
    """Time the model that the arguments describe, and those it is compared with, turn by turn.

    A training step is the one of train.py, without its logs.

    Args:
        args: What `parse_benchmark_args` gives.

    Returns:
        `device`, `threads`, `dtype`, `ceilings` and `results`, one for each model and kind of work: images a second
        as the median of rounds and all rounds, parameters, floating-point operations per image, peak memory,
        achieved FLOP/s and, for training, milliseconds by part. Of `bench` memory `results` alone, without times: a
        step that is not compiled, without what libraries set aside for themselves.

    Raises:
        InputError: If anything given cannot work.
    """
    check_results_file(args.results_file)
    if is_distributed_env():
        raise InputError(
            f"WORLD_SIZE is {os.environ.get('WORLD_SIZE')}, but a benchmark is of one process: do not use torchrun.")
    check_model_name(args.model)
    if args.bench == 'memory':
        return _tell_memory(args)
    device = resolve_device(args.device)
    tune_device(device)
    check_compiler(args.torchcompile, args.torchcompile_mode, device)
    dtype = resolve_autocast(args, device) or torch.float32
    contestants = []
    for name, kind in (('train', _training), ('inference', _inference)):
        if args.bench in (name, 'both'):
            run = _shike_run(args)
            contestants.append(kind(run, args.model))
            contestants += [kind(_plain_run(args, other, run), other) for other in args.compare]
    ceilings = measure_ceilings(device, dtype)
    rounds = rates_by_turns({one.step: one.num_iter for one in contestants}, device, args.num_rounds)
    report = dict(
        device=torch.cuda.get_device_name(device) if device.type == 'cuda' else str(device),
        threads=torch.get_num_threads(),
        dtype=str(dtype).split('.')[1],
        channels_last=args.channels_last,
        data=args.dataset or args.data_dir or 'noise',
        ceilings=ceilings,
        results=[],
    )
    for one, rates in zip(contestants, rounds):
        rates = [args.batch_size * rate for rate in rates]
        rate = statistics.median(rates)
        achieved = rate * one.result['gflops']
        report['results'].append(dict(
            one.result,
            gflops=round(one.result['gflops'], 4),
            images_per_second=round(rate, 2),
            rounds=[round(r, 2) for r in rates],
            achieved_gflops=round(achieved, 1),
            share_of_matmul=round(achieved / ceilings['matmul_gflops'], 3),
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
    ceilings, results = report['ceilings'], report['results']
    rows = [('model', 'bench', 'params M', 'GFLOP', 'img/s', 'GFLOP/s', 'of peak', 'MiB')]
    rows += [
        (
            r['model'],
            r['bench'] + ('*' if r['compiled'] else ''),
            f"{r['parameters'] / 1e6:.2f}",
            f"{r['gflops']:.3f}",
            f"{r['images_per_second']:.1f}",
            f"{r['achieved_gflops']:.1f}",
            f"{r['share_of_matmul']:.1%}",
            f"{r['peak_memory_mb']:.1f}",
        )
        for r in results
    ]
    lines = [
        f"{report['device']}, {report['threads']} threads, {report['dtype']}, data: {report['data']}, * compiled; "
        f"matrix product {ceilings['matmul_gflops']:g} GFLOP/s, copy {ceilings['copy_gb']:g} GB/s",
        *(f'{model:24}{bench:17}' + ''.join(f'{cell:>10}' for cell in cells) for model, bench, *cells in rows),
    ]
    for r in results:
        if 'part_ms' in r:
            parts = ', '.join(f'{part} {ms:.1f}' for part, ms in r['part_ms'].items())
            lines.append(f"{r['model']}, ms a step: {parts}")
    for r in results:
        if r['model'] == results[0]['model']:
            first = r  # what is compared with it follows
            continue
        ratio = first['images_per_second'] / r['images_per_second']
        predicted = r['gflops'] / first['gflops']
        memory = first['peak_memory_mb'] / r['peak_memory_mb']
        lines.append(
            f"{first['model']} over {r['model']}, {r['bench']}: {ratio:.3f} of its images a second, by their FLOPs "
            f'{predicted:.3f}: {ratio / predicted:.3f}; {memory:.2f} of its memory')
    return '\n'.join(lines)


parse_benchmark_args = partial(
    parse, BenchmarkConfig, 'Time training and inference; without a data set, on noise.')


CONFIG = BenchmarkConfig


def main() -> int:
    return run_script(lambda: benchmark(parse_benchmark_args()))
