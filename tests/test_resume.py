"""Runs that end early: kills, signals, full disks and damaged files, and how they go on."""
import csv
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, read_yaml
from run_helpers import run, without_seconds

from shike_timm.checkpoints import load_checkpoint
from shike_timm.cli.retrain_classifier import parse_retrain_args
from shike_timm.cli.train import parse_train_args
from shike_timm.errors import InputError
from shike_timm.training import folder as folders
from shike_timm.training import trainer
from shike_timm.training.runs import retrain, train
from shike_timm.training.trainer import Trainer


def test_resuming_with_workers(tmp_path):
    options = ['--workers', '1', '--no-device-data', '--epochs', '1', '--warmup-epochs', '0', '--crt-epochs']
    expected = without_seconds(run(tmp_path / 'whole', *options, '1')[0])
    run(tmp_path, *options, '0')
    (tmp_path / 'run' / 'metrics.json').unlink()
    train(parse_train_args(['--resume', str(tmp_path / 'run'), '--crt-epochs', '1']))
    assert without_seconds(tmp_path / 'run') == expected


@pytest.mark.parametrize('stage, epoch', [(1, 0), (1, 1), (2, 0), (2, 1)])
def test_resumed_run_equals_an_undisturbed_one(tiny_run, tmp_path, monkeypatch, stage, epoch):
    original = Trainer.train_epoch

    def dies(self, current, done):
        if (self.phase.number, current) == (stage, epoch):
            next(iter(self.train_loader))  # in mid-epoch
            raise KeyboardInterrupt
        return original(self, current, done)

    monkeypatch.setattr(Trainer, 'train_epoch', dies)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    monkeypatch.setattr(Trainer, 'train_epoch', original)
    train(parse_train_args(['--resume', str(tmp_path / 'run')]))
    assert without_seconds(tmp_path / 'run') == without_seconds(tiny_run)
    with (tmp_path / 'run' / 'summary.csv').open() as file:
        assert [row['epoch'] for row in csv.DictReader(file)] == ['0', '1', '2', '3']


@pytest.mark.parametrize('options, dies_after', [
    (['--drop', '0.1', '--model-ema', '--model-ema-decay', '0.9'], 9),
    pytest.param(
        ['--workers', '1', '--no-device-data', '--reprob', '0.3', '--aa', 'rand-m9-mstd0.5', '--crt-epochs', '0'], 9,
        marks=pytest.mark.slow),
    pytest.param(['--mixup', '0.4', '--alpha', '0', '--grad-accum-steps', '2'], 19, marks=pytest.mark.slow),
], ids=['device', 'workers', 'accumulated'])
def test_a_run_goes_on_from_the_middle_of_an_epoch(tmp_path, monkeypatch, caplog, options, dies_after):
    caplog.set_level('INFO')
    options = [
        '--batch-size', '16', '--epochs', '1', '--warmup-epochs', '0', '--crt-epochs', '1', '--recovery-interval', '2',
        *options]
    expected, _ = run(tmp_path / 'whole', *options)
    steps, original = [], trainer.train_step

    def dies(*args):
        steps.append(1)
        if len(steps) == dies_after:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(trainer, 'train_step', dies)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, *options)
    done = load_checkpoint(tmp_path / 'run' / 'stage_one' / 'last.pth.tar')['saver']['done']
    assert done['step'] > 0
    folder, _ = run(tmp_path, *options, '--resume')
    assert f"step {done['step']}." in caplog.text
    assert without_seconds(folder) == without_seconds(expected)
    one, other = ((path / 'model' / 'model.safetensors').read_bytes() for path in (folder, expected))
    assert one == other
    losses = []
    for path in (folder, expected):
        with (path / 'summary.csv').open() as file:
            losses.append([row['train_loss'] for row in csv.DictReader(file)])
    assert losses[0] == losses[1]


