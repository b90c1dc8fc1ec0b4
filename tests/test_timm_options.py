"""Options that timm's train.py has: what each of them reaches."""
import io
import json
import tarfile
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from PIL import Image
from torchvision import transforms

from shike_timm.checkpoints import StageSaver, load_checkpoint
from shike_timm.cli.train import parse_train_args
from shike_timm.data import AugmentationConfig, SourceConfig, load_training_data, set_mixup
from shike_timm.data.augment.batch import why_not_batched
from shike_timm.data.augment.transforms import create_train_transform
from shike_timm.losses import balanced_softmax, expert_cross_entropy, focal, logit_adjusted, representation_loss
from shike_timm.metrics import METRICS
from shike_timm.options import options
from shike_timm.training import trainer
from shike_timm.training.config import LoopConfig
from shike_timm.training.methods import METHODS
from shike_timm.training.optimizer import create_schedule
from shike_timm.training.phases import plan_phases
from shike_timm.training.runs import prepare, train
from shike_timm.training.trainer import Trainer

COUNTS = torch.tensor([9, 4, 2, 1])


@pytest.fixture
def run_of(image_folder):
    """The parts of a run over a folder of images, nothing of which is trained."""

    def make(*options):
        args = parse_train_args([
            '--model', 'resnet32_shike', '--data-dir', str(image_folder), '--batch-size', '8', '--img-size', '8',
            '--workers', '0', '--device', 'cpu', *options])
        return prepare(args, plan_phases(args), torch.device('cpu'))

    return make


def test_label_smoothing():
    logits, target = torch.randn(6, 3, 4, dtype=torch.float64), torch.arange(6) % 4
    smoothed = F.one_hot(target, 4) * 0.8 + 0.05
    expected = F.cross_entropy(logits.flatten(0, 1), target.repeat_interleave(3), label_smoothing=0.2) * 3
    assert torch.allclose(expert_cross_entropy(logits, target, 0.2), expected)
    for loss in (partial(balanced_softmax, class_counts=COUNTS), partial(logit_adjusted, class_counts=COUNTS), focal):
        assert torch.allclose(loss(logits, target, smoothing=0.2), loss(logits, smoothed))
        assert torch.allclose(loss(logits, smoothed, smoothing=0.5), loss(logits, smoothed * 0.5 + 0.125))
    plain, smooth = representation_loss(logits, target), representation_loss(logits, target, smoothing=0.2)
    assert torch.allclose(smooth.ce, expected) and torch.equal(smooth.nt, plain.nt)


@pytest.mark.parametrize('method', METHODS)
def test_label_smoothing_reaches_both_stages(method, run_of):
    run = run_of('--method', method, '--smoothing', '0.2', '--crt-epochs', '1')
    images, target = torch.randn(8, 3, 8, 8), torch.arange(8) % 3
    if method == 'ldam_drw':
        with pytest.raises(ValueError, match='--smoothing does not go with'):
            run.start(run.phases[0])
        return
    for phase in run.phases:
        run.start(phase)
        task = run.task.eval()
        assert task.criterion.keywords['smoothing'] == 0.2
        assert task(images, target)['loss'] != partial(task.criterion, smoothing=0.)(
            task.get_eval_model().forward_experts(images), target)


@pytest.mark.parametrize('policy', [None, 'cifar10', 'rand-m9'])
def test_probabilities_of_colour_and_blur(policy):
    options = dict(aa=policy, force_color_jitter=True, color_jitter=0.9, hflip=0., train_crop_mode='pad')
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    grey = create_train_transform((3, 32, 32), AugmentationConfig(grayscale_prob=1., **options))(image)
    assert torch.equal(grey[0], grey[2])
    config = AugmentationConfig(color_jitter_prob=0.25, gaussian_blur_prob=0.5, **options)
    parts = create_train_transform((3, 32, 32), config)
    applied = {
        type(part.transforms[0]): part.p for part in parts.transforms if isinstance(part, transforms.RandomApply)}
    assert applied == {transforms.ColorJitter: 0.25, transforms.GaussianBlur: 0.5}
    assert not any(isinstance(part, transforms.ColorJitter) for part in parts.transforms)
    for name in ('grayscale_prob', 'gaussian_blur_prob'):
        options = AugmentationConfig(train_crop_mode='pad', color_jitter=0., **{name: 0.5})
        gap = why_not_batched(options, torch.device('cpu'))
        assert gap == f"--{name.replace('_', '-')} 0.5"


def test_what_reaches_the_loader(run_of):
    run = run_of('--reprob', '0.5', '--remode', 'rand', '--recount', '3', '--train-interpolation', 'bicubic')
    erasing = run.train_loader.random_erasing
    assert (erasing.probability, erasing.rand_color, erasing.per_pixel, erasing.max_count) == (0.5, True, False, 3)
    assert 'bicubic' in repr(run.data.train.transform)
    assert len(next(iter(run.eval_loader))[1]) == 8  # -vb is the batch size by default
    mixed = run_of(
        '--mixup', '0.4', '--cutmix', '1', '--mixup-prob', '0.75', '--mixup-switch-prob', '0.25', '--alpha', '0')
    collate = mixed.train_loader.collate
    assert (collate.mix_prob, collate.switch_prob, collate.mixup_alpha, collate.cutmix_alpha) == (0.75, 0.25, 0.4, 1.)


def test_mixing_ends_in_workers_too(run_of):
    run = run_of('--mixup', '8', '--alpha', '0', '--workers', '1', '--mixup-off-epoch', '3')
    for enabled in (True, False, True):
        set_mixup(run.train_loader, enabled)
        peaks = torch.cat([target.amax(1) for _, target in run.train_loader])
        assert bool((peaks == 1).all()) != enabled


