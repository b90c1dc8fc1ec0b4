#!/usr/bin/env python3
"""Throughput, time per part, peak memory and achieved FLOP/s of models, side by side in one run."""
import json
import os
import statistics
import sys
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import PARTS, measure_ceilings, on_paper, peak_memory, time_parts  # noqa: E402

from shike_timm.checkpoints import check_results_file, write_text  # noqa: E402
from shike_timm.cli.script import run_script  # noqa: E402
from shike_timm.costs import count_flops, rates_by_turns  # noqa: E402
from shike_timm.data import TrainingData, find_dataset  # noqa: E402
from shike_timm.data.datasets import in_memory_set  # noqa: E402
from shike_timm.data.in_memory import DeviceLoader  # noqa: E402
from shike_timm.devices import resolve_device, tune_device  # noqa: E402
from shike_timm.errors import InputError, one_line  # noqa: E402
from shike_timm.models import Shike  # noqa: E402
from shike_timm.options import option, parse  # noqa: E402
from shike_timm.training.build import (  # noqa: E402
    check_compiler,
    check_model_name,
    create_model,
    create_optimizer,
    resolve_autocast,
    resolve_data_config,
)
from shike_timm.training.config import RunConfig  # noqa: E402
from shike_timm.training.engine import train_step  # noqa: E402
from shike_timm.training.methods import Stage, plan_stages  # noqa: E402
from shike_timm.training.runs import (  # noqa: E402
    Run,
    compile_task,
    create_loss_scaler,
    create_task,
    loop_config,
    prepare,
)

NUM_BENCH_ITER = 40  # steps of a round on noise


@dataclass(frozen=True)
class BenchmarkConfig(RunConfig):
    """Benchmark."""

    bench: str = option(
        'both', 'what to time. memory times nothing and counts the memory that a training step needs on any device',
        choices=('both', 'train', 'inference', 'memory'))
    stage: int = option(1, 'stage of training to time', choices=(1, 2))
    compare: List[str] = option(
        [], "models of timm to time beside it, turn by turn, on noise of the same size", nargs='+')
    num_warm_iter: int = option(10, 'steps before timing', low=1)
    num_bench_iter: Optional[int] = option(
        None, 'steps of a round. The default is an epoch of data or 40 steps on noise', low=1)
    num_rounds: int = option(5, 'rounds. The median counts', low=1)
    results_file: Optional[str] = option(None, 'JSON file to write the figures to', 'FILE')


@dataclass
class Contestant:
    """A model to time. `step` works on one batch; `num_iter` steps make a round."""

    step: Callable[[], Any]
    num_iter: int
    result: Dict[str, Any]


# The parts of training that this script needs: a run, its stage, its task and one step.

def _stage(config: BenchmarkConfig) -> Stage:
    stages = plan_stages(config)
    if config.stage > len(stages):
        raise InputError(
            f'--stage {config.stage} is left out by --method {config.method} without --crt-epochs: add some.')
    return stages[config.stage - 1]


def _run_on_data(config: BenchmarkConfig) -> Run:
    return prepare(config, [_stage(config)])


def _run_on_noise(config: BenchmarkConfig, model: Any, data_config: Dict[str, Any]) -> Run:
    """A run of any model over one batch of noise."""
    device = resolve_device(config.device)
    channels, height, width = data_config['input_size']
    rng = np.random.default_rng(config.seed)
    images = rng.integers(0, 256, (config.batch_size, height, width, channels), dtype=np.uint8)
    targets = rng.integers(0, model.num_classes, config.batch_size)
    loader = DeviceLoader(images, targets, data_config['mean'], data_config['std'], config.batch_size, device)
    names = [str(c) for c in range(model.num_classes)]
    noise = in_memory_set(images, targets, names)
    data = TrainingData(noise, noise, [1] * model.num_classes, names)
    return Run(config, device, resolve_autocast(config, device), data, data_config, model.to(device), loader, loader)


def _create_task(run: Run) -> TrainingTask:
    if isinstance(run.model, Shike):
        return create_task(run, _stage(run.args))
    task = ClassificationTask(run.model, device=run.device, verbose=False)
    task.to(memory_format=torch.channels_last if run.args.channels_last else torch.contiguous_format)
    return task


def _compile(run: Run, task: TrainingTask) -> bool:
    stage = _stage(run.args) if isinstance(run.model, Shike) else plan_stages(run.args)[0]
    return compile_task(task, run.args, stage)


