"""Rejection of unknown images and calibration: the values, where they are kept, and what the commands make of them."""
import json

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import TINY
from scipy.optimize import minimize_scalar

import shike_timm
from shike_timm.checkpoints import load_checkpoint
from shike_timm.cli.export import export, parse_export_args
from shike_timm.errors import InputError
from shike_timm.metrics import ExpertEvaluator, fit_temperature, rejection
from shike_timm.pretrained.folder import export_model
from shike_timm.pretrained.load import from_checkpoint, load_trained_model
from shike_timm.report.analysis import Analysis
from shike_timm.report.logits import load_logits, save_logits
from shike_timm.report.page import write_report

COUNTS = [60, 25, 10, 5]


def evaluated(logits, targets, threshold=None):
    evaluator = ExpertEvaluator(logits.shape[1], [0] * logits.shape[2], threshold=threshold)
    for part in zip(logits.split(64), targets.split(64)):
        evaluator.update(*part)
    return evaluator.compute()


@pytest.fixture(scope='module')
def guesses():
    """Overconfident logits of two experts [2000, 2, 5], and the classes."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(5, (2000,), generator=generator)
    return 3 * (torch.randn(2000, 2, 5, generator=generator) + F.one_hot(targets, 5)[:, None]), targets


def test_threshold_keeps_95_of_100_right_answers(guesses):
    logits, targets = guesses
    confidence, said = logits.mean(1).softmax(-1).max(-1)
    right = said == targets
    reject = evaluated(*guesses)['reject']
    lowest = float(confidence[right].sort().values[int(0.05 * right.sum())])
    assert reject['threshold'] == pytest.approx(lowest, abs=1e-4)
    kept = confidence >= reject['threshold']
    assert 0.95 <= float(kept[right].float().mean()) < 0.952
    assert reject['coverage'] == round(100 * float(kept.double().mean()), 2)
    assert reject['accuracy'] == round(100 * float(right[kept].double().mean()), 2)
    for threshold in (0, 0.5, 0.87654, 1):
        kept = confidence >= threshold
        found = evaluated(*guesses, threshold)['reject']
        assert found['coverage'] == pytest.approx(100 * float(kept.float().mean()), abs=0.051)
        share = pytest.approx(100 * float(right[kept].float().mean()), abs=0.1) if kept.any() else None
        assert found['accuracy'] == share
    text = rejection(reject, known=False)
    assert f"--reject-below {reject['threshold']:g} " in text and f"{reject['accuracy']} %" in text
    wrong = evaluated(torch.eye(3)[[0, 1]][:, None], torch.tensor([2, 2]))['reject']
    assert wrong == dict(threshold=0., coverage=100., accuracy=0.) and 'None' not in rejection(found, known=True)


def test_temperature_is_that_of_scipy_and_calibrates(guesses):
    logits, targets = guesses
    averaged = logits.mean(1)
    best = minimize_scalar(
        lambda t: float(F.cross_entropy(averaged.double() / t, targets)), bounds=(0.05, 20), method='bounded').x
    temperature = fit_temperature(averaged, targets)
    assert temperature == pytest.approx(best, abs=1e-3) and temperature > 1.5
    before, after = evaluated(logits, targets), evaluated(logits / temperature, targets)
    assert after['ece'] < 0.3 * before['ece'] and after['top1'] == before['top1']
    assert fit_temperature(averaged.argmax(-1)[:, None] == torch.arange(5), averaged.argmax(-1)) == pytest.approx(0.05)


@torch.inference_mode()
def test_a_model_divides_its_logits_and_keeps_the_temperature(tmp_path):
    torch.manual_seed(0)
    model, images = timm.create_model('resnet32_shike', num_classes=4).eval(), torch.randn(3, 3, 32, 32)
    plain, features = model.forward_experts(images), model.forward_features(images)
    model.set_training_prior(COUNTS, 'uniform')
    model.set_temperature(2.5)
    torch.testing.assert_close(model.forward_experts(images), plain / 2.5)
    torch.testing.assert_close(model(images), plain.mean(1) / 2.5)
    model.set_target_prior('train')
    log_prior = (torch.tensor(COUNTS) / 100).log()
    torch.testing.assert_close(model.forward_experts(images), plain / 2.5 + log_prior)
    assert torch.equal(model.train().forward_expert_head(features), model.classifier(
        model.forward_head(features, pre_logits=True).unflatten(1, (3, -1))))
    model.eval()
    export_model(model, tmp_path / 'model', timm.data.resolve_model_data_config(model), list('abcd'), COUNTS)
    assert json.loads((tmp_path / 'model' / 'config.json').read_text())['model_args']['temperature'] == 2.5
    loaded = timm.create_model(f'local-dir:{tmp_path}/model', pretrained=True).eval()
    assert loaded.temperature == 2.5 and torch.equal(loaded(images), model(images))
    assert timm.create_model(f'local-dir:{tmp_path}/model', pretrained=True, num_classes=3).temperature == 1.
    for wrong in (0, -1., float('nan'), float('inf'), '2'):
        with pytest.raises(ValueError, match='must be a positive number'):
            model.set_temperature(wrong)
    model.set_target_prior(None)
    model.set_temperature(1)
    assert torch.equal(model.forward_experts(images), plain) and 'temperature' not in model._model_args
    model.set_temperature(2)
    model.reset_classifier(4)
    assert model.temperature == 1.


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A calibrated run on 12 validation images, and their folder."""
    import numpy as np
    from PIL import Image

    from shike_timm.cli.train import parse_train_args
    from shike_timm.training.runs import train

    root, rng = tmp_path_factory.mktemp('calibrated'), np.random.default_rng(0)
    for split, counts in (('train', (24, 12, 6)), ('validation', (4, 4, 4))):
        for k, (name, count) in enumerate(zip(('ant', 'bee', 'unknown'), counts)):
            folder = root / 'data' / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(60 * k, 60 * k + 90, (12, 10, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f'{i}.png')
    train(parse_train_args([
        *TINY, '--dataset', '', '--imb-factor', '100', '--data-dir', str(root / 'data'), '--num-classes', '3',
        '--batch-size', '8', '--output', str(root), '--calibrate', '--model-ema',
        '--model-ema-decay', '0.5', '--crt-epochs', '6']))
    return root / 'run', root / 'data' / 'validation'


def test_a_run_keeps_threshold_and_temperature(run, tmp_path):
    folder, images = run
    metrics = json.loads((folder / 'metrics.json').read_text())['stage_two']
    config = json.loads((folder / 'model' / 'config.json').read_text())
    assert config['reject_threshold'] == metrics['reject']['threshold'] > 0
    assert 0.05 <= config['model_args']['temperature'] <= 20 and config['model_args']['temperature'] != 1
    for source in (folder, folder / 'stage_two' / 'last.pth.tar'):
        found = shike_timm.evaluate(model=str(source), data_dir=str(images.parent), device='cpu', workers=0)
        assert {key: found[key] for key in ('loss', 'ece', 'reject')} == {
            key: metrics[key] for key in ('loss', 'ece', 'reject')}
    stage_one = load_trained_model(checkpoint=str(folder / 'stage_one' / 'last.pth.tar'))
    assert stage_one.model.temperature != 1
    export(parse_export_args(['--model', str(folder), '--output', str(tmp_path / 'onnx')]))
    options = dict(reject=True, include_index=True, topk=2, workers=0, device='cpu')
    told = [list(shike_timm.predict(images, model=str(one), **options)) for one in (folder, tmp_path / 'onnx')]
    assert [row['label'] for row in told[0]] == [row['label'] for row in told[1]]
    plain = list(shike_timm.predict(images, model=str(folder), topk=2, workers=0, device='cpu'))
    unknown = [one['prob'][0] < config['reject_threshold'] for one in plain]
    assert sum(unknown) == round(12 * (100 - metrics['reject']['coverage']) / 100)
    for rejected, row, one in zip(unknown, told[0], plain):
        assert row['prob'] == one['prob'] and row['label'][1:] == one['label'][1:]
        assert row['label'][0] == ('(unknown)' if rejected else one['label'][0])  # A class has the plain name.
        assert (row['index'][0] is None) == rejected


def test_thresholds_of_other_experts_and_priors_are_asked_for(run, tiny_run, run_script, tmp_path):
    folder, images = run
    command = ['predict', images, '--model', folder, '--workers', '0', '--device', 'cpu', '--reject']
    for options in (['--experts', '0'], ['--target-prior', 'train']):
        status, out, error = run_script(*command, *options)
        assert status == 2 and not out and '--reject-below' in error and len(error.splitlines()) == 1
        status, out, error = run_script(*command, *options, '--reject-below', '1.1')
        assert status == 0 and out.count('(unknown)') == 12, error
    (tmp_path / 'model').mkdir()
    config = json.loads((tiny_run / 'model' / 'config.json').read_text())
    (tmp_path / 'model' / 'config.json').write_text(json.dumps(dict(config, reject_threshold='0.5')))
    (tmp_path / 'model' / 'model.safetensors').write_bytes((tiny_run / 'model' / 'model.safetensors').read_bytes())
    status, _, error = run_script('predict', images, '--model', tmp_path / 'model')
    assert status == 2 and "'reject_threshold' is '0.5', expected a probability" in error
    assert 'temperature' not in config['model_args']  # Only --calibrate sets one.
    checkpoint = load_checkpoint(tiny_run / 'stage_two' / 'last.pth.tar')
    checkpoint['args'].reject_threshold = 'high'
    with pytest.raises(InputError, match="'reject_threshold' is 'high', expected a probability"):
        from_checkpoint(checkpoint, 'last.pth.tar')


def test_saved_logits_keep_the_threshold(run, tmp_path):
    shike_timm.evaluate(model=str(run[0]), device='cpu', workers=0, save_logits=str(tmp_path / 'a.npz'))
    saved = load_logits(tmp_path / 'a.npz')
    assert saved.reject_threshold == json.loads((run[0] / 'model' / 'config.json').read_text())['reject_threshold']
    page = write_report(tmp_path / 'report', [Analysis(saved)]).read_text()
    reject = json.loads((run[0] / 'metrics.json').read_text())['stage_two']['reject']
    assert f'threshold is a probability of {saved.reject_threshold:g}' in page
    assert f"keeps {reject['coverage']} %" in page
    assert f"of which {reject['accuracy']} % are right" in page
    saved.reject_threshold = None
    save_logits(tmp_path / 'b.npz', saved)
    assert load_logits(tmp_path / 'b.npz').reject_threshold is None
    saved.reject_threshold = 2.
    save_logits(tmp_path / 'c.npz', saved)
    with pytest.raises(InputError, match=r'2\.0, expected a probability'):
        load_logits(tmp_path / 'c.npz')
