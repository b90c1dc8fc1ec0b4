"""Whole runs: what a run folder holds, retraining, evaluation."""
import csv
import json
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import timm
import torch
from conftest import TINY
from run_helpers import run, without_seconds
from timm.utils import NativeScaler

from shike_timm.checkpoints import load_checkpoint
from shike_timm.cli.retrain_classifier import parse_retrain_args
from shike_timm.cli.train import parse_train_args
from shike_timm.errors import InputError
from shike_timm.metrics import METRICS
from shike_timm.pretrained.load import load_trained_model
from shike_timm.training import trainer
from shike_timm.training.methods import RETRAINING_EPOCHS
from shike_timm.training.phases import plan_phases
from shike_timm.training.runs import retrain, train
from shike_timm.training.trainer import Trainer


def test_run_folder(tiny_run):
    metrics = json.loads((tiny_run / 'metrics.json').read_text())
    assert list(metrics) == ['stage_one', 'stage_two']
    for result in metrics.values():
        assert set(result) == {*METRICS, 'balanced_classes', 'macro_f1', 'experts', 'reject', 'seconds'}
        assert len(result['experts']) == 3 and result['seconds'] > 0
    with (tiny_run / 'summary.csv').open() as file:
        rows = list(csv.DictReader(file))
    assert [row['epoch'] for row in rows] == ['0', '1', '2', '3']
    assert float(rows[1]['eval_top1']) == metrics['stage_one']['top1']
    assert float(rows[3]['eval_few']) == metrics['stage_two']['few']
    assert all(float(row['lr']) >= 0 and math.isfinite(float(row['train_loss'])) for row in rows)
    for stage in ('stage_one', 'stage_two'):
        names = {path.name for path in (tiny_run / stage).iterdir()}
        assert names == {'last.pth.tar', 'checkpoint-0.pth.tar', 'checkpoint-1.pth.tar'}
    assert {path.name for path in (tiny_run / 'model').iterdir()} == {'config.json', 'model.safetensors'}
    assert not list(tiny_run.glob('*.tmp'))


def test_exported_model_loads_in_timm(tiny_run):
    model = timm.create_model(f'local-dir:{tiny_run}/model', pretrained=True)
    assert model.num_classes == 10
    assert model.pretrained_cfg['label_names'] == [str(digit) for digit in range(10)]
    assert model.pretrained_cfg['input_size'] == (3, 8, 8)
    config = json.loads((tiny_run / 'model' / 'config.json').read_text())
    assert config['architecture'] == 'resnet32_shike' and len(config['class_counts']) == 10
    assert len(config['label_names']) == 10 and 'label_names' not in config['pretrained_cfg']
    stage_two = load_checkpoint(tiny_run / 'stage_two' / 'last.pth.tar')
    assert all(torch.equal(stage_two['state_dict'][name], value) for name, value in model.state_dict().items())


def test_stage_two_changes_classifiers_and_statistics_only(tiny_run):
    one, two = (load_checkpoint(tiny_run / f'stage_{n}' / 'last.pth.tar')['state_dict'] for n in ('one', 'two'))
    changed = {name for name in one if not torch.equal(one[name], two[name])}
    assert 'classifier.weight' in changed
    assert all(name == 'classifier.weight' or 'running_' in name or 'num_batches' in name for name in changed)


def test_eval_reprints_the_metrics_of_another_layout_and_of_other_scales(tmp_path, run_script):
    folder, _ = run(
        tmp_path, '--channels-last', '--amp', '--amp-dtype', 'bfloat16', '--no-fusion', '--num-experts', '2',
        '--cosine-scale', '16', '--crt-cosine-scale', '20')
    for source, stage, scale in (
            (f'local-dir:{folder}/model', 'stage_two', 20), (folder / 'stage_two' / 'last.pth.tar', 'stage_two', 20),
            (folder / 'stage_one' / 'last.pth.tar', 'stage_one', 16)):
        status, _, _ = run_script(
            'eval.py', '--model', source, '--dataset', 'digits_lt', '--workers', '0', '--device', 'cpu',
            '--results-file', tmp_path / 'results.json')
        assert status == 0
        results = json.loads((tmp_path / 'results.json').read_text())
        assert without_seconds(folder)[stage].items() <= results.items()
        assert load_trained_model(str(source), pretrained=True).model.classifier.scale == scale


@pytest.mark.parametrize('options', [('--device', 'nonsense'), ('--resume', 'nowhere')])
def test_the_arguments_of_the_caller_stay_as_they_are(options):
    args = parse_train_args(options)
    before = dict(vars(args))
    with pytest.raises(InputError):
        train(args)
    assert vars(args) == before


def test_any_number_of_workers_is_the_same_run(tmp_path):
    """Dropout and random erasing do not depend on which process reads the images."""
    options = [
        '--no-device-data', '--drop', '0.2', '--reprob', '0.5', '--aa', 'rand-m9-mstd0.5', '--epochs', '1',
        '--warmup-epochs', '0', '--crt-epochs', '0', '--workers']
    none, one = (run(tmp_path / workers, *options, workers)[0] for workers in ('0', '1'))
    assert without_seconds(none) == without_seconds(one)
    weights = [(folder / 'model' / 'model.safetensors').read_bytes() for folder in (none, one)]
    assert weights[0] == weights[1]


