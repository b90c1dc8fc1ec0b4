import math

import pytest
import torch
from torch import nn

from shike_timm.metrics import ExpertEvaluator, evaluate, format_table, shot_divisions


def test_shot_divisions_at_the_borders():
    divisions = shot_divisions([101, 100, 20, 19])
    assert divisions['many'].tolist() == [True, False, False, False]
    assert divisions['medium'].tolist() == [False, True, True, False]
    assert divisions['few'].tolist() == [False, False, False, True]


def test_metrics_counted_by_hand():
    # Three classes with 200, 50 and 5 training images; the first output is always right, the second says class 0.
    target = torch.tensor([0, 0, 0, 1, 2, 2])
    right = 10. * nn.functional.one_hot(target, 3)
    zeros = 10. * nn.functional.one_hot(torch.zeros_like(target), 3)
    evaluator = ExpertEvaluator(2, [200, 50, 5])
    logits = torch.stack([right, zeros], dim=1)
    evaluator.update(logits[:4], target[:4])
    evaluator.update(logits[4:], target[4:])
    first, second = evaluator.compute()['experts']
    sure = 1 / (1 + 2 * math.exp(-10))
    assert first == dict(
        loss=round(-math.log(sure), 4), top1=100., top5=100., balanced=100., many=100., medium=100., few=100.,
        ece=round(100 * (1 - sure), 2))
    assert second == dict(
        loss=round(5 - math.log(sure), 4), top1=50., top5=100., balanced=33.33, many=100., medium=0., few=0.,
        ece=round(100 * (sure - 0.5), 2))


def test_calibration_error_counted_by_hand():
    """Of four answers at 60 percent two are right, of two at 90 percent both."""
    confidence = torch.tensor([0.6] * 4 + [0.9] * 2)
    correct = torch.tensor([1, 0, 1, 0, 1, 1])
    logits = torch.stack([confidence.log(), (1 - confidence).log()], dim=1)[:, None]
    evaluator = ExpertEvaluator(1, [5, 5])
    for part in (slice(0, 3), slice(3, 6)):
        evaluator.update(logits[part], 1 - correct[part])
    assert evaluator.compute()['ece'] == round(100 * (4 * 0.1 + 2 * 0.1) / 6, 2)


def test_divisions_average_over_classes():
    target = torch.tensor([0, 0, 0, 1])
    logits = nn.functional.one_hot(torch.tensor([0, 0, 1, 1]), 2)[:, None].float()
    evaluator = ExpertEvaluator(1, [300, 200])
    evaluator.update(logits, target)
    metrics = evaluator.compute()
    assert metrics['top1'] == 75. and metrics['many'] == round((200 / 3 + 100) / 2, 2)
    assert metrics['balanced'] == metrics['many'] and metrics['medium'] is None and metrics['few'] is None


def test_top5_counts_the_five_largest():
    logits = torch.arange(10.).flip(0)[None, None].repeat(2, 1, 1)
    evaluator = ExpertEvaluator(1, [1] * 10)
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


def test_table():
    metrics = dict(loss=1., top1=50., top5=80., balanced=49., many=60., medium=None, few=1.25, ece=7.5)
    table = format_table({'stage_one': dict(metrics, experts=[metrics, metrics])})
    lines = table.splitlines()
    assert lines[0].split() == ['loss', 'top1', 'top5', 'balanced', 'many', 'medium', 'few', 'ece']
    assert [line.split()[:2] for line in lines[1:]] == [
        ['stage_one', 'expert'], ['stage_one', 'expert'], ['stage_one', 'ensemble']]
    assert lines[-1].split()[2:] == ['1.00', '50.00', '80.00', '49.00', '60.00', '-', '1.25', '7.50']
