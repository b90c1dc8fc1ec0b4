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
from timm.task import ClassificationTask
from timm.utils import is_distributed_env
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import PARTS, count_training_flops, measure_ceilings, on_paper, peak_memory, time_parts  # noqa: E402

from shike_timm.cli.script import run_script  # noqa: E402
from shike_timm.costs import rates_by_turns  # noqa: E402
from shike_timm.data import TrainingData, find_dataset  # noqa: E402
from shike_timm.data.dataset import in_memory_set  # noqa: E402
from shike_timm.data.device_loader import DeviceLoader  # noqa: E402
from shike_timm.devices import resolve_device  # noqa: E402
from shike_timm.errors import InputError, one_line  # noqa: E402
from shike_timm.files import check_results_file, write_text  # noqa: E402
from shike_timm.models import Shike  # noqa: E402
from shike_timm.models.create import check_model_name, create_model, resolve_data_config  # noqa: E402
from shike_timm.options import option, parse  # noqa: E402
from shike_timm.training.config import RunConfig  # noqa: E402
from shike_timm.training.optimizer import check_compiler, create_optimizer, resolve_autocast  # noqa: E402
from shike_timm.training.phases import Phase, plan_phases  # noqa: E402
from shike_timm.training.runs import prepare  # noqa: E402
from shike_timm.training.trainer import Trainer  # noqa: E402

NUM_BENCH_ITER = 40  # steps of a round on noise


@dataclass(frozen=True)
class BenchmarkConfig(RunConfig):
    """Benchmark."""

    bench: str = option(
        'both', 'what to time. memory times nothing but counts the memory that a training step needs on any device',
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


# The parts of training that this script needs: a trainer, its phase and one step.

def _phase(config: Any) -> Phase:
    phases = plan_phases(config)
    if config.stage > len(phases):
        raise InputError(
            f'--stage {config.stage} does not exist for --method {config.method} without --crt-epochs: add some.')
    return phases[config.stage - 1]


def _on_data(config: BenchmarkConfig) -> Trainer:
    return prepare(config, [_phase(config)], resolve_device(config.device))


def _on_noise(config: BenchmarkConfig, model: Any, data_config: Dict[str, Any]) -> Trainer:
    """A trainer of any model over one batch of noise."""
    device = resolve_device(config.device)
    channels, height, width = data_config['input_size']
    rng = np.random.default_rng(config.seed)
    images = rng.integers(0, 256, (config.batch_size, height, width, channels), dtype=np.uint8)
    targets = rng.integers(0, model.num_classes, config.batch_size)
    loader = DeviceLoader(images, targets, data_config['mean'], data_config['std'], config.batch_size, device)
    names = [str(c) for c in range(model.num_classes)]
    noise = in_memory_set(images, targets, names)
    data = TrainingData(noise, noise, [1] * model.num_classes, names)
    return Trainer(config, [_phase(config)], data, data_config, model.to(device), loader, loader, device)


def _start(trainer: Trainer) -> None:
    """Make task and optimizer. A plain model of timm has timm's own task."""
    config: Any = trainer.config
    if isinstance(trainer.model, Shike):
        trainer.start(_phase(config))
        return
    task: Any = ClassificationTask(trainer.model, device=trainer.device, verbose=False)
    task.to(memory_format=torch.channels_last if config.channels_last else torch.contiguous_format)
    trainer.task, trainer.optimizer = task, create_optimizer(config, _phase(config).lr, trainer.model)


def _compile(trainer: Trainer) -> bool:
    config: Any = trainer.config
    compiled = bool(config.torchcompile) and not (isinstance(trainer.model, Shike) and trainer.phase.is_retraining)
    if compiled:
        trainer.task.compile(backend=config.torchcompile, mode=config.torchcompile_mode)
    return compiled


# What is timed.

def _shike(config: BenchmarkConfig) -> Trainer:
    published = find_dataset(config.dataset).num_classes  # the images of a published data set need not be here
    if config.data_dir or config.dataset and not published:
        return _on_data(config)
    if config.kd_model_name:
        raise InputError(
            f"--kd-model-name '{config.kd_model_name}' teaches the classes of a data set: add --dataset or --data-dir.")
    known: Any = config.num_classes or published or timm.get_pretrained_cfg_value(config.model, 'num_classes')
    model = create_model(config, known, config.channels, img_size=config.image_size)
    return _on_noise(config, model, resolve_data_config(config, model))


def _plain(config: BenchmarkConfig, name: str, like: Trainer) -> Trainer:
    """A plain model of timm on noise with the image size and classes of the SHIKE model."""
    channels = like.data_config['input_size'][0]
    try:
        model = timm.create_model(name, num_classes=like.data.num_classes, in_chans=channels)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"model '{name}' cannot be made: {one_line(error)}.") from error
    return _on_noise(config, model, like.data_config)


