"""Fewer experts at inference: outputs, saved models and costs."""
import itertools
import json
import re
from functools import partial

import pytest
import timm
import torch
from timm.models import save_for_hf

import shike_timm  # noqa: F401
from shike_timm.costs import inference_costs
from shike_timm.metrics import METRICS
from shike_timm.report import logits as report_logits
from shike_timm.report.logits import load_logits


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32)


@pytest.mark.parametrize('classifier', ['cosine', 'linear'])
@pytest.mark.parametrize('experts', [[0], [2, 0], [0, 1, 2]])
@torch.inference_mode()
def test_chosen_experts_are_as_they_were(images, experts, classifier):
    model = timm.create_model('resnet32_shike', num_classes=5, classifier=classifier).eval()
    before = model.forward_experts(images)
    model.set_experts(experts)
    after = model.forward_experts(images)
    torch.testing.assert_close(after, before[:, experts])
    torch.testing.assert_close(model(images), before[:, experts].mean(1))
    assert model.num_experts == len(experts) and model.num_features == model.head_hidden_size == 64 * len(experts)
    assert model.feature_info[-1]['num_chs'] == model.forward_features(images).shape[1] == model.num_features
    assert model.depths == tuple((1, 2, 1)[m] for m in experts)
    model.reset_classifier(4)
    assert model(images).shape == (3, 4)


def test_chosen_experts_still_train(images):
    model = timm.create_model('resnet32_shike', num_classes=5)
    model.set_experts([1, 2])
    model(images).mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.reset_classifier(0)
    model.set_experts([1])
    assert model(images).shape == (3, 64)


@pytest.mark.parametrize('experts', [[], [3], [-1], [1, 1], [True, False], [0., 2.], torch.tensor([0, 2])])
def test_a_wrong_choice_is_refused(experts):
    model = timm.create_model('resnet32_shike')
    with pytest.raises(ValueError, match=r'different numbers from 0 to 2, .* got \['):
        model.set_experts(experts)
    assert model.num_experts == 3 and model.num_features == 192
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 100)


def test_a_saved_model_carries_only_the_chosen(tmp_path, images):
    model = timm.create_model('resnet32_shike', num_classes=5).eval()
    model.set_experts([2, 1])
    save_for_hf(model, tmp_path / 'model', safe_serialization=True)
    loaded = timm.create_model(f'local-dir:{tmp_path}/model', pretrained=True).eval()
    assert loaded.num_experts == 2 and loaded.depths == (1, 2)
    with torch.inference_mode():
        assert torch.equal(loaded(images), model(images))


def test_costs_are_counted():
    linear = torch.nn.Linear(8, 4)
    models = {'linear': linear, 'twice': torch.nn.Sequential(torch.nn.Linear(8, 8), linear)}
    costs = inference_costs(models, torch.randn(16, 8), num_rounds=3, seconds_per_turn=0.01)
    assert costs['linear']['parameters'] == 36 and costs['linear']['gmacs'] == 32e-9
    assert costs['twice']['gmacs'] == 96e-9 and all(cost['images_per_second'] > 0 for cost in costs.values())


def evaluate(run_script, tiny_run, results, *options):
    status, out, err = run_script(
        'eval.py', '--model', f'local-dir:{tiny_run}/model', '--dataset', 'digits_lt', '--workers', '0',
        '--device', 'cpu', '--results-file', results, *options)
    return status, out, err, json.loads(results.read_text()) if status == 0 else None


def test_eval_tells_accuracy_against_cost(tmp_path, run_script, tiny_run, monkeypatch):
    monkeypatch.setattr(
        report_logits, 'inference_costs', partial(inference_costs, num_rounds=1, seconds_per_turn=0.01))
    status, out, err, metrics = evaluate(run_script, tiny_run, tmp_path / 'results.json', '--expert-subsets')
    assert status == 0, err
    counts = metrics['per_class']['class_counts']
    assert f'by the {max(counts)} to {min(counts)} training images a class of the model' in err
    subsets = {tuple(one['experts']): one for one in metrics['subsets']}
    assert list(subsets) == [s for size in (1, 2, 3) for s in itertools.combinations(range(3), size)]
    shares = METRICS[1:]
    for m, expert in enumerate(metrics['experts']):
        assert all(subsets[m,][key] == expert[key] for key in shares)
    assert all(subsets[0, 1, 2][key] == metrics[key] for key in shares)
    assert subsets[0,]['parameters'] < subsets[0, 1]['parameters'] < subsets[0, 1, 2]['parameters']
    assert subsets[0,]['gmacs'] < subsets[0, 2]['gmacs'] < subsets[0, 1, 2]['gmacs']
    lines = out[out.index('experts'):].splitlines()
    assert lines[0].split() == ['experts', *shares, 'params', 'M', 'GMACs', 'img/s']
    assert len(lines) == 8 and lines[-1].startswith('0 1 2')

    _, _, _, two = evaluate(run_script, tiny_run, tmp_path / 'two.json', '--experts', '0', '2')
    _, _, _, flipped = evaluate(run_script, tiny_run, tmp_path / 'flipped.json', '--flip')
    assert flipped['loss'] != metrics['loss']
    assert all(two[key] == subsets[0, 2][key] for key in shares) and len(two['experts']) == 2


def test_flips_cost_twice_as_much(monkeypatch):
    monkeypatch.setattr(report_logits, 'inference_costs', lambda models, images: {
        name: dict(parameters=1, gmacs=3., images_per_second=8.) for name in models})
    subsets = [dict(experts=[0]), dict(experts=[0, 1])]
    report_logits.add_costs(subsets, timm.create_model('resnet32_shike'), torch.zeros(1, 3, 32, 32), passes=2)
    assert [(one['gmacs'], one['images_per_second']) for one in subsets] == [(6., 4.)] * 2


def test_flips_cost_twice_as_much_in_a_report(tiny_run, run_script, tmp_path):
    gmacs = []
    for options in ([], ['--flip']):
        path = tmp_path / f'{len(options)}.npz'
        evaluate(run_script, tiny_run, tmp_path / 'results.json', '--save-logits', str(path), *options)
        gmacs.append([one['gmacs'] for one in load_logits(str(path)).costs])
    assert gmacs[1] == [2 * one for one in gmacs[0]]


@pytest.mark.parametrize('options, message', [
    (['--experts', '0', '2', '--expert-subsets'], 'leave one of them out'),
    (['--experts', '3'], '--experts: .* from 0 to 2'),
])
def test_eval_refuses_experts_that_are_not_there(tmp_path, run_script, tiny_run, options, message):
    status, _, err, _ = evaluate(run_script, tiny_run, tmp_path / 'results.json', *options)
    assert status == 2 and re.search(message, err) and err.count('\n') == 1
