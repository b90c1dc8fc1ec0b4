"""Whole runs: what a run folder holds, resuming, stopping, retraining, evaluation."""
import csv
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, TINY, read_yaml
from timm.utils import NativeScaler

from shike_timm.checkpoints import load_checkpoint
from shike_timm.cli.retrain_classifier import parse_retrain_args
from shike_timm.cli.train import parse_train_args
from shike_timm.errors import InputError
from shike_timm.metrics import METRICS
from shike_timm.pretrained.load import load_trained_model
from shike_timm.training import folder as folders
from shike_timm.training import trainer
from shike_timm.training.methods import RETRAINING_EPOCHS
from shike_timm.training.phases import plan_phases
from shike_timm.training.runs import retrain, train
from shike_timm.training.trainer import Trainer


def without_seconds(path):
    metrics = json.loads((path / 'metrics.json').read_text())
    for result in metrics.values():
        del result['seconds']
    return metrics


def run(tmp_path, *extra):
    metrics = train(parse_train_args([*TINY, '--output', str(tmp_path), *map(str, extra)]))
    return tmp_path / 'run', metrics


def test_run_folder(tiny_run):
    metrics = json.loads((tiny_run / 'metrics.json').read_text())
    assert list(metrics) == ['stage_one', 'stage_two']
    for result in metrics.values():
        assert set(result) == {*METRICS, 'balanced_classes', 'experts', 'seconds'}
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


def test_resuming_with_workers(tmp_path):
    options = ['--workers', '1', '--no-device-data', '--epochs', '1', '--warmup-epochs', '0', '--crt-epochs']
    expected = without_seconds(run(tmp_path / 'whole', *options, '1')[0])
    run(tmp_path, *options, '0')
    (tmp_path / 'run' / 'metrics.json').unlink()
    train(parse_train_args(['--resume', str(tmp_path / 'run'), '--crt-epochs', '1']))
    assert without_seconds(tmp_path / 'run') == expected


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


def test_one_overflow_under_loss_scaling_is_no_end(tmp_path, monkeypatch):
    """A loss that is not finite once, then is: an end without loss scaling only."""
    from shike_timm.training.tasks import RepresentationTask
    original, steps = RepresentationTask.forward, []

    def forward(self, images, target):
        result = original(self, images, target)
        steps.append(1)
        return dict(result, loss=result['loss'] * float('inf')) if len(steps) == 3 else result

    monkeypatch.setattr(RepresentationTask, 'forward', forward)
    finish = Trainer.__post_init__

    def scales(self):
        finish(self)
        self.loss_scaler = NativeScaler('cpu')

    monkeypatch.setattr(Trainer, '__post_init__', scales)
    _, metrics = run(tmp_path, '--log-interval', '100', '--crt-epochs', '0')
    assert math.isfinite(metrics['stage_one']['loss'])


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


def start(tmp_path, *extra):
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    return subprocess.Popen(
        [sys.executable, ROOT / 'train.py', *TINY, '--output', tmp_path, *extra], env=environment,
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        start_new_session=True)


def wait_for_epoch(process, epoch):
    for line in process.stderr:
        if line.startswith(f'Train: {epoch} '):
            return
    raise AssertionError('the run ended early')


LONGER = ['--epochs', '3', '--imb-factor', '5', '--batch-size', '32', '--log-interval', '1']


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    return without_seconds(run(tmp_path_factory.mktemp('undisturbed'), *LONGER)[0])


@pytest.mark.slow
@pytest.mark.parametrize('signum, epoch', [(signal.SIGKILL, 1), (signal.SIGINT, 0)])
def test_signals_leave_a_run_that_resumes(tmp_path, undisturbed, signum, epoch):
    process = start(tmp_path, *LONGER)
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


def test_a_signal_to_the_whole_group_is_an_orderly_stop(tmp_path):
    process = start(tmp_path, '--epochs', '1000', '--val-interval', '1000', '--workers', '2')
    wait_for_epoch(process, 1)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) == 143  # of 1000 epochs
    process.stderr.close()


def test_nan_stops_the_run_and_keeps_the_checkpoint(tmp_path, run_script):
    status, _, error = run_script(
        'train.py', *TINY, '--output', tmp_path, '--lr', '1e30', '--warmup-lr', '0.01', '--epochs', '3',
        '--classifier', 'linear', '--log-interval', '1')
    assert status == 1
    assert 'train.py: The ' in error and 'epoch 1 of stage one' in error
    checkpoint = load_checkpoint(tmp_path / 'run' / 'stage_one' / 'last.pth.tar')
    assert checkpoint['epoch'] == 0
    assert all(value.isfinite().all() for value in checkpoint['state_dict'].values())


def test_nan_names_its_first_step(tmp_path, monkeypatch):
    from shike_timm.training.tasks import RepresentationTask
    original, steps = RepresentationTask.forward, []

    def forward(self, images, target):
        result = original(self, images, target)
        steps.append(1)
        if len(steps) == 3:
            result['loss'] = result['loss'] * float('nan')
        return result

    monkeypatch.setattr(RepresentationTask, 'forward', forward)
    with pytest.raises(trainer.NonFiniteError, match='at step 2 of epoch 0 of stage one'):
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
    header, *_, (name, *ensemble) = map(str.split, out.splitlines())
    assert status == 0 and name == 'ensemble'
    assert ensemble == ['-' if expected[key] is None else f'{expected[key]:.2f}' for key in header]
