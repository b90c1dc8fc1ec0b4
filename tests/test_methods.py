"""Methods: the stages they plan, and the losses their tasks compute."""

import pytest
import timm
import torch
from timm.loss import compute_class_weights

from shike_timm.cli.train import parse_train_args
from shike_timm.errors import InputError
from shike_timm.losses import (
    balanced_softmax,
    expert_cross_entropy,
    focal,
    ldam,
    logit_adjusted,
    representation_loss,
)
from shike_timm.training.methods import METHODS, create_task
from shike_timm.training.phases import plan_phases

COUNTS = [50, 30, 10, 5, 2]
N = torch.tensor(COUNTS)
WEIGHTS = compute_class_weights(COUNTS, sum(COUNTS), 'effective_num', beta=0.9999)[1]
EXPECTED = {
    'shike': lambda z, y: representation_loss(z, y, 0.1, 0.01).total,
    'ce': expert_cross_entropy,
    'balanced_softmax': lambda z, y: balanced_softmax(z, y, N),
    'logit_adjusted': lambda z, y: logit_adjusted(z, y, N, tau=1.5),
    'focal': lambda z, y: focal(z, y, gamma=3.),
    'ldam_drw': lambda z, y: ldam(z, y, N),
}


def plan(*options):
    return plan_phases(parse_train_args(['--tau', '1.5', '--focal-gamma', '3', *options]))


def make_task(method, classifier='cosine'):
    torch.manual_seed(0)
    model = timm.create_model('resnet32_shike', num_classes=5, classifier=classifier)
    config = parse_train_args(['--method', method, '--tau', '1.5', '--focal-gamma', '3'])
    return create_task(config, model, COUNTS, torch.device('cpu'))


@pytest.mark.parametrize('method', METHODS)
def test_a_method_trains_with_its_loss(method):
    task = make_task(method).eval()
    images, target = torch.randn(8, 3, 16, 16), torch.arange(8) % 5
    logits = task.get_eval_model().forward_experts(images)
    assert torch.allclose(task(images, target)['loss'], EXPECTED[method](logits, target))
    task.progress = 0.8
    late = ldam(logits, target, N, class_weights=WEIGHTS) if method == 'ldam_drw' else EXPECTED[method](logits, target)
    assert torch.allclose(task(images, target)['loss'], late)


def test_phases():
    first, second = plan('--epochs', '30', '--lr', '0.2', '--crt-lr', '0.3', '--crt-warmup-epochs', '2')
    assert (first.name, first.epochs, first.lr, first.first_row) == ('stage_one', 30, 0.2, 0)
    assert (second.name, second.epochs, second.lr, second.warmup_epochs) == ('stage_two', 20, 0.3, 2)
    assert second.first_row == 30
    assert len(plan('--method', 'ce')) == 1 and len(plan('--crt-epochs', '0')) == 1
    assert [phase.epochs for phase in plan('--method', 'focal', '--epochs', '9', '--crt-epochs', '7')] == [9, 7]


@pytest.mark.parametrize('options, message', [
    (['--method', 'balanced'], "'balanced' is unknown: choose one of .*balanced_softmax"),
    (['--method', 'balanced-softmax'], "unknown, the nearest valid one is 'balanced_softmax'"),
    (['--epochs', '5'], '--warmup-epochs 5 .*--epochs 5'),
    (['--crt-epochs', '2', '--crt-warmup-epochs', '3'], '--crt-warmup-epochs 3 '),
])
def test_bad_plans(options, message):
    with pytest.raises(InputError, match=message):
        plan(*options)


def test_margins_need_cosines():
    with pytest.raises(InputError, match='cosine'):
        make_task('ldam_drw', 'linear')