def test_images_mix_alike_with_and_without_workers(run_of):
    batches = []
    for workers in (0, 1):
        run = run_of('--mixup', '0.4', '--cutmix', '1', '--alpha', '0', '--workers', str(workers))
        run.train_loader.sampler.set_epoch(3, 0, 2)
        torch.manual_seed(0)
        batches.append([*run.train_loader, (torch.rand(3), torch.rand(3))])  # What training draws stays the same too.
    for one, other in zip(*batches):
        assert all(map(torch.equal, one, other))


def test_when_mixing_ends(tmp_path, image_folder, monkeypatch):
    told = []
    monkeypatch.setattr('shike_timm.training.trainer.set_mixup', lambda loader, enabled: told.append(enabled))
    train(parse_train_args([
        '--model', 'resnet32_shike', '--data-dir', str(image_folder), '--batch-size', '8', '--img-size', '8', '--mixup',
        '0.4', '--alpha', '0', '--epochs', '2', '--warmup-epochs', '0', '--crt-epochs', '2', '--mixup-off-epoch', '3',
        '--workers', '0', '--device', 'cpu', '--output', str(tmp_path)]))
    assert told == [True, True, True, False]


def test_what_reaches_the_loop_and_the_schedule():
    args = parse_train_args([
        '--dist-bn', 'broadcast', '--crt-warmup-epochs', '2', '--crt-warmup-lr', '0.03', '--crt-epochs', '5',
        '--clip-grad', '0'])
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    create_schedule(optimizer, args, plan_phases(args)[1]).step(0)
    assert optimizer.param_groups[0]['lr'] == 0.03


def test_lengths_of_streams(tmp_path):
    pytest.importorskip('webdataset')
    with tarfile.open(tmp_path / 'x-0.tar', 'w') as tar:
        for i in range(8):
            content = io.BytesIO()
            Image.new('RGB', (4, 4), i).save(content, 'PNG')
            for suffix, data in (('png', content.getvalue()), ('cls', b'%d' % (i % 2))):
                member = tarfile.TarInfo(f'{i:04d}.{suffix}')
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    (tmp_path / 'stats.json').write_text(json.dumps(dict(pos_counts=[4, 4], num_samples=8)))
    data = load_training_data(SourceConfig(
        dataset='wds/x', data_dir='', train_split=f'pipe:cat {tmp_path}/x-0.tar',
        val_split=f'pipe:cat {tmp_path}/x-0.tar',
        train_num_samples=8, val_num_samples=6, class_stats=str(tmp_path / 'stats.json')))
    assert (len(data.train), len(data.test)) == (8, 6)


def test_an_average_warms_up_and_both_weights_are_told(tmp_path, caplog):
    def run(name, *options):
        argv = [*TINY, '--output', str(tmp_path / name), '--model-ema', '--lr', '0.005', '--crt-epochs', '0', *options]
        train(parse_train_args(argv))
        return json.loads((tmp_path / name / 'run' / 'metrics.json').read_text())['stage_one']

    caplog.set_level('INFO')
    warm, cold = run('warm'), run('cold', '--no-model-ema-warmup')
    assert warm['plain'] == cold['plain'] and set(warm) - set(warm['plain']) == {'plain', 'seconds'}
    distances = [abs(one['loss'] - one['plain']['loss']) for one in (warm, cold)]
    assert distances[0] < distances[1] and 'averaged weights of stage one are kept' in caplog.text


def test_the_best_checkpoint_is_kept(tmp_path):
    assert options(LoopConfig)['eval_metric'].choices == METRICS
    model = torch.nn.Linear(1, 1)
    saver = StageSaver(tmp_path, model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.), decreasing=True)
    for epoch, loss in enumerate((3., None, 1., 2.)):
        torch.nn.init.constant_(model.weight, epoch)
        saver.save_epoch(epoch, loss)
    best, last = (load_checkpoint(tmp_path / f'{name}.pth.tar') for name in ('model_best', 'last'))
    assert best['epoch'] == 2 == float(best['state_dict']['weight']) and last['epoch'] == 3
    assert last['saver']['best_metric'] == 1. and not (tmp_path / 'tmp.pth.tar').exists()

    def fail(*_):
        raise OSError

    saver.save_checkpoint = fail
    with pytest.raises(OSError):
        saver.save_epoch(4, 0.5)
    best, last = (load_checkpoint(tmp_path / f'{name}.pth.tar') for name in ('model_best', 'last'))
    assert best['epoch'] == 4 and last['saver']['best_metric'] == 1.  # the last is not ahead of the best


def test_a_failing_evaluation_costs_no_epoch(tmp_path, tiny_run, monkeypatch):
    evaluate, calls = Trainer.evaluate, []

    def fail(self, model):
        calls.append(None)
        if len(calls) == 2:
            raise OSError('out of space')
        return evaluate(self, model)

    monkeypatch.setattr(Trainer, 'evaluate', fail)
    steps, step = [], trainer.train_step
    monkeypatch.setattr(trainer, 'train_step', lambda *args: steps.append(None) or step(*args))
    argv = [*TINY, '--output', str(tmp_path)]
    with pytest.raises(OSError, match='out of space'):
        train(parse_train_args(argv))
    of_stage_one = len(steps)
    metrics = train(parse_train_args([*argv, '--resume']))
    assert len(steps) == 2 * of_stage_one  # stage two has as many, and both epochs of stage one were over
    expected = json.loads((tiny_run / 'metrics.json').read_text())
    for stage in expected:
        assert {**metrics[stage], 'seconds': 0} == {**expected[stage], 'seconds': 0}