def test_the_checkpoint_before_a_damaged_one_is_used(tmp_path, tiny_run, caplog):
    folder = tmp_path / 'run'
    shutil.copytree(tiny_run, folder)
    for name in ('last', 'checkpoint-1'):
        path = folder / 'stage_two' / f'{name}.pth.tar'
        path.write_bytes(path.read_bytes()[:-1000])
    train(parse_train_args(['--resume', str(folder)]))
    assert "last.pth.tar' is truncated" in caplog.text and "checkpoint-1.pth.tar' is truncated" in caplog.text
    assert without_seconds(folder) == without_seconds(tiny_run)
    for path in folder.glob('stage_*/*.pth.tar'):
        path.write_bytes(b'')
    with pytest.raises(InputError, match='truncated'):
        train(parse_train_args(['--resume', str(folder)]))


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch, run_script, tiny_run):
    original, limits = trainer.StageSaver.save_checkpoint, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save(self, epoch):
        if epoch:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2 ** 20, limits[1]))  # as little as there is left
        original(self, epoch)

    monkeypatch.setattr(trainer.StageSaver, 'save_checkpoint', save)
    try:
        status, _, error = run_script('train.py', *TINY, '--output', tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.undo()
    assert status == 1 and error.count("tmp.pth.tar' cannot be written") == 1 and 'Traceback' not in error
    stage = tmp_path / 'run' / 'stage_one'
    assert {path.name for path in stage.iterdir()} == {'last.pth.tar', 'checkpoint-0.pth.tar'}
    assert load_checkpoint(stage / 'last.pth.tar')['epoch'] == 0
    train(parse_train_args(['--resume', str(tmp_path / 'run')]))
    assert without_seconds(tmp_path / 'run') == without_seconds(tiny_run)


def test_a_killed_worker_is_one_sentence(tmp_path, monkeypatch, run_script):
    original = trainer.train_step

    def kills(*args):
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)
        return original(*args)

    monkeypatch.setattr(trainer, 'train_step', kills)
    status, _, error = run_script(
        'train.py', *TINY, '--no-device-data', '--workers', '1', '--batch-size', '8', '--output', tmp_path)
    assert status == 1 and error.count('A process that loads images is gone') == 1 and 'Traceback' not in error
    assert 'The last checkpoint is kept' in error

    def breaks(*args):  # as the pipe from a worker does where that is gone before it is asked for
        raise ConnectionResetError(104, 'Connection reset by peer')

    monkeypatch.setattr(trainer, 'train_step', breaks)
    status, _, error = run_script('train.py', *TINY, '--output', tmp_path / 'other')
    assert status == 1 and 'A process that loads images is gone' in error


@pytest.mark.slow
def test_twenty_kills_at_random_moments_lose_nothing(tmp_path):
    """SIGKILL at any moment of both stages, until the run is through; all in processes that are forked from here."""
    options = [
        '--batch-size', '32', '--recovery-interval', '2', '--crt-epochs', '4', '--aa', 'cifar10', '--drop', '0.1']
    random = np.random.default_rng(0)

    def start(output, *more):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                torch.set_num_threads(1)
                original = trainer.train_step

                def counted(*args):
                    result = original(*args)
                    with (output / 'steps').open('a') as file:
                        file.write('.')
                    return result

                trainer.train_step = counted
                train(parse_train_args([*TINY, *options, '--output', str(output), '--resume', *more]))
                status = 0
            finally:
                os._exit(status)
        return child

    def num_steps(output):
        return (output / 'steps').stat().st_size if (output / 'steps').exists() else 0

    folders = [tmp_path / 'whole', tmp_path / 'killed']
    for folder in folders:
        folder.mkdir()
    assert os.waitpid(start(folders[0]), 0)[1] == 0
    needed = num_steps(folders[0])
    for _ in range(20):
        child, before = start(folders[1]), num_steps(folders[1])
        while num_steps(folders[1]) == before:
            assert os.waitpid(child, os.WNOHANG) == (0, 0)
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert os.waitpid(start(folders[1]), 0)[1] == 0
    assert num_steps(folders[1]) <= needed + 20 * 3  # an interval of two, and what was under way
    one, other = ((folder / 'run' / 'model' / 'model.safetensors').read_bytes() for folder in folders)
    assert one == other and without_seconds(folders[0] / 'run') == without_seconds(folders[1] / 'run')


def test_resuming_a_finished_run_changes_nothing(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / 'run')
    before = (tmp_path / 'run' / 'metrics.json').read_text()
    train(parse_train_args(['--resume', str(tmp_path / 'run' / 'stage_two' / 'last.pth.tar')]))
    assert (tmp_path / 'run' / 'metrics.json').read_text() == before


def test_resume_alone_uses_the_experiment(tiny_run, tmp_path):
    # Nothing saved yet: the run starts from its first epoch.
    run(tmp_path, '--resume')
    assert without_seconds(tmp_path / 'run') == without_seconds(tiny_run)


def test_a_run_resumes_from_within_its_folder(tiny_run, tmp_path, monkeypatch):
    shutil.copytree(tiny_run, tmp_path / 'run')
    monkeypatch.chdir(tmp_path / 'run')
    for given in ('.', 'stage_two/last.pth.tar'):
        train(parse_train_args(['--resume', given]))
        assert without_seconds(tmp_path / 'run') == without_seconds(tiny_run)


def test_another_metric_begins_anew_with_its_best(tiny_run, tmp_path, monkeypatch):
    shutil.copytree(tiny_run, tmp_path / 'run')
    last, best = tmp_path / 'run' / 'stage_two' / 'last.pth.tar', []
    checkpoint = load_checkpoint(last)
    checkpoint['saver'].update(best_metric=60., best_epoch=0)
    checkpoint['args'].eval_metric = 'top1'
    torch.save(checkpoint, last)

    def stops(self, *given):
        best.append(self.saver.best_metric)
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, '_train_epochs', stops)
    for metric in ('top1', 'few'):
        with pytest.raises(KeyboardInterrupt):
            train(parse_train_args(['--resume', str(tmp_path / 'run'), '--eval-metric', metric]))
    assert best == [60., None]