def test_eval_reprints_the_metrics(tiny_run, run_script, tmp_path):
    expected = without_seconds(tiny_run)
    results = tmp_path / 'results.json'
    digits = ['--dataset', 'digits_lt', '--workers', '0', '--device', 'cpu', '--results-file', results]
    for source, stage in (
            (['--model', f'local-dir:{tiny_run}/model'], 'stage_two'),
            (['--checkpoint', tiny_run / 'stage_two' / 'last.pth.tar'], 'stage_two'),
            (['--checkpoint', tiny_run / 'stage_one' / 'last.pth.tar'], 'stage_one')):
        status, out, _ = run_script('eval.py', *source, *digits)
        assert status == 0
        assert expected[stage].items() <= json.loads(results.read_text()).items()
        assert out.splitlines()[-1].split()[:3] == [
            'ensemble', f"{expected[stage]['loss']:.2f}", f"{expected[stage]['top1']:.2f}"]


def test_retraining_repeats_stage_two(tiny_run, tmp_path):
    for source in (tiny_run, tiny_run / 'stage_one' / 'checkpoint-1.pth.tar'):
        options = ['--checkpoint', str(source), '--output', str(tmp_path), '--experiment', 'again']
        retrain(*parse_retrain_args(options))
        folder = tmp_path / 'again'
        assert without_seconds(folder)['stage_two'] == without_seconds(tiny_run)['stage_two']
        assert (folder / 'model' / 'config.json').exists()
        shutil.rmtree(folder)


def test_one_overflow_under_loss_scaling_is_no_end(tmp_path, monkeypatch):
    """A loss that is not finite once, then is: an end without loss scaling only."""
    from shike_timm.training.tasks import ExpertTask
    original, steps = ExpertTask.forward, []

    def forward(self, images, target):
        result = original(self, images, target)
        steps.append(1)
        return dict(result, loss=result['loss'] * float('inf')) if len(steps) == 3 else result

    monkeypatch.setattr(ExpertTask, 'forward', forward)
    finish = Trainer.__post_init__

    def scales(self):
        finish(self)
        self.loss_scaler = NativeScaler('cpu')

    monkeypatch.setattr(Trainer, '__post_init__', scales)
    _, metrics = run(tmp_path, '--log-interval', '100', '--crt-epochs', '0')
    assert math.isfinite(metrics['stage_one']['loss'])


def test_nan_stops_the_run_and_keeps_the_checkpoint(tmp_path, run_script):
    status, _, error = run_script(
        'train.py', *TINY, '--output', tmp_path, '--lr', '1e30', '--warmup-lr', '0.01', '--epochs', '3',
        '--classifier', 'linear', '--log-interval', '1')
    assert status == 1
    assert 'train.py: The ' in error and 'stage one, epoch 2 of ' in error
    checkpoint = load_checkpoint(tmp_path / 'run' / 'stage_one' / 'last.pth.tar')
    assert checkpoint['epoch'] == 0
    assert all(value.isfinite().all() for value in checkpoint['state_dict'].values())


def test_nan_names_its_first_step(tmp_path, monkeypatch):
    from shike_timm.training.tasks import ExpertTask
    original, steps = ExpertTask.forward, []

    def forward(self, images, target):
        result = original(self, images, target)
        steps.append(1)
        if len(steps) == 3:
            result['loss'] = result['loss'] * float('nan')
        return result

    monkeypatch.setattr(ExpertTask, 'forward', forward)
    with pytest.raises(trainer.NonFiniteError, match='at step 3 of stage one, epoch 1 of '):
        run(tmp_path, '--log-interval', '100')


def test_a_teacher_of_the_same_holdout_teaches_what_is_left(tmp_path, caplog):
    caplog.set_level('INFO')
    run(tmp_path / 'teacher', '--holdout', '0.1', '--crt-epochs', '0')
    assert 'KD: ' not in caplog.text
    run(tmp_path, '--holdout', '0.1', '--crt-epochs', '0', '--kd-model-name', f'local-dir:{tmp_path}/teacher/run/model')
    assert 'KD: ' in caplog.text


def test_a_run_learns_from_another(tmp_path, tiny_run, caplog):
    caplog.set_level('INFO')
    shutil.copytree(tiny_run / 'model', tmp_path / 'teacher')
    options = ['--kd-model-name', f'local-dir:{tmp_path}/teacher', '--kd-temperature', '2', '--crt-epochs', '0']
    folder, metrics = run(tmp_path, *options)
    assert 'KD: ' in caplog.text
    assert metrics['stage_one']['loss'] != without_seconds(tiny_run)['stage_one']['loss']
    student, alone = (
        load_checkpoint(path / 'stage_one' / 'last.pth.tar')['state_dict'] for path in (folder, tiny_run))
    assert student.keys() == alone.keys()
    shutil.rmtree(tmp_path / 'teacher')  # stage two learns from nobody
    options = ['--checkpoint', str(folder), '--crt-epochs', '2', '--output', str(tmp_path), '--experiment', 'two']
    assert list(retrain(*parse_retrain_args(options))) == ['stage_two']


