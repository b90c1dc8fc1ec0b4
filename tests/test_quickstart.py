"""What the README's first command promises."""
import math
import statistics

import pytest
from conftest import ROOT

from shike_timm.cli.train import parse_train_args
from shike_timm.training.runs import train

SEED_STD = 5.  # points of top-1 between seeds, over six of each side
SIDES = {'plain': ['--no-device-data'], 'fast': ['--device-data', '--channels-last', '--amp']}


@pytest.mark.slow
def test_stage_two_lifts_few_shot_classes_on_every_path(tmp_path, capsys):
    """Three seeds each: bfloat16 where the CPU has it, channels_last and data on the device, against none of these."""
    mean = {}
    for side, options in SIDES.items():
        runs = [
            train(parse_train_args([
                '--hparams', str(ROOT / 'hparams' / 'quickstart.yaml'), '--output', str(tmp_path),
                '--experiment', f'{side}-{seed}', '--seed', str(seed), *options,
            ]))
            for seed in range(3)
        ]
        table = capsys.readouterr().out
        assert table.count('ensemble') == 6 and table.count('expert') == 18
        for one, two in ((run['stage_one'], run['stage_two']) for run in runs):
            assert two['few'] >= one['few'] + 10 and two['top1'] > one['top1']
        mean[side] = statistics.mean(run['stage_two']['top1'] for run in runs)
    assert abs(mean['fast'] - mean['plain']) <= 3 * SEED_STD * math.sqrt(2 / 3), mean
