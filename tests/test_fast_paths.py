"""The fast ways to train against the plain ones: the same logits, the same gradients."""
import copy
import importlib
import platform
from functools import partial

import pytest
import torch
from conftest import ROOT, TINY
from timm.optim import Lookahead

from shike_timm.cli.train import parse_train_args
from shike_timm.devices import keep_freed_memory
from shike_timm.errors import InputError
from shike_timm.losses import balanced_softmax, representation_loss
from shike_timm.models.backbones import cifar_resnet
from shike_timm.models.shike import Shike
from shike_timm.training.config import StepConfig
from shike_timm.training.optimizer import create_optimizer
from shike_timm.training.runs import train
from shike_timm.training.step import train_step
from shike_timm.training.tasks import ClassifierRetrainingTask, ExpertTask

CLASSES = 20


def small_model():
    torch.manual_seed(0)
    return Shike(partial(cifar_resnet, 1), num_classes=CLASSES, aligner='conv')


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(32, 3, 16, 16, generator=generator), torch.randint(CLASSES, (32,), generator=generator)


def logits_and_gradients(channels_last=False, compiled=False):
    model = small_model()
    task = ExpertTask(model)
    images, target = batch()
    if channels_last:
        task.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    if compiled:
        task.compile()
    logits = task.trainable_module(images)
    representation_loss(logits, target).total.backward()
    return logits.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def relative_difference(found, expected):
    return torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected)


@pytest.mark.parametrize('fast', [
    dict(channels_last=True), pytest.param(dict(channels_last=True, compiled=True), marks=pytest.mark.slow)])
def test_logits_and_gradients_equal_the_plain_ones(fast):
    logits, gradients = logits_and_gradients()
    fast_logits, fast_gradients = logits_and_gradients(**fast)
    assert relative_difference(fast_logits, logits) <= 1e-5
    assert fast_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert relative_difference(fast_gradients[name], gradient) <= 1e-5, name


def test_bfloat16_gradients_point_the_same_way():
    _, gradients = logits_and_gradients(channels_last=True)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        logits, rough = logits_and_gradients(channels_last=True)
    assert logits.dtype == torch.float32
    plain, rough = (torch.cat([g.flatten() for g in side.values()]) for side in (gradients, rough))
    assert torch.cosine_similarity(plain, rough, dim=0) > 0.99


def optimizer_of(model, *options):
    args = parse_train_args(['--lr', '0.05', '--opt-kwargs', 'filter_bias_and_bn=False', *options])
    return create_optimizer(args, args.lr, model)


def test_fused_optimizer_takes_the_same_steps():
    weights = []
    for options in ([], ['fused=False']):
        model = small_model()
        task = ExpertTask(model)
        optimizer = optimizer_of(model, *options)
        assert bool(optimizer.defaults['fused']) != bool(options)
        for seed in range(3):
            train_step(task, *batch(seed), optimizer, StepConfig(channels_last=True))
        weights.append(model.state_dict())
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_a_first_step_that_loss_scaling_skips_leaves_no_trace():
    model = small_model()
    optimizer = optimizer_of(model)
    before = copy.deepcopy(model.state_dict())
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float('inf'))
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.), torch.tensor(1.)
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(not state['momentum_buffer'].any() for state in optimizer.state.values())


@pytest.mark.parametrize('opt', ['lookahead_momentum', 'lamb', 'adamw'])
def test_other_optimizers_can_be_made(opt):
    model = small_model()
    train_step(ExpertTask(model), *batch(), optimizer_of(model, '--opt', opt), StepConfig())


def test_lookahead_is_brought_together_after_each_epoch(tmp_path, monkeypatch):
    together, moved, sync = [], [], Lookahead.sync_lookahead

    def check(self):
        before = [parameter.detach().clone() for group in self.param_groups for parameter in group['params']]
        sync(self)
        after = [(parameter, self._base_optimizer.state[parameter]['lookahead_slow_buff'])
                 for group in self.param_groups for parameter in group['params']]
        together.append(all(torch.equal(parameter, slow) for parameter, slow in after))
        moved.append(any(not torch.equal(parameter, old) for (parameter, _), old in zip(after, before)))

    monkeypatch.setattr(Lookahead, 'sync_lookahead', check)
    train(parse_train_args([
        *TINY, '--opt', 'lookahead_momentum', '--batch-size', '80', '--crt-epochs', '0', '--output', str(tmp_path)]))
    assert together == [True, True] and moved[1]


def test_an_optimizer_that_needs_second_derivatives_is_refused():
    with pytest.raises(InputError, match="'adahessian' needs second derivatives"):
        optimizer_of(small_model(), '--opt', 'adahessian')


def test_stage_two_keeps_nothing_of_the_trunk_for_backward():
    task = ClassifierRetrainingTask(small_model(), [5] * CLASSES)
    kept = []

    def pack(tensor):
        kept.append(tensor.shape)
        return tensor

    images, target = batch()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = task(images, target)['loss']
    loss.backward()
    assert kept and all(len(shape) < 4 for shape in kept)  # no feature map among them
    trained = [name for name, parameter in task.named_parameters() if parameter.grad is not None]
    assert trained == ['trainable_module.model.classifier.weight']


def test_a_step_reads_no_value_on_the_host(monkeypatch):
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    task = ExpertTask(model)

    def refuse(*_, **__):
        raise AssertionError('a value was read on the host')

    for name in ('item', '__float__', '__int__', '__bool__', 'tolist', 'cpu', 'numpy'):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    train_step(task, *batch(), optimizer, StepConfig())


def test_freed_memory_is_kept_where_the_library_is_glibc():
    assert keep_freed_memory() == (platform.libc_ver()[0] == 'glibc')


def test_the_baseline_has_the_same_losses(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / 'benchmarks')
    baseline = importlib.import_module('baseline')
    torch.manual_seed(0)
    target, counts = torch.randint(CLASSES, (16,)), torch.arange(1., CLASSES + 1)
    logits = (3 * torch.randn(16, 3, CLASSES)).requires_grad_()
    per_expert = list(logits.unbind(1))
    for ours, plain in (
            (representation_loss(logits, target).total, baseline.stage_one_loss(per_expert, target)),
            (balanced_softmax(logits, target, counts), baseline.stage_two_loss(per_expert, target, counts))):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=0)
        gradient, plain_gradient = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (ours, plain))
        torch.testing.assert_close(gradient, plain_gradient, rtol=1e-5, atol=1e-7)
