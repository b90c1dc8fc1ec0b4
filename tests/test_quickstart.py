"""What the README's first command promises."""
import pytest
from conftest import ROOT

from shike_timm.hparams import parse_train_args
from shike_timm.training import train


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