def test_stage_one_alone_and_its_retraining(tmp_path):
    folder, metrics = run(tmp_path, '--method', 'ce', '--crt-epochs', '0')
    assert list(metrics) == ['stage_one'] and not (folder / 'stage_two').exists()
    assert (folder / 'model' / 'model.safetensors').exists()
    for options, epochs in (([], RETRAINING_EPOCHS), (['--crt-epochs', '3'], 3)):
        args, _ = parse_retrain_args(['--checkpoint', str(folder), *options])
        assert plan_phases(args, retraining=True)[-1].epochs == epochs
    with pytest.raises(InputError, match='--crt-epochs 0 leaves nothing to do'):
        retrain(*parse_retrain_args(['--checkpoint', str(folder), '--crt-epochs', '0']))


def test_a_run_in_a_thread_takes_no_signals(tmp_path, tiny_run):
    with ThreadPoolExecutor(1) as pool:
        pool.submit(run, tmp_path, '--crt-epochs', '0').result()
    assert without_seconds(tmp_path / 'run')['stage_one'] == without_seconds(tiny_run)['stage_one']


@pytest.mark.parametrize('options', [
    ['--amp', '--channels-last'],
    ['--model-ema', '--model-ema-decay', '0.5', '--clip-grad', '1', '--val-interval', '5'],
    ['--clip-grad', '0.1', '--clip-mode', 'agc', '--torchcompile', 'eager', '--detach-teacher'],
    ['--mixup', '0.4', '--alpha', '0', '--beta', '0', '--no-fusion', '--num-experts', '2'],
    ['--kd-model-name', 'TEACHER', '--model-ema', '--model-ema-decay', '0.5', '--val-interval', '5', '--mixup', '0.4',
     '--alpha', '0', '--amp', '--channels-last'],
    ['--reprob', '0.5', '--no-aug', '--checkpoint-hist', '1', '--workers', '1', '--log-interval', '1'],
], ids=lambda options: options[0])
def test_options_run(tmp_path, tiny_run, options):
    options = [option.replace('TEACHER', f'local-dir:{tiny_run}/model') for option in options]
    folder, metrics = run(tmp_path, *options)
    assert math.isfinite(metrics['stage_two']['loss'])
    if '--model-ema' in options:
        one = load_checkpoint(folder / 'stage_one' / 'last.pth.tar')
        two = load_checkpoint(folder / 'stage_two' / 'last.pth.tar')
        name = 'experts.0.stage.0.conv1.weight'
        assert not torch.equal(one['state_dict'][name], one['state_dict_ema'][name])
        # Stage two starts from what was evaluated, the average.
        assert torch.equal(two['state_dict'][name], one['state_dict_ema'][name])
        with (folder / 'summary.csv').open() as file:
            assert [bool(row['eval_top1']) for row in csv.DictReader(file)] == [False, True, False, True]
    if '--checkpoint-hist' in options:
        assert len(list((folder / 'stage_one').glob('checkpoint-*'))) == 1


def test_folder_of_images(image_folder, tmp_path, run_script):
    status, out, _ = run_script(
        'train.py', '--model', 'resnet32_shike', '--data-dir', image_folder, '--img-size', '16', '--batch-size', '16',
        '--epochs', '1', '--warmup-epochs', '0', '--crt-epochs', '1', '--workers', '0', '--device', 'cpu',
        '--output', tmp_path, '--experiment', 'run', '--aa', 'rand-m9-mstd0.5-inc1')
    assert status == 0 and 'stage_two ensemble' in out
    status, out, _ = run_script(
        'eval.py', '--model', f'local-dir:{tmp_path}/run/model', '--data-dir', image_folder, '--workers', '0',
        '--device', 'cpu')
    expected = json.loads((tmp_path / 'run' / 'metrics.json').read_text())['stage_two']
    lines = [line.split() for line in out.splitlines()]
    header, (name, *ensemble) = next(line for line in lines if line[0] == 'loss'), lines[-1]
    assert [line[0] for line in lines[:4]] == ['classes', 'ant', 'bee', 'cat']
    assert status == 0 and name == 'ensemble'
    assert ensemble == ['-' if expected[key] is None else f'{expected[key]:.2f}' for key in header]


@pytest.mark.parametrize('gain', [-1, 1])
def test_a_loss_of_stage_two_is_explained(caplog, gain):
    """The line has both figures, and that with --target-prior train."""
    caplog.set_level('INFO')
    asked = []
    model = SimpleNamespace(set_target_prior=asked.append)
    trainer = SimpleNamespace(
        phase=SimpleNamespace(is_retraining=True, name='stage_two'), model=model,
        evaluate=lambda model: dict(top1=68.5 if asked else 0))
    Trainer._log_change(trainer, dict(stage_one=dict(top1=67.5), stage_two=dict(top1=67.5 + gain)))
    assert asked == (['train', None] if gain < 0 else [])
    assert ('from 67.5 to 66.5' in caplog.text and 'top1 is then 68.5' in caplog.text) == (gain < 0)
