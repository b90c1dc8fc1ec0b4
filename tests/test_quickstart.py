"""What the README's first command promises."""
import math
import statistics

import pytest
from conftest import ROOT

from shike_timm.commands.train import parse_train_args
from shike_timm.runs import train

SEED_STD = 5.  # points of top-1 between seeds, over six of each side


@pytest.mark.slow
@pytest.mark.parametrize('seed', [0, 1])
def test_stage_two_lifts_few_shot_classes_and_the_total(tmp_path, capsys, seed):
    metrics = train(parse_train_args(
        ['--hparams', str(ROOT / 'hparams' / 'quickstart.yaml'), '--output', str(tmp_path), '--seed', str(seed)]))
    one, two = metrics['stage_one'], metrics['stage_two']
    assert two['few'] >= one['few'] + 10
    assert two['top1'] > one['top1']
    table = capsys.readouterr().out
    assert table.count('ensemble') == 2 and table.count('expert') == 6


@pytest.mark.slow
def test_fast_paths_reach_the_accuracy_of_the_plain_ones(tmp_path):
    """Three seeds each: bfloat16 where the CPU has it, channels_last and data on the device, against none of these."""
    sides = {'fast': ['--device-data', '--channels-last', '--amp'], 'plain': ['--no-device-data']}
    top1 = {
        name: [
            train(parse_train_args([
                '--hparams', str(ROOT / 'hparams' / 'quickstart.yaml'), '--output', str(tmp_path),
                '--experiment', f'{name}-{seed}', '--seed', str(seed), *options,
            ]))['stage_two']['top1']
            for seed in range(3)
        ]
        for name, options in sides.items()
    }
    difference = statistics.mean(top1['fast']) - statistics.mean(top1['plain'])
    assert abs(difference) <= 3 * SEED_STD * math.sqrt(2 / 3), top1
