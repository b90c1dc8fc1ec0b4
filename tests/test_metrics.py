import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import precision_recall_fscore_support
from torch import nn
from torchmetrics.functional.classification import binary_calibration_error

from shike_timm.cli.eval import parse_eval_args
from shike_timm.metrics import ExpertEvaluator, balanced_over, evaluate, format_classes, format_table, shot_divisions
from shike_timm.report.evaluate import evaluate_model


def test_shot_divisions_at_the_borders():
    divisions = shot_divisions([101, 100, 20, 19])
    assert divisions['many'].tolist() == [True, False, False, False]
    assert divisions['medium'].tolist() == [False, True, True, False]
    assert divisions['few'].tolist() == [False, False, False, True]


def test_metrics_counted_by_hand():
    # A many-, a medium- and a few-shot class. The first output is always right, the second says class 0.
    target = torch.tensor([0, 0, 0, 1, 2, 2])
    right = 10. * nn.functional.one_hot(target, 3)
    zeros = 10. * nn.functional.one_hot(torch.zeros_like(target), 3)
    evaluator = ExpertEvaluator(2, [0, 1, 2])
    logits = torch.stack([right, zeros], dim=1)
    evaluator.update(logits[:4], target[:4])
    evaluator.update(logits[4:], target[4:])
    metrics = evaluator.compute()
    assert metrics['per_class']['total'] == [3, 1, 2]
    assert metrics['per_class']['experts'] == [[100., 100., 100.], [100., 0., 0.]]
    first, second = metrics['experts']
    sure = 1 / (1 + 2 * math.exp(-10))
    assert first == dict(
        loss=round(-math.log(sure), 4), top1=100., top5=100., balanced=100., many=100., medium=100., few=100.,
        macro_f1=100., ece=round(100 * (1 - sure), 2))
    assert second == dict(
        loss=round(5 - math.log(sure), 4), top1=50., top5=100., balanced=33.33, many=100., medium=0., few=0.,
        macro_f1=22.22, ece=round(100 * (sure - 0.5), 2))


def test_calibration_error_counted_by_hand():
    """Of four answers at 60 percent two are right, of two at 90 percent both."""
    confidence = torch.tensor([0.6] * 4 + [0.9] * 2)
    correct = torch.tensor([1, 0, 1, 0, 1, 1])
    logits = torch.stack([confidence.log(), (1 - confidence).log()], dim=1)[:, None]
    evaluator = ExpertEvaluator(1, [2, 2])
    for part in (slice(0, 3), slice(3, 6)):
        evaluator.update(logits[part], 1 - correct[part])
    assert evaluator.compute()['ece'] == round(100 * (4 * 0.1 + 2 * 0.1) / 6, 2)


