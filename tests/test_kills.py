"""Fifty-four random kills over six recipes: a run that is killed and resumed ends as an undisturbed one, bit for bit.

Each resumption has another number of worker processes. Two, four and eight starts of one run at once are one run.
"""
import csv
import os
import random
import subprocess
import sys
import time

import pytest
from conftest import ROOT, TINY

from shike_timm.checkpoints import load_checkpoint

pytestmark = pytest.mark.slow
KILLS = 9
SAVED_OFTEN = [*TINY, '--imb-factor', '5', '--batch-size', '32', '--recovery-interval', '2', '--no-device-data']
RECIPES = {
    'shike': ['--aa', 'rand-m9-mstd0.5', '--drop', '0.1'],
    'averaged': ['--model-ema', '--model-ema-decay', '0.9', '--reprob', '0.3', '--eval-metric', 'top1'],
    'mixed': ['--method', 'ce', '--mixup', '0.2', '--crt-epochs', '1'],
    'ldam': ['--method', 'ldam_drw', '--crt-epochs', '0', '--epochs', '4'],
    'accumulated': ['--grad-accum-steps', '2', '--opt', 'adamw', '--lr', '0.001', '--holdout', '0.2'],
    'residual': ['--fusion-type', 'residual', '--classifier', 'linear', '--trunk-grad', 'mean', '--sched', 'step'],
}


def start(output, recipe, workers):
    return subprocess.Popen(
        [sys.executable, 'train.py', *SAVED_OFTEN, *recipe, '--workers', str(workers), '--output', output, '--resume'],
        cwd=ROOT, env=dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1'), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True)


def result(output):
    """What a run leaves, but for its seconds."""
    run = output / 'run'
    with (run / 'summary.csv').open(newline='') as file:
        rows = [{key: value for key, value in row.items() if 'seconds' not in key} for row in csv.DictReader(file)]
    return rows, (run / 'model' / 'model.safetensors').read_bytes()


@pytest.mark.parametrize('name', RECIPES)
def test_kills(name, tmp_path):
    rng, recipe = random.Random(name), RECIPES[name]
    process = start(tmp_path / 'undisturbed', recipe, 0)
    assert process.wait(300) == 0, process.stderr.read()
    last = tmp_path / 'killed' / 'run' / 'stage_one' / 'last.pth.tar'
    for kill in range(KILLS):
        process = start(tmp_path / 'killed', recipe, kill % 3)
        seen = os.stat(last).st_mtime_ns if last.exists() else None
        begun = time.monotonic()
        while process.poll() is None and time.monotonic() - begun < 60 and (
                (os.stat(last).st_mtime_ns if last.exists() else None) == seen):
            time.sleep(0.01)  # Until it has saved something.
        time.sleep(rng.uniform(0, 0.8))
        if process.poll() is None:  # A quick machine may have finished the run.
            os.killpg(process.pid, 9)
        _, error = process.communicate()
        assert process.returncode in (-9, 0), error
    process = start(tmp_path / 'killed', recipe, 1)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    assert result(tmp_path / 'killed') == result(tmp_path / 'undisturbed')


@pytest.mark.parametrize('number', [2, 4, 8])
def test_starts_at_once(number, tmp_path):
    processes = [
        subprocess.Popen(
            [sys.executable, 'train.py', *TINY, '--seed', str(seed), '--output', tmp_path], cwd=ROOT, text=True,
            env=dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1'), stderr=subprocess.PIPE)
        for seed in range(number)]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    statuses = [process.returncode for process in processes]
    assert sorted(statuses) == [0] + [2] * (number - 1), errors
    for status, error in zip(statuses, errors):
        assert status == 0 or 'is in use by process' in error or 'already holds a run' in error
    assert load_checkpoint(tmp_path / 'run' / 'stage_two' / 'last.pth.tar')['args'].seed == statuses.index(0)
    assert f'seed: {statuses.index(0)}\n' in (tmp_path / 'run' / 'args.yaml').read_text()
