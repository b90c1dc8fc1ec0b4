"""Several processes by torchrun: the same training as one, evaluation that counts each image once, kills survived."""
import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from itertools import chain

import pytest
import torch
from conftest import ROOT, TINY
from image_data import RUN

from shike_timm import distributed
from shike_timm.checkpoints import load_checkpoint
from shike_timm.cli.train import parse_train_args
from shike_timm.data.sampler import EpochSampler
from shike_timm.errors import InputError
from shike_timm.models.create import create_model
from shike_timm.training import runs
from shike_timm.training.optimizer import create_optimizer
from shike_timm.training.phases import plan_phases

ENVIRONMENT = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', TORCH_DISABLE_SHARE_RDZV_TCP_STORE='1')


def torchrun(num_processes, *command, **kwargs):
    return subprocess.Popen(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(num_processes),
         *map(str, command)], env=ENVIRONMENT, cwd=ROOT, text=True, start_new_session=True, **kwargs)


def finish(process, status=0):
    out, error = process.communicate(timeout=600)
    assert process.returncode == status, error
    return out, error


@pytest.fixture(scope='module', params=[(1, 2), pytest.param((1, 2, 3), marks=pytest.mark.slow)])
def seen(request, tmp_path_factory):
    """What one, two and three processes saw, by their number, each with the same 48 images an update."""
    folder, counts = tmp_path_factory.mktemp('seen'), request.param
    epochs = len(counts) - 1  # of 8 steps each, in which every BatchNorm waits for all processes
    processes = [
        torchrun(
            n, ROOT / 'tests' / 'distributed_worker.py', folder / f'{n}.json', *TINY, '--output', folder,
            '--experiment', n, '--batch-size', 48 // n, '--no-aug', '--warmup-epochs', 0, '--epochs', epochs,
            '--crt-epochs', epochs, '--lr', 0.0003, '--crt-lr', 0.005, '--crt-init', 'means',
            '--calibrate', stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for n in counts
    ]
    for process in processes:
        finish(process)
    return {
        n: dict(
            json.loads((folder / f'{n}.json').read_text()),
            config=json.loads((folder / str(n) / 'model' / 'config.json').read_text()))
        for n in counts
    }


def test_processes_train_as_one(seen):
    one, *others = seen.values()
    assert len(one['losses']) == 16 * len(others)
    assert len(others) < 2 or one['losses'][15] < 0.75 * one['losses'][0]
    for other in others:
        assert other['losses'] == pytest.approx(one['losses'], rel=1e-5)
        for stage, metrics in one['metrics'].items():
            for key in ('top1', 'top5', 'many', 'medium', 'few'):
                assert other['metrics'][stage][key] == metrics[key]
        temperatures = [process['config']['model_args']['temperature'] for process in (one, other)]
        assert temperatures[0] == pytest.approx(temperatures[1], rel=1e-3) != 1


def test_each_of_101_images_is_evaluated_once(seen):
    one, *others = seen.values()
    for metrics in one['evaluations']:
        assert sum(metrics['per_class']['total']) == 101
    assert all(other['evaluations'] == one['evaluations'] for other in others)


def test_processes_share_the_order_of_one(seen):
    """Batches of several processes are those of one; no image comes twice; its augmentation is its own."""
    orders, pixels = [], []
    for n, result in seen.items():
        for everybody in result['images']:
            flat = [list(chain.from_iterable(zip(*(batch[0] for batch in step)))) for step in zip(*everybody)]
            order = list(chain.from_iterable(flat))
            assert len(everybody) == n and len(order) == len(set(order)) == len(flat) * 8 * n
            orders.append(order)
        pixels.append(dict(pair for batches in result['images'][1] for batch in batches for pair in zip(*batch)))
    assert all(order == orders[0][:len(order)] for order in orders)
    for other in pixels[1:]:
        assert all(pixels[0][image] == value for image, value in other.items() if image in pixels[0])


def test_gradient_accumulation_is_one_large_batch(tmp_path):
    from shike_timm.training.config import StepConfig
    from shike_timm.training.step import train_step
    from shike_timm.training.tasks import ExpertTask
    weights = []
    for num_parts in (1, 3):
        torch.manual_seed(0)
        args = parse_train_args([*TINY, '--opt', 'momentum'])
        task = ExpertTask(create_model(args, 10)).eval()  # BatchNorm has statistics of each part else
        optimizer = create_optimizer(args, 0.001, task.get_eval_model())
        images, target = torch.randn(12, 3, 8, 8), torch.arange(12) % 10
        config = StepConfig(grad_accum_steps=num_parts)
        parts = list(zip(images.chunk(num_parts), target.chunk(num_parts)))
        for i, part in enumerate(parts):
            train_step(task, *part, optimizer, config, update=i == len(parts) - 1)
        weights.append([p.detach().clone() for p in task.parameters()])
    for one, other in zip(*weights):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


def test_a_sampler_gives_whole_updates_from_any_step_on():
    sampler = EpochSampler(103, 8, multiple=3)
    assert sampler.num_batches == 12 and len(sampler) == 96
    sampler.set_epoch(7, 0, 12)
    whole = list(sampler)
    sampler.set_epoch(7, 5, 8)
    assert list(sampler) == whole[40:64]


def test_learning_rate_follows_the_images_of_an_update(monkeypatch):
    argv = [*TINY, '--batch-size', '32', '--lr-base', '0.2', '--crt-lr-base', '0.1', '--grad-accum-steps', '2']
    for n, expected in ((1, [0.05, 0.025]), (4, [0.2, 0.1])):
        monkeypatch.setattr('shike_timm.training.phases.world_size', lambda n=n: n)
        assert [phase.lr for phase in plan_phases(parse_train_args(argv))] == pytest.approx(expected)
    adam = plan_phases(parse_train_args([*argv, '--opt', 'AdamW', '--lr-base-size', '64']))
    assert [phase.lr for phase in adam] == pytest.approx([0.4, 0.2])


def test_what_a_gpu_is_needed_for(monkeypatch):
    monkeypatch.setattr(runs, 'world_size', lambda: 2)
    with pytest.raises(InputError, match='--sync-bn needs GPUs'):
        runs.prepare(parse_train_args([*TINY, '--sync-bn']), [], torch.device('cpu'))
    run = runs.prepare(parse_train_args([*TINY, '--sync-bn', '--no-device-data']), [], torch.device('meta'))
    norms = [m for m in run.model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert norms and all(isinstance(norm, torch.nn.SyncBatchNorm) for norm in norms)
    monkeypatch.setenv('WORLD_SIZE', '4')
    monkeypatch.setenv('LOCAL_RANK', '2')
    with pytest.raises(InputError, match='Process 2 of this machine finds 0 GPUs'):
        monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)
        distributed.join_processes('cuda')


@pytest.mark.parametrize('local_rank, expected', [(0, ['read', 'met', 'met']), (1, ['met', 'read', 'met'])])
def test_nobody_waits_for_a_process_that_fails(monkeypatch, local_rank, expected):
    seen = []

    def gather(errors, error):
        seen.append('met')
        errors[:] = [error, []]

    def fail():
        seen.append('read')
        raise InputError('no data')

    monkeypatch.setattr(distributed, 'world_size', lambda: 2)
    monkeypatch.setattr(distributed, 'world_info_from_env', lambda: (local_rank, local_rank, 2))
    monkeypatch.setattr(distributed.dist, 'all_gather_object', gather)
    assert distributed.local_primary_first(lambda: seen.append('read') or 7) == 7
    assert seen == expected
    seen.clear()
    with pytest.raises(InputError, match='no data'):
        distributed.local_primary_first(fail)
    assert seen == expected[:expected.index('read') + 2]


@pytest.mark.slow
def test_an_error_of_one_process_ends_all(image_folder, tmp_path, unused_port):
    """Without an agent, as under Slurm. It may find no data, or be killed."""
    def start(number, data):
        context = dict(RANK=number, LOCAL_RANK=number, WORLD_SIZE=2, MASTER_ADDR='127.0.0.1', MASTER_PORT=unused_port)
        return subprocess.Popen(
            [sys.executable, 'train.py', *RUN, '--data-dir', data, '--epochs', '99', '--output', tmp_path], cwd=ROOT,
            env={**ENVIRONMENT, **{name: str(value) for name, value in context.items()}}, stderr=subprocess.PIPE,
            text=True)

    for process in [start(0, tmp_path / 'nowhere'), start(1, image_folder)]:
        _, error = process.communicate(timeout=100)
        assert process.returncode == 2 and "nowhere' does not exist" in error and 'Traceback' not in error
    first, second = start(0, image_folder), start(1, image_folder)
    wait_for(tmp_path / 'run', 'one', 1, 0)
    second.kill()
    _, error = first.communicate(timeout=100)
    second.communicate()
    assert first.returncode == 1 and 'Another process of the run is gone' in error and 'Traceback' not in error, error


def test_restarts_that_torchrun_does_not_do_reliably(monkeypatch, caplog):
    for name, value in dict(WORLD_SIZE=2, TORCHELASTIC_MAX_RESTARTS=1, TORCHELASTIC_USE_AGENT_STORE=True).items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(InputError, match='2 processes are expected'):
        distributed.join_processes('cpu')
    assert 'TORCH_DISABLE_SHARE_RDZV_TCP_STORE' in caplog.text


# A run that lasts some seconds, saved every second update.
LONGER = [
    *TINY, '--imb-factor', '5', '--batch-size', '16', '--log-interval', '1', '--recovery-interval', '2', '--aa',
    'rand-m9-mstd0.5', '--drop', '0.1', '--model-ema', '--model-ema-decay', '0.9', '--reprob', '0.2', '--resume']


def result(folder):
    metrics = json.loads((folder / 'metrics.json').read_text())
    for stage in metrics.values():
        del stage['seconds']
    with (folder / 'summary.csv').open() as file:
        losses = [(row['epoch'], row['train_loss']) for row in csv.DictReader(file)]
    return metrics, losses, (folder / 'model' / 'model.safetensors').read_bytes()


def wait_for(folder, stage, epoch, step):
    """Wait until the run saved something from the middle of an epoch."""
    last = folder / f'stage_{stage}' / 'last.pth.tar'
    for _ in range(10_000):
        if last.exists():
            saved = load_checkpoint(last)
            if (saved['epoch'], saved['saver']['done'].get('step', 0)) >= (epoch - 1, step):
                return
        time.sleep(0.02)
    raise AssertionError('nothing was saved')


def worker_ids(process):
    found = subprocess.run(['ps', '-o', 'pid=', '--ppid', str(process.pid)], capture_output=True, text=True).stdout
    return [int(number) for number in found.split()]


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    output = tmp_path_factory.mktemp('undisturbed')
    finish(torchrun(2, 'train.py', *LONGER, '--output', output, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    return result(output / 'run')


@pytest.mark.slow
def test_a_killed_process_starts_again_by_itself(tmp_path, undisturbed):
    process = torchrun(
        2, '--max-restarts', 1, 'train.py', *LONGER, '--output', tmp_path, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE)
    wait_for(tmp_path / 'run', 'one', 1, 4)
    os.kill(worker_ids(process)[1], signal.SIGKILL)
    _, error = finish(process)
    assert re.search(r'Resuming stage_one at epoch 2, step [1-9]', error)
    assert result(tmp_path / 'run') == undisturbed


@pytest.mark.slow
def test_a_signal_to_all_processes_is_an_orderly_stop(tmp_path, undisturbed):
    process = torchrun(2, 'train.py', *LONGER, '--output', tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for(tmp_path / 'run', 'two', 0, 2)
    workers = worker_ids(process)
    for pid in workers:
        os.kill(pid, signal.SIGTERM)
    _, error = finish(process, status=1)  # torchrun's own
    assert error.count('exitcode  : 143') >= 1 and 'stopped by signal 15' in error
    out, _ = finish(torchrun(
        2, 'train.py', *LONGER, '--output', tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    assert out.count('stage_two ensemble') == 1
    assert result(tmp_path / 'run') == undisturbed


@pytest.mark.slow
def test_a_mistake_ends_all_processes(tmp_path):
    _, error = finish(torchrun(
        2, 'eval.py', '--model', 'resnet32_shike.cifar100_lt_if100', '--pretrained', '--dataset', 'digits_lt',
        '--device', 'cpu', stdout=subprocess.PIPE, stderr=subprocess.PIPE), status=1)
    assert "eval.py: error: Class '0' of the validation split" in error
    assert 'Error:' not in error.split('ChildFailed')[0]
