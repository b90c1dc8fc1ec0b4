"""Two processes of one thread against one of two threads on a CPU: images a second of whole epochs, turn by turn.

    python benchmarks/processes.py [TURNS]

On an idle machine with two cores; takes a minute or two a turn.
"""
import csv
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
EPOCHS = 3  # the first one warms up
OPTIONS = [
    '--model', 'resnet32_shike', '--dataset', 'digits_lt', '--imb-factor', '1', '--img-size', '32', '--workers', '0',
    '--train-crop-mode', 'pad', '--color-jitter', '0', '--epochs', str(EPOCHS), '--warmup-epochs', '0', '--crt-epochs',
    '0', '--val-interval', str(EPOCHS), '--lr', '0.01', '--device', 'cpu', '--experiment', 'run']
NUM_IMAGES = 1152  # nine batches of 128


def rate(num_processes: int) -> float:
    """Images a second of a number of processes. They share two threads and batches of 128."""
    command = [sys.executable, *(['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node',
                                  str(num_processes)] if num_processes > 1 else []), 'train.py']
    with tempfile.TemporaryDirectory() as output:
        subprocess.run(
            [*command, *OPTIONS, '--batch-size', str(128 // num_processes), '--output', output], cwd=ROOT, check=True,
            capture_output=True, env=dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS=str(2 // num_processes)))
        with Path(output, 'run', 'summary.csv').open() as file:
            seconds = [float(row['train_seconds']) for row in csv.DictReader(file)]
    return NUM_IMAGES * (EPOCHS - 1) / sum(seconds[1:])


def main(num_turns: int = 3) -> None:
    ratios = []
    for _ in range(num_turns):
        one, two = rate(1), rate(2)
        ratios.append(two / one)
        print(f'one process {one:.1f}, two {two:.1f} images a second: {two / one:.3f}', flush=True)
    print(f'median {statistics.median(ratios):.3f}')


main(*map(int, sys.argv[1:]))
