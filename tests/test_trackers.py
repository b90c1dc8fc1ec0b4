"""What a run tells beside its files: trackers, learning curves and log lines."""
import csv
import io
import logging
import re
import shutil
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY
from tqdm import std, tqdm

from shike_timm.cli.retrain_classifier import parse_retrain_args
from shike_timm.cli.train import parse_train_args
from shike_timm.training import progress
from shike_timm.training.runs import train
from shike_timm.training.trackers import tracking


def read_rows(run):
    with (run / 'summary.csv').open(newline='') as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def stub(calls, told):
    """A tracker with the interface of wandb that writes down what it is told."""
    return SimpleNamespace(
        init=lambda **options: calls.append(options), log=lambda values, step=None: told.append(values),
        finish=lambda: calls.append('finish'))


def test_trackers_get_what_the_summary_holds(tmp_path, monkeypatch, caplog):
    pytest.importorskip('matplotlib')
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    calls, told = {}, {}
    for name in ('wandb', 'trackio'):
        calls[name], told[name] = [], []
        monkeypatch.setitem(sys.modules, name, stub(calls[name], told[name]))
    caplog.set_level(logging.INFO, 'shike_timm.training.trainer')
    train(parse_train_args([
        *TINY, '--output', str(tmp_path), '--log-wandb', '--wandb-project', 'tail', '--log-trackio',
        '--log-tensorboard', '--val-interval', '2']))
    run = tmp_path / 'run'
    rows = read_rows(run)
    assert told['trackio'] == told['wandb'] == rows and len(rows) == 4
    for name, project in (('wandb', 'tail'), ('trackio', 'shike-timm')):
        options, *rest = calls[name]
        assert options['project'] == project and options['config']['epochs'] == 2 and rest == ['finish']
    assert rows[0]['train_loss'] == pytest.approx(
        rows[0]['train_ce'] + 0.1 * rows[0]['train_nt'] + 0.01 * rows[0]['train_mu'], abs=1e-4)
    assert 'train_ce' not in rows[2] and 'eval_top1' not in rows[0]
    events = EventAccumulator(str(run)).Reload()
    for key in rows[1]:
        scalars = {event.step: event.value for event in events.Scalars(key)}
        assert scalars == pytest.approx({int(row['epoch']): row[key] for row in rows if key in row})
    assert (run / 'curves.png').read_bytes()[:4] == b'\x89PNG'
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith('Train: ')]
    assert len(lines) == 4  # one an epoch
    assert lines[0].startswith('Train: stage one, epoch 1 of 2, 0:0')
    assert 'Eval' not in lines[0] and 'top1: ' in lines[1]


def test_a_retraining_is_tracked(tiny_run, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setitem(sys.modules, 'trackio', stub(calls, []))
    args, _ = parse_retrain_args(['--checkpoint', str(tiny_run), '--log-trackio'])
    with tracking(args, tmp_path):
        assert calls[0]['resume'] == 'never'


@pytest.mark.parametrize('flag, module', [
    ('--log-wandb', 'wandb'), ('--log-trackio', 'trackio'), ('--log-tensorboard', 'torch.utils.tensorboard')])
def test_a_missing_package_is_one_sentence(tmp_path, monkeypatch, run_script, flag, module):
    monkeypatch.setitem(sys.modules, module, None)
    status, _, err = run_script('train.py', *TINY, '--output', tmp_path, flag)
    assert status == 2 and f'{flag} needs {module.split(".")[-1]}: pip install' in err and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('name', ['wandb', 'trackio'])
def test_a_tracker_that_cannot_start_is_one_sentence(tmp_path, monkeypatch, run_script, name):
    def refuse(**options):
        raise RuntimeError('no API key.\nLog in first.')

    monkeypatch.setitem(sys.modules, name, SimpleNamespace(init=refuse))
    status, _, err = run_script('train.py', *TINY, '--output', tmp_path, f'--log-{name}')
    assert status == 2 and f'--log-{name} could not start (no API key' in err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_a_terminal_gets_one_bar_of_the_run(tiny_run, tmp_path, monkeypatch, run_script):
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: True, raising=False)
    run = shutil.copytree(tiny_run, tmp_path / 'run')
    shutil.rmtree(run / 'stage_two')
    shutil.copy(run / 'stage_one' / 'checkpoint-0.pth.tar', run / 'stage_one' / 'last.pth.tar')
    status, _, err = run_script('train.py', '--resume', run)
    assert status == 0, err
    assert 'stage two, epoch 2 of 2' in err and 'stage one, epoch 1 of 2:' not in err  # goes on where the run was
    assert min(map(int, re.findall(r'epoch \d of 2: +(\d+)%', err))) >= 25
    assert err.count('Train: ') == 3 and not re.search(r'\S Train: stage', err)  # a line an epoch, above it


@pytest.mark.parametrize('columns', [80, 100])
def test_the_loss_on_a_terminal_moves_every_second(columns, monkeypatch):
    text, clock = io.StringIO(), [1000.]
    monkeypatch.setattr(time, 'perf_counter', lambda: clock[0])
    monkeypatch.setattr(time, 'time', lambda: clock[0])
    monkeypatch.setattr(std, 'time', lambda: clock[0])
    bar = tqdm(total=10_000, smoothing=0, ncols=columns, file=text, bar_format=progress.BAR, position=0)
    told = progress.Progress(10_000, bar, 1)
    for step in range(20):
        clock[0] += 0.5
        told.update('stage one, epoch 12 of 180', torch.tensor(9. - step / 10), 64)
    lines = text.getvalue().split('\r')
    assert re.findall(r'loss (\S+), 128 images/s', text.getvalue())[-1] == '7.20'  # of the step before
    assert len({match.group() for line in lines if (match := re.search(r'loss \S+', line))}) == 10
    assert max(map(len, lines)) <= columns and '| 1:23:10 left, loss' in lines[-1]


def test_a_log_gets_a_line_a_minute_with_the_time_left_of_the_run(monkeypatch, caplog):
    clock = [1000.]
    monkeypatch.setattr(time, 'perf_counter', lambda: clock[0])
    told = progress.Progress(1000, tqdm(disable=True), 60)
    told.begin(500)  # A resumed run, of which half is done.
    with caplog.at_level('INFO'):
        for _ in range(40):
            clock[0] += 3
            told.update('stage one, epoch 6 of 8', torch.tensor(1.5), 32)
    assert caplog.messages == [
        f'Train: stage one, epoch 6 of 8, loss 1.50, 11 images/s, 0:{left} left' for left in ('24:00', '23:00')]


def test_a_run_of_an_older_version_keeps_its_columns(tiny_run, tmp_path):
    run = tmp_path / 'run'
    shutil.copytree(tiny_run, run)
    with (run / 'summary.csv').open(newline='') as file:
        rows = list(csv.DictReader(file))
    kept = [key for key in rows[0] if key not in ('train_ce', 'train_nt', 'train_mu', 'train_kd')]
    with (run / 'summary.csv').open('w', newline='') as file:
        writer = csv.DictWriter(file, kept, extrasaction='ignore')
        writer.writeheader()
        writer.writerows(rows)
    before = read_rows(run)
    train(parse_train_args(['--resume', str(run / 'stage_two' / 'checkpoint-0.pth.tar')]))
    after = read_rows(run)
    assert len(after) == 4 and after[3].keys() == before[3].keys() and after[3]['eval_top1'] == before[3]['eval_top1']
