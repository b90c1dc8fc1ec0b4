"""The prior that logits answer for: what it adds, what it needs to know, and where it is kept."""
import json
import re

import numpy as np
import pytest
import timm
import torch
from conftest import TINY

import shike_timm  # noqa: F401
from shike_timm.cli.export import export, parse_export_args
from shike_timm.cli.train import parse_train_args
from shike_timm.data import SourceConfig, in_memory_set, load_eval_data
from shike_timm.data.loaders import create_eval_loader
from shike_timm.data.sources.long_tailed import long_tailed_counts, long_tailed_indices
from shike_timm.metrics import evaluate
from shike_timm.pretrained.folder import export_model
from shike_timm.pretrained.load import load_trained_model
from shike_timm.publishing.export import FILES, load_exported
from shike_timm.training.phases import plan_phases

COUNTS = [60, 25, 10, 5]
TRAIN = torch.tensor([0.6, 0.25, 0.1, 0.05])


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model('resnet32_shike', num_classes=4).eval()


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32)


@pytest.mark.parametrize('own, target, added', [
    ('uniform', 'train', TRAIN.log()),
    ('uniform', [1, 2, 3, 4], torch.tensor([0.1, 0.2, 0.3, 0.4]).log()),
    ('uniform', 'uniform', None),
    ('train', 'uniform', -TRAIN.log()),
    ('train', np.array([5, 1, 2, 2]), torch.tensor([0.5, 0.1, 0.2, 0.2]).log() - TRAIN.log()),
    ('train', 'train', None),
    (None, None, None),
])
@torch.inference_mode()
def test_what_a_prior_adds(model, images, own, target, added):
    before = model.forward_experts(images)
    model.set_training_prior(np.array(COUNTS), own)
    model.set_target_prior(target)
    assert model.class_counts == COUNTS
    expected = before if added is None else before + added
    torch.testing.assert_close(model.forward_experts(images), expected)
    torch.testing.assert_close(model(images), expected.mean(1))
    model.set_target_prior(None)
    assert torch.equal(model.forward_experts(images), before)


@torch.inference_mode()
def test_training_mode_and_other_experts(model, images):
    model.set_training_prior(COUNTS, 'uniform')
    features = model.forward_features(images)
    plain = model.forward_expert_head(features)
    model.set_target_prior('train')
    assert torch.equal(model.train().forward_expert_head(features), plain)
    torch.testing.assert_close(model.eval().forward_expert_head(features), plain + TRAIN.log())
    torch.testing.assert_close(model.forward_head(features), plain.mean(1) + TRAIN.log())
    model.set_experts([2, 0])
    torch.testing.assert_close(model.forward_experts(images), plain[:, [2, 0]] + TRAIN.log())
    assert model.half().prior_offset.dtype == torch.float16 and not any('prior' in name for name in model.state_dict())
    model.reset_classifier(4)
    assert model.class_counts is model.target_prior is model.prior_offset is model.classifier_prior is None


def test_what_is_not_known_is_refused(model):
    for prior in ('train', 'uniform', COUNTS):
        with pytest.raises(ValueError, match='does not say which prior its classifiers were trained for'):
            model.set_target_prior(prior)
    model.set_training_prior(None, 'uniform')
    model.set_target_prior([4, 3, 2, 1])
    for prior, message in (
            ('train', 'does not know its training images'), ('balanced', "got 'balanced'"), ([1, 2], '2 values'),
            ([1, 2, 3, 0], 'holds 0, expected positive'), ([1, 2, 3, float('nan')], 'holds nan')):
        with pytest.raises(ValueError, match=message):
            model.set_target_prior(prior)
    assert model.target_prior == [4, 3, 2, 1]
    with pytest.raises(ValueError, match="'uniform', 'train' or None, got 'ce'"):
        model.set_training_prior(COUNTS, 'ce')
    with pytest.raises(ValueError, match='class_counts has 3 values'):
        model.set_training_prior([1, 2, 3])


@torch.inference_mode()
def test_a_saved_model_keeps_it(model, images, tmp_path):
    model.set_training_prior(COUNTS, 'uniform')
    model.set_target_prior('train')
    timm.models.save_for_hf(model, tmp_path / 'timm', safe_serialization=True)
    export_model(model, tmp_path / 'own', timm.data.resolve_model_data_config(model), list('abcd'), COUNTS)
    for name in ('timm', 'own'):
        loaded = timm.create_model(f'local-dir:{tmp_path / name}', pretrained=True).eval()
        assert torch.equal(loaded(images), model(images)) and loaded.class_counts == COUNTS
        assert timm.create_model(f'local-dir:{tmp_path / name}', pretrained=True, num_classes=3).class_counts is None
    loaded.set_target_prior('uniform')
    model.set_target_prior(None)
    assert torch.equal(loaded(images), model(images))


def test_packaged_weights_know_theirs():
    model = timm.create_model('resnet32_shike', pretrained=True)
    assert model.class_counts == long_tailed_counts(500, 100, 100) and model.classifier_prior == 'uniform'
    assert timm.create_model('resnet32_shike').class_counts is None
    assert timm.create_model('resnet32_shike', pretrained=True, num_classes=7).class_counts is None


