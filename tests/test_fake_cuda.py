"""Runs on fake CUDA tensors, which need no GPU: a CPU tensor among them, or a wait for the device, is an error.

What does not run so: the backward (autograd wants a device), the kernel of fused SGD, compiled code and CUDA graphs,
metrics from sums that are on the host, what worker processes pin, NCCL. On a GPU benchmarks/gpu.sh runs all but the
last.
"""
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import TINY
from torch import nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, is_fake, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from shike_timm.checkpoints import load_checkpoint, load_weights
from shike_timm.cli.train import parse_train_args
from shike_timm.metrics import ExpertEvaluator, evaluate
from shike_timm.training import runs
from shike_timm.training.phases import plan_phases

CUDA = torch.device('cuda', 0)


class FakeCuda(TorchDispatchMode):
    """Tensors on CUDA are fake and those of the host real; what goes from there to here is refused."""

    def __init__(self, mode):
        super().__init__()
        self.mode = mode

    def _fake(self, leaf):
        return self.mode.from_tensor(leaf) if isinstance(leaf, torch.Tensor) and not is_fake(leaf) else leaf

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        fake = any(is_fake(leaf) for leaf in leaves)
        if not fake and not any(isinstance(leaf, torch.device) and leaf.type == 'cuda' for leaf in leaves):
            with unset_fake_temporarily():
                return function(*args, **kwargs)
        args, kwargs = tree_map(self._fake, (args, kwargs))
        result = function(*args, **kwargs)
        home = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor) and leaf.device.type == 'cpu']
        assert not home, f'{function} waits for the device'
        return result


def apply(self, function, recurse=True):
    """What `nn.Module._apply` does, which cannot put a fake tensor in the place of a real one."""
    for child in self.children():
        child._apply(function)
    for name, parameter in self._parameters.items():
        if parameter is not None:
            self._parameters[name] = nn.Parameter(function(parameter.detach()), parameter.requires_grad)
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = function(buffer)
    return self


def fused_sgd(*tensors, **options):
    """In place of the one kernel that takes no fake tensors."""
    assert all(tensor.device == CUDA for tensor in tree_leaves((tensors, options)) if isinstance(tensor, torch.Tensor))


@pytest.fixture
def fake_cuda(monkeypatch):
    """As if there were a GPU, in the test."""
    monkeypatch.setattr(torch.cuda.amp.common, 'amp_definitely_not_available', lambda: False)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: True)
    monkeypatch.setattr(nn.Module, '_apply', apply)
    host_generator = torch.Generator
    monkeypatch.setattr(torch, 'Generator', lambda device=None: host_generator())  # timm's average makes one of its own
    monkeypatch.setattr(torch, '_fused_sgd_', fused_sgd)
    monkeypatch.setattr(FakeTensorMode, '__deepcopy__', lambda self, memo: self, raising=False)  # by its tensors
    with FakeTensorMode() as mode, FakeCuda(mode):
        yield


@pytest.mark.parametrize('options', [
    ['--amp', '--channels-last', '--model-ema', '--aa', 'cifar10', '--cutout', '2', '--clip-grad', '1'],
    pytest.param(['--amp', '--amp-dtype', 'bfloat16', '--no-aug', '--vflip', '0.5'], marks=pytest.mark.slow),
    pytest.param(['--opt', 'adamw', '--detach-teacher'], marks=pytest.mark.slow),
    pytest.param(['--method', 'ldam_drw', '--crt-epochs', '1'], marks=pytest.mark.slow),
], ids=['float16', 'bfloat16', 'float32', 'margins'])
def test_both_stages(tiny_run, fake_cuda, monkeypatch, options):
    args = parse_train_args([*TINY, '--device', 'cuda', *options])
    if args.model_ema:
        args = replace(args, kd_model_name=f'local-dir:{tiny_run}/model')
    phases = plan_phases(args)
    checkpoint = load_checkpoint(tiny_run / 'stage_one' / 'last.pth.tar')
    trainer = runs.prepare(args, phases, CUDA)
    load_weights(trainer.model, checkpoint['state_dict'], '')
    for phase in phases:
        trainer.start(phase)
        if phase.number == 1 and args.opt == 'momentum':
            trainer.optimizer.load_state_dict(checkpoint['optimizer'])

        def backward(loss, task=trainer.task, **kwargs):
            assert loss.device == CUDA and loss.dtype == torch.float32 and loss.requires_grad
            for parameter in task.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None

        monkeypatch.setattr(torch.Tensor, 'backward', backward)
        assert (trainer.loss_scaler is not None) == (trainer.autocast == torch.float16)
        trainer.task.train()
        trainer.train_loader.sampler.set_epoch(3, 0, 2)
        steps = 0
        for images, target in trainer.train_loader:
            assert images.device == target.device == CUDA
            result = trainer.step(images, target)
            assert all(value.device == CUDA for value in result.values())
            steps += 1
        assert steps == 2
    assert all(parameter.device == CUDA for parameter in trainer.model.parameters())


def test_evaluation(fake_cuda, monkeypatch):
    args = parse_train_args([*TINY, '--device', 'cuda'])
    sums = []
    monkeypatch.setattr(ExpertEvaluator, 'compute', lambda self, distributed: sums.append(self) or {})
    trainer = runs.prepare(args, plan_phases(args), CUDA)
    evaluate(
        trainer.model, trainer.eval_loader, trainer.data.shot_counts, CUDA, subsets=[(0,), (0, 1)], flip=True)
    assert sums[0].top1.device == sums[0].loss_sum.device == CUDA and sums[0].top1.shape == (10, 6)


def test_what_is_refused(fake_cuda):
    images = torch.ones(2, device=CUDA)
    for mistake, error, message in (
            (images.cpu, AssertionError, 'waits for the device'),
            (partial(torch.add, images, torch.ones(2)), RuntimeError, 'to be on the same device'),
            (images.sum().item, DataDependentOutputException, 'local_scalar'),
            (images.tolist, DataDependentOutputException, 'local_scalar')):
        with pytest.raises(error, match=message):
            mistake()
