#!/usr/bin/env python3
"""Rejection and calibration measured on images that chose neither threshold nor temperature.

The images of `shike eval --save-logits` are cut into two halves at random. The threshold that keeps 95 % of the right
answers and the temperature are chosen on one half and measured on the other one, and the other way round. The figures
are means over both ways and all seeds, in percent.
"""
import argparse
import json
import statistics

import torch

from shike_timm.metrics import ExpertEvaluator, fit_temperature
from shike_timm.report.logits import load_logits


def measure(logits, targets, threshold=None):
    evaluator = ExpertEvaluator(1, [0] * logits.shape[1], threshold=threshold)
    evaluator.update(logits[:, None], targets)
    return evaluator.compute()


def right_kept(logits, targets, threshold):
    """Share of the right answers whose probability reaches the threshold, in percent."""
    confidence, said = logits.softmax(-1).max(-1)
    return 100 * float((confidence[said == targets] >= threshold).float().mean())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('files', nargs='+', help='npz files of shike eval --save-logits')
    parser.add_argument('--seeds', type=int, default=10)
    args = parser.parse_args()
    for path in args.files:
        saved = load_logits(path)
        logits, targets = torch.from_numpy(saved.logits).mean(1), torch.from_numpy(saved.targets).long()
        rows = []
        for seed in range(args.seeds):
            halves = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed)).chunk(2)
            for own, other in (halves, halves[::-1]):
                temperature = fit_temperature(logits[own], targets[own])
                row = dict(temperature=temperature)
                for name, divided in (('before', logits), ('after', logits / temperature)):
                    threshold = measure(divided[own], targets[own])['reject']['threshold']
                    found = measure(divided[other], targets[other], threshold)
                    row[name] = dict(
                        top1=found['top1'], ece=found['ece'], **found['reject'],
                        right_kept=right_kept(divided[other], targets[other], threshold))
                rows.append(row)
        result = dict(file=path, images=len(targets), temperature=round(statistics.mean(
            row['temperature'] for row in rows), 3))
        for name in ('before', 'after'):
            result[name] = {
                key: round(statistics.mean(row[name][key] for row in rows), 3) for key in rows[0][name]}
        print(json.dumps(result))


if __name__ == '__main__':
    main()
