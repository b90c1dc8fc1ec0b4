"""Plain networks of other trainers, whose classifier is retrained."""
import argparse
import json

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from timm.data import create_dataset, create_loader
from timm.models import save_for_hf
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import nn

from shike_timm.cli.retrain_classifier import parse_retrain_args
from shike_timm.errors import InputError
from shike_timm.pretrained.load import load_trained_model
from shike_timm.pretrained.plain import PlainModel, create_plain

NET = 'test_resnet'
COUNTS = {'class2': 40, 'class10': 12, 'class1': 4}


@pytest.fixture
def colours(tmp_path):
    """A folder of noisy images whose classes differ in colour, long-tailed in training only."""
    rng = np.random.default_rng(0)
    for split, counts in (('train', COUNTS), ('val', dict.fromkeys(COUNTS, 8))):
        for channel, (name, count) in enumerate(counts.items()):
            folder = tmp_path / 'data' / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                image = rng.integers(0, 200, (32, 32, 3))
                image[..., channel] += 25
                Image.fromarray(image.astype(np.uint8)).save(folder / f'{i}.png')
    return tmp_path / 'data'


@pytest.fixture
def trained(colours, tmp_path):
    """The folder that timm's loop leaves: `last.pth.tar` of a few epochs, with averaged weights. And the average."""
    torch.manual_seed(0)
    net = timm.create_model(NET, num_classes=3)
    args = argparse.Namespace(
        model=NET, img_size=32, in_chans=None, mean=[0.5] * 3, std=[0.25] * 3, crop_pct=1.0, interpolation='', lr=0.02)
    loader = create_loader(
        create_dataset('', str(colours), split='train'), (3, 32, 32), 16, is_training=True, no_aug=True,
        mean=args.mean, std=args.std, num_workers=0, use_prefetcher=False)
    optimizer = torch.optim.SGD(net.parameters(), args.lr, momentum=0.9)
    ema = ModelEmaV3(net, decay=0.5)
    for _ in range(6):
        for images, target in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images), target).backward()
            optimizer.step()
            ema.update(net)
    (tmp_path / 'timm').mkdir()
    saver = CheckpointSaver(net, optimizer, args, model_ema=ema, checkpoint_dir=str(tmp_path / 'timm'))
    saver.save_checkpoint(0, metric=50.)
    return tmp_path / 'timm' / 'last.pth.tar', ema.module.eval()


def evaluated_by_timm(net, folder):
    """Right answers of each class, in timm's own loop."""
    loader = create_loader(
        create_dataset('', str(folder), split='val'), (3, 32, 32), 8, mean=[0.5] * 3, std=[0.25] * 3, crop_pct=1.,
        interpolation='bicubic', num_workers=0, use_prefetcher=False)
    right = torch.zeros(3)
    with torch.no_grad():
        for images, target in loader:
            right.index_add_(0, target, (net(images).argmax(1) == target).float())
    return right


def test_a_checkpoint_of_timms_loop_is_rebalanced(trained, colours, tmp_path, run_script):
    path, net = trained
    status, out, error = run_script(
        'retrain_classifier.py', '--checkpoint', path, '--backbone', NET, '--data-dir', colours, '--batch-size', '16',
        '--few-shot', '5', '--many-shot', '30', '--crt-epochs', '2', '--workers', '0', '--device', 'cpu', '--output',
        tmp_path / 'out', '--experiment', 'run')
    assert status == 0, error
    assert [line.split()[0] for line in out.splitlines()[-2:]] == ['before', 'stage_two']
    metrics = json.loads((tmp_path / 'out' / 'run' / 'metrics.json').read_text())
    assert list(metrics) == ['before', 'stage_two']
    right = evaluated_by_timm(net, colours) / 8 * 100
    before, after = metrics.values()
    names = sorted(COUNTS, key=lambda name: int(name[5:]))  # timm's order
    for shot, name in (('many', 'class2'), ('medium', 'class10'), ('few', 'class1')):
        assert before[shot] == pytest.approx(float(right[names.index(name)]), abs=0.01)
    assert after['balanced'] > before['balanced'] and after['few'] > before['few']
    saved = load_trained_model(str(tmp_path / 'out' / 'run'))
    assert saved.model.num_experts == 1 and saved.model.fusion == 'none' and saved.class_names == names
    assert list(saved.model.pretrained_cfg['mean']) == [0.5] * 3 and saved.model.classifier.scale == 20
    assert torch.equal(next(saved.model.parameters()), next(net.parameters()))
    assert yaml.safe_load((tmp_path / 'out' / 'run' / 'args.yaml').read_text())['crt_init'] == 'means'
    status, out, _ = run_script('train.py', '--resume', tmp_path / 'out' / 'run')
    assert status == 0 and json.loads((tmp_path / 'out' / 'run' / 'metrics.json').read_text())['before'] == before