def _create_step(
        run: Run,
        task: TrainingTask,
        batches: Iterator[Sequence[Tensor]],
) -> Tuple[torch.optim.Optimizer, Callable[[], None]]:
    optimizer = create_optimizer(run.args, _stage(run.args).lr, run.model)
    scaler, config = create_loss_scaler(run), loop_config(run)
    task.train()

    def step() -> None:
        images, target = next(batches)
        train_step(task, images, target, optimizer, config, scaler)

    return optimizer, step


# What is timed.

def _shike_run(config: BenchmarkConfig) -> Run:
    published = find_dataset(config.dataset).num_classes  # of a data set whose images need not be here
    if config.data_dir or config.dataset and not published:
        return _run_on_data(config)
    if config.kd_model_name:
        raise InputError(
            f"--kd-model-name '{config.kd_model_name}' teaches the classes of a data set: add --dataset or --data-dir.")
    known: Any = config.num_classes or published or timm.get_pretrained_cfg_value(config.model, 'num_classes')
    model = create_model(config, known)
    return _run_on_noise(config, model, resolve_data_config(config, model))


def _plain_run(config: BenchmarkConfig, name: str, like: Run) -> Run:
    """A plain model of timm on noise with the image size and classes of the SHIKE model."""
    channels = like.data_config['input_size'][0]
    try:
        model = timm.create_model(name, num_classes=like.data.num_classes, in_chans=channels)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"model '{name}' cannot be made: {one_line(error)}.") from error
    return _run_on_noise(config, model, like.data_config)


def _describe(step: Callable[[], Any], run: Run, held: Iterable[Tensor], **result: Any) -> Dict[str, Any]:
    batch_size = run.args.batch_size
    return dict(
        **result,
        batch_size=batch_size,
        parameters=sum(p.numel() for p in run.model.parameters()),
        gflops=count_flops(step) / batch_size / 1e9,
        peak_memory_mb=round(peak_memory(step, run.device, held) / 2 ** 20, 1),
    )


