"""Two processes of one thread against one of two threads on a CPU: images a second of whole epochs, turn by turn.

    python benchmarks/processes.py [TURNS]

On an idle machine with two cores; takes a minute or two a turn. Before the turns it tells what exchange costs a step.
"""
import csv
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, List

ROOT = Path(__file__).parents[1]
EPOCHS = 3  # the first one warms up
OPTIONS = [
    '--model', 'resnet32_shike', '--dataset', 'digits_lt', '--imb-factor', '1', '--img-size', '32', '--workers', '0',
    '--train-crop-mode', 'pad', '--color-jitter', '0', '--epochs', str(EPOCHS), '--warmup-epochs', '0', '--crt-epochs',
    '0', '--val-interval', str(EPOCHS), '--lr', '0.01', '--device', 'cpu', '--experiment', 'run']
NUM_IMAGES = 1152  # nine batches of 128


def launcher(num_processes: int) -> List[str]:
    """The beginning of a command line that starts a script in a number of processes."""
    several = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(num_processes)]
    return [sys.executable, *(several if num_processes > 1 else [])]


def rate(num_processes: int) -> float:
    """Images a second of a number of processes. They share two threads and batches of 128."""
    command = [*launcher(num_processes), 'train.py']
    with tempfile.TemporaryDirectory() as output:
        subprocess.run(
            [*command, *OPTIONS, '--batch-size', str(128 // num_processes), '--output', output], cwd=ROOT, check=True,
            capture_output=True, env=dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS=str(2 // num_processes)))
        with Path(output, 'run', 'summary.csv').open() as file:
            seconds = [float(row['train_seconds']) for row in csv.DictReader(file)]
    return NUM_IMAGES * (EPOCHS - 1) / sum(seconds[1:])


def _milliseconds(trainer: Any, update: bool) -> float:
    """Of a step, the mean over five batches. Without updates, processes exchange nothing."""
    batches = list(itertools.islice(trainer.train_loader, 5))
    begun = time.perf_counter()
    for images, target in batches:
        trainer.step(images, target, update)
    return 1000 * (time.perf_counter() - begun) / len(batches)


def time_steps() -> None:
    """Milliseconds of a step in this process, with its parts switched off in turn. torchrun starts it twice."""
    from shike_timm.cli.train import parse_train_args
    from shike_timm.distributed import join_processes, rank, world_size
    from shike_timm.training import runs
    from shike_timm.training.phases import plan_phases

    device = join_processes('cpu')
    config = parse_train_args([*OPTIONS, '--batch-size', str(128 // world_size())])
    variants = {'copies': {}, 'views': dict(gradient_as_bucket_view=True)}
    for name, options in variants.items() if world_size() > 1 else [('one process', {})]:
        trainer = runs.prepare(config, plan_phases(config), device)
        trainer.start(trainer.phases[0])
        if world_size() > 1:
            trainer.task.prepare_distributed(broadcast_buffers=False, **options)
        steps = [_milliseconds(trainer, update) for update in (True, True, False, True, False, True, False)][1:]
        whole, alone = statistics.median(steps[::2]), statistics.median(steps[1::2])
        if not rank():
            print(f'  {name}: a step {whole:.1f} ms, without exchange and optimizer {alone:.1f} ms', flush=True)


def main(num_turns: int = 3) -> None:
    for number in (1, 2):
        print(f'{number} processes', flush=True)
        subprocess.run(
            [*launcher(number), __file__, 'steps'], cwd=ROOT, check=True, stderr=subprocess.DEVNULL,
            env=dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS=str(2 // number)))
    ratios = []
    for _ in range(num_turns):
        one, two = rate(1), rate(2)
        ratios.append(two / one)
        print(f'one process {one:.1f}, two {two:.1f} images a second: {two / one:.3f}', flush=True)
    print(f'median {statistics.median(ratios):.3f}')


if sys.argv[1:] == ['steps']:
    time_steps()
else:
    main(*map(int, sys.argv[1:]))