def test_accuracy_that_is_given_up_is_told(trained, colours, tmp_path, run_script):
    path, _ = trained
    _, _, error = run_script(
        'retrain_classifier.py', '--checkpoint', path, '--data-dir', colours, '--crt-lr', '50', '--crt-epochs', '1',
        '--workers', '0', '--device', 'cpu', '--output', tmp_path / 'out', '--experiment', 'run')
    before, after = (
        stage['top1'] for stage in json.loads((tmp_path / 'out' / 'run' / 'metrics.json').read_text()).values())
    assert after < before and f'top1 went from {before} to {after}' in error and '--target-prior train' in error


@pytest.mark.parametrize('layout', ['torchvision', 'parallel', 'compiled', 'bare', 'folder'])
def test_layouts_of_other_trainers(tmp_path, layout):
    net = timm.create_model(NET, num_classes=3)
    weights, path = net.state_dict(), tmp_path / 'file.pth'
    averaged = {'n_averaged': torch.tensor(3), **{f'module.{name}': value for name, value in weights.items()}}
    content = {
        'torchvision': dict(
            model=timm.create_model(NET, num_classes=3).state_dict(), model_ema=averaged, epoch=3,
            args=argparse.Namespace(model=NET, lr=0.1)),
        'parallel': dict(state_dict={f'module.{name}': value for name, value in weights.items()}),
        'compiled': dict(arch=NET, state_dict={f'_orig_mod.{name}': value for name, value in weights.items()}),
        'bare': weights,
    }
    if layout == 'folder':
        save_for_hf(net, str(tmp_path / 'folder'), dict(label_names=['b', 'a', 'c']), safe_serialization=True)
        path = f'local-dir:{tmp_path}/folder'
    else:
        torch.save(content[layout], path)
    named = layout in ('compiled', 'folder')
    argv = ['--checkpoint', str(path), *([] if named else ['--backbone', NET])]
    config, plain = parse_retrain_args(argv)
    assert (config.backbone, config.num_experts, config.fusion, config.crt_init) == (NET, 1, False, 'means')
    assert plain.weights.keys() == weights.keys()
    assert all(torch.equal(plain.weights[name], value) for name, value in weights.items())
    assert plain.class_names == (['b', 'a', 'c'] if layout == 'folder' else None)
    if not named:
        with pytest.raises(InputError, match='give --backbone NAME'):
            parse_retrain_args(argv[:2])


def test_labels_of_a_model_that_names_its_classes(trained, colours, tmp_path, run_script):
    net = trained[1]
    order = ['class2', 'class10', 'class1']
    save_for_hf(
        net, str(tmp_path / 'folder'), dict(label_names=order), safe_serialization=True,
        model_args=dict(num_classes=3))
    options = ['--data-dir', colours, '--batch-size', '16', '--img-size', '32', '--crt-epochs', '1', '--workers', '0',
               '--device', 'cpu', '--output', tmp_path / 'out', '--mean', '0.5', '--std', '0.25', '--crop-pct', '1']
    status, _, error = run_script(
        'retrain_classifier.py', '--checkpoint', f'local-dir:{tmp_path}/folder', '--experiment', 'run', *options)
    assert status == 0, error
    before = json.loads((tmp_path / 'out' / 'run' / 'metrics.json').read_text())['before']
    # The network answers 0 for what the folder calls class2, which has label 1 here.
    logits = {'class1': 2, 'class2': 0, 'class10': 1}
    right = 0
    names = sorted(COUNTS, key=lambda name: int(name[5:]))
    loader = create_loader(
        create_dataset('', str(colours), split='val'), (3, 32, 32), 8, mean=[0.5] * 3, std=[0.25] * 3, crop_pct=1.,
        interpolation='bicubic', num_workers=0, use_prefetcher=False)
    with torch.no_grad():
        for images, target in loader:
            places = torch.tensor([logits[names[label]] for label in target])
            right += int((net(images).argmax(1) == places).sum())
    assert before['top1'] == pytest.approx(right / 24 * 100, abs=0.01)


def test_refusals(trained, colours, tmp_path, run_script):
    path, _ = trained

    def refused(message, *argv):
        status, _, error = run_script(
            'retrain_classifier.py', '--data-dir', colours, '--workers', '0', '--device', 'cpu', '--img-size', '32',
            '--batch-size', '16', '--output', tmp_path / 'out', *argv)
        assert status == 2 and message in error and len(error.strip().splitlines()) == 1, error
        assert not (tmp_path / 'out').exists()

    refused("does not fit timm's 'resnet18'", '--checkpoint', path, '--backbone', 'resnet18')
    refused('give --backbone NAME, the network of timm that it is of, which is not', '--checkpoint', path,
            '--backbone', 'resnet_fifty')
    refused('--num-experts 3 does not go with', '--checkpoint', path, '--num-experts', '3')
    refused('cannot be loaded', '--checkpoint', 'local-dir:/nowhere')


def test_a_transformer_keeps_the_image_size_of_its_checkpoint():
    net = timm.create_model('test_vit', num_classes=3, img_size=32, dynamic_img_size=False).eval()
    plain = PlainModel('a file', 'test_vit', net.state_dict())
    model = timm.create_model(
        'shike', backbone='test_vit', num_experts=1, fusion=False, num_classes=3, img_size=32, dynamic_img_size=False)
    found, images = create_plain(plain, model, ['a', 'b', 'c']), torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(found.net.eval()(images), net(images))