@pytest.mark.parametrize('argv, priors', [
    ([], ['train', 'uniform']),
    (['--method', 'ce'], ['train']),
    (['--method', 'balanced_softmax'], ['uniform']),
    (['--method', 'logit_adjusted'], ['uniform']),
    (['--method', 'logit_adjusted', '--tau', '0.5'], [None]),
    (['--method', 'focal'], [None]),
    (['--method', 'ldam_drw', '--crt-epochs', '3'], [None, 'uniform']),
    (['--kd-model-name', 'x', '--method', 'ce'], [None]),
])
def test_what_each_method_answers_for(argv, priors):
    assert [phase.prior for phase in plan_phases(parse_train_args(argv))] == priors


def test_a_run_keeps_it(tiny_run):
    model = timm.create_model(f'local-dir:{tiny_run}/model', pretrained=True)
    assert model.classifier_prior == 'uniform' and len(model.class_counts) == 10
    for stage, prior in (('stage_one', 'train'), ('stage_two', 'uniform')):
        saved = load_trained_model(checkpoint=str(tiny_run / stage / 'last.pth.tar')).model
        assert (saved.class_counts, saved.classifier_prior) == (model.class_counts, prior)


@pytest.mark.parametrize('format', ['onnx', pytest.param('torch-export', marks=pytest.mark.slow)])
@torch.inference_mode()
def test_an_exported_graph_holds_it(format, tmp_path, images):
    folder = export(parse_export_args([
        '--model', 'resnet32_shike', '--pretrained', '--format', format, '--target-prior', 'train', '--output',
        str(tmp_path / 'out')]))
    model = timm.create_model('resnet32_shike', pretrained=True).eval()
    expected = model(images) + (torch.tensor(model.class_counts) / sum(model.class_counts)).log()
    torch.testing.assert_close(load_exported(folder / FILES[format], format)(images), expected, atol=1e-4, rtol=1e-4)
    config = json.loads((folder / 'config.json').read_text())
    assert config['model_args']['target_prior'] == 'train'


def test_files(tmp_path, tiny_run, run_script):
    command = ['eval.py', '--model', f'local-dir:{tiny_run}/model', '--dataset', 'digits_lt', '--workers', '0']
    tables = {}
    by_name = {str(digit): 10 - digit for digit in reversed(range(10))}
    written = dict(
        list=list(range(10, 0, -1)), stats=dict(pos_counts=list(range(10, 0, -1)), num_samples=55), names=by_name,
        ordered=dict(pos_counts=list(range(1, 11)), class_names=[str(c) for c in reversed(range(10))]))
    for name, content in written.items():
        (tmp_path / name).write_text(json.dumps(content))
        status, tables[name], error = run_script(*command, '--target-prior', tmp_path / name)
        assert status == 0, error
    assert tables['list'] == tables['stats'] == tables['names'] == tables['ordered'] != run_script(*command)[1]
    for content, message in (
            ('{', 'cannot be used: Expecting'), ('[1, 2]', '2 values'), ('{"x": 3}', "the file has no class '0'"),
            (json.dumps(dict(by_name, x=3)), "the model has no class 'x'"), ('3', 'not iterable')):
        (tmp_path / 'bad').write_text(content)
        status, out, error = run_script(*command, '--target-prior', tmp_path / 'bad')
        assert status == 2 and not out and len(error.splitlines()) == 1
        assert re.search(f"--target-prior '{tmp_path / 'bad'}' .*{re.escape(message)}", error)
    assert 'No such file' in run_script(*command, '--target-prior', 'balanced')[2]


def test_a_long_tailed_evaluation_set_is_told(image_folder, tmp_path, run_script):
    for number in range(1, 4):
        (image_folder / 'validation' / 'cat' / f'{number}.png').unlink()
    argv = [
        '--dataset', '', '--imb-factor', '100', '--data-dir', image_folder, '--num-classes', '3', '--crt-epochs', '0',
        '--batch-size', '8']
    assert run_script('train.py', *TINY, '--output', tmp_path, *argv, '--epochs', '2')[0] == 0
    evaluation = ['eval.py', '--model', f'local-dir:{tmp_path}/run/model', '--data-dir', image_folder, '--workers', '0']
    status, out, error = run_script(*evaluation, '--img-size', '8', '--device', 'cpu')
    assert status == 0 and 'itself long-tailed, with 1 to 4 images' in error


@pytest.mark.slow
def test_images_drawn_with_other_frequencies(real_cifar_root):
    """CIFAR-100 test images as frequent as in training, or the other way round: as is, and with that prior."""
    whole = load_eval_data(SourceConfig(dataset='cifar100_lt', data_dir=str(real_cifar_root)))
    model = timm.create_model('resnet32_shike', pretrained=True)
    config, device = timm.data.resolve_model_data_config(model), torch.device('cpu')
    top1 = []
    for drawn in (long_tailed_counts(100, 100, 100), long_tailed_counts(100, 100, 100)[::-1]):
        index = long_tailed_indices(whole.targets, drawn)
        data = in_memory_set(whole.images[index], whole.targets[index], whole.class_names)
        for prior in (None, drawn):
            model.set_target_prior(prior)
            loader = create_eval_loader(data, config, 256, device, 0)
            top1.append(evaluate(model, loader, model.class_counts, device)['top1'])
    assert top1 == pytest.approx([69.31, 75.04, 43.59, 54.06], abs=0.2)