@pytest.fixture
def start(tmp_path):
    """Starts a run in a group of its own, which ends with the test."""
    started = []

    def start(*extra):
        started.append(subprocess.Popen(
            [sys.executable, ROOT / 'train.py', *TINY, '--output', tmp_path, *extra],
            env=dict(os.environ, PYTHONPATH=str(ROOT)), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
            start_new_session=True))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def wait_for_epoch(process, epoch):
    for line in process.stderr:
        if line.startswith(f'Train: stage one, epoch {epoch + 1} of ') and 'Loss' in line:
            return
    raise AssertionError('the run ended early')


LONGER = ['--epochs', '3', '--imb-factor', '5', '--batch-size', '32', '--log-interval', '1']


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    return without_seconds(run(tmp_path_factory.mktemp('undisturbed'), *LONGER)[0])


@pytest.mark.slow
@pytest.mark.parametrize('signum, epoch', [(signal.SIGKILL, 1), (signal.SIGINT, 0)])
def test_signals_leave_a_run_that_resumes(start, tmp_path, undisturbed, signum, epoch):
    process = start(*LONGER)
    wait_for_epoch(process, epoch)
    process.send_signal(signum)
    error = process.communicate(timeout=60)[1]
    last = tmp_path / 'run' / 'stage_one' / 'last.pth.tar'
    assert load_checkpoint(last)['epoch'] == epoch - 1
    if signum == signal.SIGKILL:
        assert process.returncode == -signum
    else:
        assert process.returncode == 128 + signum
        assert f'stopped by signal {int(signum)}' in error and '--resume' in error
    folder, _ = run(tmp_path, *LONGER, '--resume', tmp_path / 'run')
    assert without_seconds(folder) == undisturbed


def test_a_signal_to_the_whole_group_is_an_orderly_stop(start):
    process = start('--epochs', '1000', '--val-interval', '1000', '--workers', '2')
    wait_for_epoch(process, 1)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) == 143  # of 1000 epochs
    process.stderr.close()


def test_a_retraining_that_saved_nothing_is_not_resumed_as_a_run(tmp_path, tiny_run, monkeypatch, caplog):
    def fail(self, epoch, *done):
        raise OSError('no space left')

    monkeypatch.setattr(trainer.StageSaver, 'save_last', fail)
    options = ['--checkpoint', str(tiny_run), '--output', str(tmp_path), '--experiment', 'two']
    with pytest.raises(OSError, match='no space left'):
        retrain(*parse_retrain_args(options))
    monkeypatch.undo()
    assert 'The last checkpoint is kept' not in caplog.text
    with pytest.raises(InputError, match='is of a retraining that has saved nothing yet: remove it'):
        train(parse_train_args(['--resume', str(tmp_path / 'two')]))


def test_a_folder_whose_arguments_could_not_be_written_is_begun_again(tmp_path, tiny_run, monkeypatch):
    def fail(path, text):
        raise OSError(28, 'no space left')

    monkeypatch.setattr(folders, 'write_text', fail)
    options = ['--checkpoint', str(tiny_run), '--output', str(tmp_path), '--experiment', 'two']
    with pytest.raises(InputError, match='no space left'):
        retrain(*parse_retrain_args(options))
    assert [path.name for path in (tmp_path / 'two').iterdir()] == ['.lock']
    monkeypatch.undo()
    assert list(retrain(*parse_retrain_args(options))) == ['stage_two']


def test_one_run_has_one_owner(tmp_path):
    """Of eight processes that begin one run at once one does, and the others say which process that is."""
    gate = multiprocessing.get_context('fork').Barrier(8)

    def begin(seed):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                gate.wait()
                lock = folders.claim_folder(tmp_path / 'run', parse_train_args(['--seed', str(seed)]), False)
                gate.wait()
                lock.release()
                status = 0
            except InputError as error:
                (tmp_path / str(seed)).write_text(str(error))
                gate.wait()
                status = 2
            finally:
                os._exit(status)
        return child

    children = [begin(seed) for seed in range(8)]
    ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert sorted(ends) == [0] + 7 * [2]
    owner = ends.index(0)
    assert read_yaml(tmp_path / 'run' / 'args.yaml')['seed'] == owner
    for seed in set(range(8)) - {owner}:
        assert re.search(f'is in use by (process {children[owner]} on |another process)', (
            tmp_path / str(seed)).read_text())


def test_a_run_that_is_under_way_is_not_resumed(tmp_path, tiny_run):
    folder = tmp_path / 'run'
    shutil.copytree(tiny_run, folder)
    (folder / 'stage_two' / 'last.pth.tar').unlink()
    with folders.claim_folder(folder, parse_train_args(['--resume', str(folder)]), True):
        with pytest.raises(InputError, match=f'is in use by process {os.getpid()} on '):
            train(parse_train_args(['--resume', str(folder)]))
    assert without_seconds(folder) == without_seconds(tiny_run)
