"""A tiny run, and what it leaves."""
import json

from conftest import TINY

from shike_timm.cli.train import parse_train_args
from shike_timm.training.runs import train


def without_seconds(path):
    metrics = json.loads((path / 'metrics.json').read_text())
    for result in metrics.values():
        del result['seconds']
    return metrics


def run(tmp_path, *extra):
    metrics = train(parse_train_args([*TINY, '--output', str(tmp_path), *map(str, extra)]))
    return tmp_path / 'run', metrics
