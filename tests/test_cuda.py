"""What a first GPU meets: both stages in each way to run a step, resumed in the middle, evaluated and exported."""
import math

import pytest
import timm
import torch
from conftest import TINY

from shike_timm.cli.train import parse_train_args
from shike_timm.training import trainer
from shike_timm.training.runs import train

WAYS = {
    'eager': [],
    'compiled': ['--torchcompile'],
    'graphs': ['--torchcompile', '--torchcompile-mode', 'reduce-overhead'],
}


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
@pytest.mark.parametrize('way', WAYS)
def test_both_stages(tmp_path, monkeypatch, way, dtype):
    options = [
        *TINY, '--device', 'cuda', '--amp', '--amp-dtype', dtype, '--channels-last', '--recovery-interval', '2',
        '--model-ema', '--output', str(tmp_path), *WAYS[way]]
    original, steps = trainer.train_step, []

    def dies(*args):
        steps.append(1)
        if len(steps) == 8:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(trainer, 'train_step', dies)
    with pytest.raises(KeyboardInterrupt):
        train(parse_train_args(options))
    metrics = train(parse_train_args([*options, '--resume']))
    assert all(math.isfinite(stage['loss']) for stage in metrics.values()) and len(metrics) == 2
    model = timm.create_model(f'local-dir:{tmp_path}/run/model', pretrained=True)
    assert all(value.isfinite().all() for value in model.state_dict().values())