def _training_step(
        run: Run,
        name: str,
        task: TrainingTask,
        batches: Iterator[Sequence[Tensor]],
) -> Tuple[torch.optim.Optimizer, Callable[[], None], Dict[str, Any]]:
    """The optimizer of a task, a training step, and the costs of the step."""
    optimizer, step = _create_step(run, task, batches)
    step()  # makes the state of the optimizer
    held = [*task.parameters(), *task.buffers()]
    held += [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    bench = f'train, stage {run.args.stage}' if isinstance(run.model, Shike) else 'train'
    return optimizer, step, _describe(step, run, held, model=name, bench=bench)


def _memory(run: Run, name: str) -> Dict[str, Any]:
    """Costs of a training step that is not run. Half precision stands for whichever type the device has."""
    run = replace(run, autocast=torch.bfloat16 if run.args.amp else None)
    task = _create_task(run)
    batch = next(iter(run.train_loader))
    with on_paper(task) as blank:
        return _training_step(run, name, task, repeat([blank(tensor) for tensor in batch]))[-1]


def _training(run: Run, name: str) -> Contestant:
    config, task = run.args, _create_task(run)
    optimizer, step, result = _training_step(run, name, task, chain.from_iterable(repeat(run.train_loader)))
    result['compiled'] = _compile(run, task)
    # Many batches are augmented at once, so a round on data is an epoch. Noise is one batch.
    num_iter = config.num_bench_iter or (len(run.train_loader) if len(run.train_loader) > 1 else NUM_BENCH_ITER)
    for _ in range(config.num_warm_iter):
        step()
    with time_parts(task, optimizer, run.device) as seconds:
        for _ in range(num_iter):
            step()
    result['part_ms'] = {part: round(1000 * seconds[part] / num_iter, 3) for part in PARTS}
    return Contestant(step, num_iter, result)


def _inference(run: Run, name: str) -> Contestant:
    config = run.args
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    model: Callable[[Tensor], Tensor] = run.model.eval().to(memory_format=memory_format)
    images = next(iter(run.train_loader))[0].contiguous(memory_format=memory_format)

    def step() -> None:
        with torch.inference_mode(), torch.autocast(run.device.type, run.autocast, enabled=run.autocast is not None):
            model(images)

    result = _describe(step, run, run.model.parameters(), model=name, bench='inference')
    result['compiled'] = bool(config.torchcompile)
    if config.torchcompile:
        model = torch.compile(run.model, backend=config.torchcompile, mode=config.torchcompile_mode)
    for _ in range(config.num_warm_iter):
        step()
    return Contestant(step, config.num_bench_iter or NUM_BENCH_ITER, result)


def _write(config: BenchmarkConfig, report: Dict[str, Any]) -> Dict[str, Any]:
    if config.results_file:
        write_text(Path(config.results_file), json.dumps(report, indent=2) + '\n')
    return report


def count_memory(config: BenchmarkConfig) -> Dict[str, Any]:
    """Memory of a training step that is neither run nor compiled, without what libraries set aside for themselves."""
    config = replace(config, device='cpu', amp_dtype='bfloat16')
    run = _shike_run(config)
    results = [_memory(run, config.model)]
    results += [_memory(_plain_run(config, other, run), other) for other in config.compare]
    size = ' x '.join(map(str, run.data_config['input_size'])) + (' in half precision' if config.amp else '')
    for r in results:
        print(
            f"{r['model']}, {r['bench']}, {r['batch_size']} images of {size}: "
            f"{r['peak_memory_mb'] / 1024:.1f} GiB of tensors, {r['gflops']:.1f} GFLOP an image, "
            f"{r['parameters'] / 1e6:.1f} M parameters")
    return _write(config, dict(results=[dict(r, gflops=round(r['gflops'], 4)) for r in results]))


def benchmark(config: BenchmarkConfig) -> Dict[str, Any]:
    """Time a model and those to compare with it, turn by turn. A training step is that of `shike train` without logs.

    Returns:
        `device`, `threads`, `dtype`, `ceilings` and `results`, one for each model and kind of work: images a second
        (the median of rounds, and all rounds), parameters, floating-point operations of an image, peak memory,
        achieved FLOP/s and, for training, milliseconds by part. With `bench` memory only `results`, without times.
    """
    check_results_file(config.results_file)
    if is_distributed_env():
        raise InputError(
            f"WORLD_SIZE is {os.environ.get('WORLD_SIZE')}, but a benchmark is of one process: do not use torchrun.")
    check_model_name(config.model)
    if config.bench == 'memory':
        return count_memory(config)
    device = resolve_device(config.device)
    tune_device(device)
    check_compiler(config.torchcompile, config.torchcompile_mode, device)
    dtype = resolve_autocast(config, device) or torch.float32
    contestants = []
    for name, kind in (('train', _training), ('inference', _inference)):
        if config.bench in (name, 'both'):
            run = _shike_run(config)
            contestants.append(kind(run, config.model))
            contestants += [kind(_plain_run(config, other, run), other) for other in config.compare]
    ceilings = measure_ceilings(device, dtype)
    rounds = rates_by_turns({one.step: one.num_iter for one in contestants}, device, config.num_rounds)
    report = dict(
        device=torch.cuda.get_device_name(device) if device.type == 'cuda' else str(device),
        threads=torch.get_num_threads(),
        dtype=str(dtype).split('.')[1],
        channels_last=config.channels_last,
        data=config.dataset or config.data_dir or 'noise',
        ceilings=ceilings,
        results=[],
    )
    for one, rates in zip(contestants, rounds):
        rates = [config.batch_size * rate for rate in rates]
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
    return _write(config, report)


def format_report(report: Dict[str, Any]) -> str:
    """Text tables of what `benchmark` returns. Ratios of throughput stand beside those that FLOPs predict."""
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
            first = r  # the models to compare with it follow
            continue
        ratio = first['images_per_second'] / r['images_per_second']
        predicted = r['gflops'] / first['gflops']
        memory = first['peak_memory_mb'] / r['peak_memory_mb']
        lines.append(
            f"{first['model']} over {r['model']}, {r['bench']}: {ratio:.3f} of its images a second, by their FLOPs "
            f'{predicted:.3f}: {ratio / predicted:.3f}; {memory:.2f} of its memory')
    return '\n'.join(lines)


parse_benchmark_args = partial(
    parse, BenchmarkConfig, 'Time training and inference. Without a data set it takes noise.')


if __name__ == '__main__':
    sys.exit(run_script(lambda: benchmark(parse_benchmark_args())))
