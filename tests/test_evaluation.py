import math

import pytest
import torch
from torch import nn

from shike_timm.evaluation import ExpertEvaluator, evaluate, format_table, shot_divisions


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
    first, second = evaluator.compute()
    assert first == dict(
        loss=round(math.log(1 + 2 * math.exp(-10)), 4), top1=100., top5=100., many=100., medium=100., few=100.)
    assert second == dict(
        loss=round(math.log(1 + 2 * math.exp(-10)) + 5, 4), top1=50., top5=100., many=100., medium=0., few=0.)


def test_divisions_average_over_classes():
    target = torch.tensor([0, 0, 0, 1])
    logits = nn.functional.one_hot(torch.tensor([0, 0, 1, 1]), 2)[:, None].float()
    evaluator = ExpertEvaluator(1, [300, 200])
    evaluator.update(logits, target)
    metrics, = evaluator.compute()
    assert metrics['top1'] == 75. and metrics['many'] == round((200 / 3 + 100) / 2, 2)
    assert metrics['medium'] is None and metrics['few'] is None


def test_top5_counts_the_five_largest():
    logits = torch.arange(10.).flip(0)[None, None].repeat(2, 1, 1)
    evaluator = ExpertEvaluator(1, [1] * 10)
    evaluator.update(logits, torch.tensor([4, 5]))
    assert evaluator.compute()[0]['top5'] == 50.


class FixedExperts(nn.Module):
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


def test_table():
    metrics = dict(loss=1., top1=50., top5=80., many=60., medium=None, few=1.25)
    table = format_table({'stage_one': dict(metrics, experts=[metrics, metrics])})
    lines = table.splitlines()
    assert lines[0].split() == ['loss', 'top1', 'top5', 'many', 'medium', 'few']
    assert [line.split()[:2] for line in lines[1:]] == [
        ['stage_one', 'expert'], ['stage_one', 'expert'], ['stage_one', 'ensemble']]
    assert lines[-1].split()[2:] == ['1.00', '50.00', '80.00', '60.00', '-', '1.25']