def random_batch(num_images=2000, num_experts=2, num_classes=7):
    """Logits from wild guesses to certainties. Some certainties are wrong."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(num_classes - 1, (num_images,), generator=generator)  # no image is of the last class
    logits = torch.randn(num_images, num_experts, num_classes, generator=generator)
    logits[torch.arange(num_images), :, target] += 1
    return logits * torch.logspace(-1, 2, num_images)[:, None, None], target


def test_calibration_error_is_that_of_torchmetrics():
    logits, target = random_batch()
    evaluator = ExpertEvaluator(2, [2] * 7)
    for part in zip(logits.split(300), target.split(300)):
        evaluator.update(*part)
    errors = evaluator.overconfidence.abs().sum(0) / len(target)
    for error, output in zip(errors, [logits.mean(1), *logits.unbind(1)]):
        confidence, answer = output.softmax(-1).max(-1)
        assert (confidence == 1).any() and (answer[confidence == 1] != target[confidence == 1]).any()
        assert float(error) == pytest.approx(
            float(binary_calibration_error(confidence, answer == target, n_bins=15)), abs=1e-6)


def test_sums_add_up_over_processes(monkeypatch):
    """Two processes count what one process counts."""
    logits, target = random_batch()
    whole, first, second = (ExpertEvaluator(2, [0, 0, 1, 1, 2, 2, 2], subsets=[[1]]) for _ in range(3))
    for part in zip(logits.split(300), target.split(300)):
        whole.update(*part)
    first.update(logits[:1200], target[:1200])
    for part in zip(logits[1200:].split(500), target[1200:].split(500)):
        second.update(*part)
    sums = []
    monkeypatch.setattr(torch.distributed, 'all_reduce', lambda one: sums.append(one.clone()))
    second.compute(distributed=True)
    monkeypatch.setattr(torch.distributed, 'all_reduce', lambda one: one.add_(sums.pop(0)))
    alone = first.compute()
    assert first.compute(distributed=True) == whole.compute() != alone and not sums
    assert first.compute() == alone  # the local sums do not change
    assert whole.compute()['per_class']['total'] == torch.bincount(target, minlength=7).tolist()
    assert whole.compute()['per_class']['top1'][-1] is None
    assert whole.compute()['subsets'] == [dict(whole.compute()['experts'][1], experts=[1])]


def test_results_of_each_class_are_written(tiny_run, tmp_path):
    args = parse_eval_args([
        '--checkpoint', str(tiny_run / 'stage_two' / 'last.pth.tar'), '--dataset', 'digits_lt', '--workers', '0',
        '--device', 'cpu', '--results-file', str(tmp_path / 'results.json')])
    before = replace(args)
    metrics = evaluate_model(args)
    assert args == before and json.loads((tmp_path / 'results.json').read_text()) == metrics
    per_class = metrics.pop('per_class')
    assert metrics.items() <= json.loads((tiny_run / 'metrics.json').read_text())['stage_two'].items()
    config = json.loads((tiny_run / 'model' / 'config.json').read_text())
    assert per_class['names'] == config['label_names'] and per_class['class_counts'] == config['class_counts']
    for one, shares in zip((metrics, *metrics['experts']), (per_class['top1'], *per_class['experts'])):
        right = sum(share * total for share, total in zip(shares, per_class['total']))
        assert right / sum(per_class['total']) == pytest.approx(one['top1'], abs=0.01)
        assert sum(shares) / len(shares) == pytest.approx(one['balanced'], abs=0.01)


def test_divisions_average_over_classes():
    target = torch.tensor([0, 0, 0, 1])
    logits = nn.functional.one_hot(torch.tensor([0, 0, 1, 1]), 2)[:, None].float()
    evaluator = ExpertEvaluator(1, [0, 0])
    evaluator.update(logits, target)
    metrics = evaluator.compute()
    assert metrics['top1'] == 75. and metrics['many'] == round((200 / 3 + 100) / 2, 2)
    assert metrics['balanced'] == metrics['many'] and metrics['medium'] is None and metrics['few'] is None


def test_logits_that_are_no_numbers_are_an_error():
    evaluator = ExpertEvaluator(1, [2, 2])
    evaluator.update(torch.tensor([[[1., 0.]], [[float('nan'), 0.]]]), torch.tensor([0, 0]))
    with pytest.raises(ValueError, match='logits that are not finite'):
        evaluator.compute()


def test_top5_counts_the_five_largest():
    logits = torch.arange(10.).flip(0)[None, None].repeat(2, 1, 1)
    evaluator = ExpertEvaluator(1, [2] * 10)
    evaluator.update(logits, torch.tensor([4, 5]))
    assert evaluator.compute()['top5'] == 50.


class FixedExperts(nn.Module):
    num_experts = 2

    def __init__(self):
        super().__init__()
        self.modes = []

    def forward_experts(self, x):
        self.modes.append(self.training)
        return torch.stack([x[:, :3, 0, 0], x[:, :3, 0, 1]], dim=1)


def test_evaluate_gives_the_ensemble_and_the_experts():
    generator = torch.Generator().manual_seed(0)
    images, target = torch.randn(20, 3, 2, 2, generator=generator), torch.arange(20) % 3
    model = FixedExperts().train()
    result = evaluate(model, zip(images.split(8), target.split(8)), [200, 50, 5], torch.device('cpu'))
    assert model.training and not any(model.modes)
    outputs = [images[:, :, 0, 0], images[:, :, 0, 1]]
    averaged = sum(outputs) / 2
    assert result['top1'] == round(100 * float((averaged.argmax(1) == target).float().mean()), 2)
    assert result['loss'] == pytest.approx(float(nn.functional.cross_entropy(averaged, target)), abs=1e-4)
    for expert, output in zip(result['experts'], outputs):
        assert expert['top1'] == round(100 * float((output.argmax(1) == target).float().mean()), 2)


def test_flips_are_averaged():
    images, target = torch.randn(9, 3, 2, 2, generator=torch.Generator().manual_seed(0)), torch.arange(9) % 3
    result = evaluate(FixedExperts(), [(images, target)], [5, 5, 5], torch.device('cpu'), flip=True)
    averaged = images[:, :, 0].mean(-1)
    expected = round(float(nn.functional.cross_entropy(averaged, target)), 4)
    assert result['loss'] == result['experts'][0]['loss'] == result['experts'][1]['loss'] == pytest.approx(expected)


def test_precision_and_f1_are_those_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    logits, target = torch.randn(300, 2, 40, generator=generator), torch.randint(39, (300,), generator=generator)
    logits[torch.arange(300), :, target] += 1.5
    evaluator = ExpertEvaluator(2, [0] * 40)
    evaluator.update(logits, target)
    result = evaluator.compute()
    said = logits.mean(1).argmax(1)
    precision, _, f1, total = precision_recall_fscore_support(target, said, labels=range(40), zero_division=0)
    found = result['per_class']
    assert [one or 0 for one in found['precision']] == pytest.approx(100 * precision, abs=0.006)
    assert [one or 0 for one in found['f1']] == pytest.approx(100 * f1, abs=0.006)
    assert found['f1'][39] is None and result['macro_f1'] == pytest.approx(100 * f1[:39].mean(), abs=0.006)
    names = [f'class {c}' for c in range(40)]
    table = format_classes(found, names, [40 - c for c in range(40)]).splitlines()
    assert len(table) == 11 and table[1].split()[1] == str(np.argmin(np.where(total, f1, 2)))
    few = {key: value[:3] for key, value in found.items()}
    assert [line.split()[1] for line in format_classes(few, names[:3], [1, 9, 5]).splitlines()[1:]] == ['1', '2', '0']
    assert 'many' not in format_table({'': result}).splitlines()[0]
    result['many'], result['few'] = None, 1.
    assert 'All of them are few-shot' in balanced_over(result, 40)


def test_table():
    metrics = dict(loss=1., top1=50., top5=80., balanced=49., many=60., medium=None, few=1.25, macro_f1=44., ece=7.5)
    table = format_table({'stage_one': dict(metrics, experts=[metrics, metrics])})
    lines = table.splitlines()
    assert lines[0].split() == ['loss', 'top1', 'top5', 'balanced', 'macro_f1', 'many', 'few', 'ece']
    assert [line.split()[:2] for line in lines[1:]] == [
        ['stage_one', 'expert'], ['stage_one', 'expert'], ['stage_one', 'ensemble']]
    assert lines[-1].split()[2:] == ['1.00', '50.00', '80.00', '49.00', '44.00', '60.00', '1.25', '7.50']