def _describe(step: Callable[[], Any], trainer: Trainer, held: Iterable[Tensor], **result: Any) -> Dict[str, Any]:
    batch_size = trainer.config.batch_size
    return dict(
        **result,
        batch_size=batch_size,
        parameters=sum(p.numel() for p in trainer.model.parameters()),
        gflops=count_training_flops(step) / batch_size / 1e9,
        peak_memory_mb=round(peak_memory(step, trainer.device, held) / 2 ** 20, 1),
    )


def _training_step(
        trainer: Trainer,
        name: str,
        batches: Iterator[Sequence[Tensor]],
) -> Tuple[Callable[[], None], Dict[str, Any]]:
    """A training step and its costs."""
    task, config = trainer.task, trainer.config
    task.train()

    def step() -> None:
        trainer.step(*next(batches))

    step()  # makes the state of the optimizer
    held = [*task.parameters(), *task.buffers()]
    held += [value for state in trainer.optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    bench = f'train, stage {config.stage}' if isinstance(trainer.model, Shike) else 'train'
    return step, _describe(step, trainer, held, model=name, bench=bench)


def _memory(trainer: Trainer, name: str) -> Dict[str, Any]:
    """Costs of a training step that is not run. Any type of half precision costs the same."""
    trainer.autocast = torch.bfloat16 if trainer.config.amp else None
    _start(trainer)
    batch = next(iter(trainer.train_loader))
    with on_paper(trainer.task) as blank:
        return _training_step(trainer, name, repeat([blank(tensor) for tensor in batch]))[-1]


def _training(trainer: Trainer, name: str) -> Contestant:
    config: Any = trainer.config
    loader = trainer.train_loader
    _start(trainer)
    step, result = _training_step(trainer, name, chain.from_iterable(repeat(loader)))
    result['compiled'] = _compile(trainer)
    # Many batches are augmented at once, so a round on data is an epoch. Noise is one batch.
    num_iter = config.num_bench_iter or (len(loader) if len(loader) > 1 else NUM_BENCH_ITER)
    for _ in range(config.num_warm_iter):
        step()
    with time_parts(trainer.task, trainer.optimizer, trainer.device) as seconds:
        for _ in range(num_iter):
            step()
    result['part_ms'] = {part: round(1000 * seconds[part] / num_iter, 3) for part in PARTS}
    return Contestant(step, num_iter, result)


def _inference(trainer: Trainer, name: str) -> Contestant:
    config: Any = trainer.config
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    model: Callable[[Tensor], Tensor] = trainer.model.eval().to(memory_format=memory_format)
    images = next(iter(trainer.train_loader))[0].contiguous(memory_format=memory_format)

    def step() -> None:
        enabled = trainer.autocast is not None
        with torch.inference_mode(), torch.autocast(trainer.device.type, trainer.autocast, enabled=enabled):
            model(images)

    result = _describe(step, trainer, trainer.model.parameters(), model=name, bench='inference')
    result['compiled'] = bool(config.torchcompile)
    if config.torchcompile:
        model = torch.compile(trainer.model, backend=config.torchcompile, mode=config.torchcompile_mode)
    for _ in range(config.num_warm_iter):
        step()
    return Contestant(step, config.num_bench_iter or NUM_BENCH_ITER, result)


def _write(config: BenchmarkConfig, report: Dict[str, Any]) -> Dict[str, Any]:
    if config.results_file:
        write_text(Path(config.results_file), json.dumps(report, indent=2) + '\n')
    return report


def count_memory(config: BenchmarkConfig) -> Dict[str, Any]:
    """Memory of a training step that is neither run nor compiled, without the scratch space of libraries."""
    config = replace(config, device='cpu', amp_dtype='bfloat16')
    trainer = _shike(config)
    results = [_memory(trainer, config.model)]
    results += [_memory(_plain(config, other, trainer), other) for other in config.compare]
    size = ' x '.join(map(str, trainer.data_config['input_size'])) + (' in half precision' if config.amp else '')
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
    check_compiler(config.torchcompile, config.torchcompile_mode, device)
    dtype = resolve_autocast(config, device) or torch.float32
    contestants = []
    for name, kind in (('train', _training), ('inference', _inference)):
        if config.bench in (name, 'both'):
            trainer = _shike(config)
            contestants.append(kind(trainer, config.model))
            contestants += [kind(_plain(config, other, trainer), other) for other in config.compare]
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
    """Text tables of what `benchmark` returns, with ratios of throughput and the ratios that FLOPs predict."""
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
            first = r  # the models to compare follow
            continue
        ratio = first['images_per_second'] / r['images_per_second']
        predicted = r['gflops'] / first['gflops']
        memory = first['peak_memory_mb'] / r['peak_memory_mb']
        lines.append(
            f"{first['model']} over {r['model']}, {r['bench']}: {ratio:.3f} of its images a second, by their FLOPs "
            f'{predicted:.3f}: {ratio / predicted:.3f}; {memory:.2f} of its memory')
    return '\n'.join(lines)


parse_benchmark_args = partial(
    parse, BenchmarkConfig, 'Time training and inference, on noise if there is no data set.')


if __name__ == '__main__':
    sys.exit(run_script(lambda: benchmark(parse_benchmark_args())))
