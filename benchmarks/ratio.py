#!/usr/bin/env python3
"""Training steps of the short CIFAR-100-LT recipe against `baseline.py`, data included, each side in turn.

Each turn is a process of its own, so that neither side inherits the other's memory or threads.
"""
import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
RECIPE = HERE.parent / 'hparams' / 'cifar100_lt_if100_short.yaml'
SIDES = {'baseline': None, 'recipe': [], 'recipe in float32': ['--no-amp']}


def measure(side, stage, args, file):
    common = [
        '--data-dir', args.data_dir, '--stage', str(stage), '--device', args.device, '--results-file', file,
        '--num-warm-iter', '10',
    ]
    if side == 'baseline':
        command = [HERE / 'baseline.py', '--workers', args.workers, '--num-bench-iter', args.num_bench_iter]
    else:
        command = [
            HERE / 'benchmark.py', '--hparams', RECIPE, '--bench', 'train', '--num-rounds', '1', *SIDES[side]]
    subprocess.run([sys.executable, *map(str, command), *common], check=True, stdout=subprocess.DEVNULL)
    result = json.loads(Path(file).read_text())
    return result if side == 'baseline' else dict(result['results'][0], dtype=result['dtype'])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--data-dir', required=True, help='folder of CIFAR-100')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--workers', type=int, default=2, help="the baseline's DataLoader workers")
    parser.add_argument('--num-turns', type=int, default=5, help='turns of each side. The median counts')
    parser.add_argument('--num-bench-iter', type=int, default=40, help="the baseline's timed steps of a turn")
    parser.add_argument('--stages', type=int, nargs='+', default=[1, 2], choices=[1, 2])
    parser.add_argument('--results-file', help='JSON file to write the figures to')
    args = parser.parse_args()

    recipe = yaml.safe_load(RECIPE.read_text())
    interval = min(recipe['val_interval'], recipe['epochs'])
    report = []
    with tempfile.TemporaryDirectory() as folder:
        for stage in args.stages:
            results = {side: [] for side in SIDES}
            for turn in range(args.num_turns):
                for side in SIDES:
                    results[side].append(measure(side, stage, args, f'{folder}/{turn}.json'))
            rates = {side: [one['images_per_second'] for one in turns] for side, turns in results.items()}
            medians = {side: statistics.median(values) for side, values in rates.items()}
            epoch_images = results['baseline'][0]['epoch_images']
            eval_seconds = statistics.median(one['eval_seconds'] for one in results['baseline'])
            epoch_seconds = statistics.median(one['epoch_seconds'] for one in results['baseline'])
            for side in SIDES:
                seconds = epoch_seconds
                if side != 'baseline':  # evaluations cost no more than those of the baseline
                    seconds = epoch_images / medians[side] + eval_seconds / interval
                row = dict(
                    stage=stage,
                    side=side,
                    dtype=results[side][0].get('dtype', 'float32'),
                    images_per_second=medians[side],
                    turns=rates[side],
                    ratio=round(medians[side] / medians['baseline'], 2),
                    epoch_ratio=round(epoch_seconds / seconds, 2),
                )
                report.append(row)
                print(
                    f"stage {stage}, {side:18} {row['dtype']:9} {row['images_per_second']:8.1f} images/s, "
                    f"{row['ratio']:.2f} times the baseline; {row['epoch_ratio']:.2f} with evaluations; "
                    f"turns {row['turns']}",
                    flush=True,
                )
    if args.results_file:
        Path(args.results_file).write_text(json.dumps(report, indent=2) + '\n')


if __name__ == '__main__':
    main()
