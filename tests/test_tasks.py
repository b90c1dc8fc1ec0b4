import copy
from functools import partial

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from timm.task import DistillationTeacher
from torch import nn

from shike_timm.losses import balanced_softmax, expert_cross_entropy, knowledge_distillation, representation_loss
from shike_timm.training.tasks import ClassifierRetrainingTask, ExpertTask

COUNTS = [50, 30, 10, 5, 2]


def make_model():
    torch.manual_seed(0)
    return timm.create_model('resnet32_shike', num_classes=5)


def batch(size=8):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, 3, 8, 8, generator=generator), torch.arange(size) % 5


def test_representation_task():
    task = ExpertTask(make_model(), partial(representation_loss, alpha=0.5, beta=0.25, detach_teacher=True))
    images, target = batch()
    reference = copy.deepcopy(task.get_eval_model()).train()
    result = task.train()(images, target)
    expected = representation_loss(reference.forward_experts(images), target, 0.5, 0.25, detach_teacher=True)
    assert torch.allclose(result['loss'], expected.total)
    assert torch.allclose(result['nt'], expected.nt) and not result['nt'].requires_grad
    assert result['output'].shape == (8, 5)
    result['loss'].backward()
    assert all(parameter.grad is not None for parameter in task.parameters())


@pytest.mark.parametrize('compiled', [False, True])
def test_a_teacher_sees_the_images_as_it_knows_them_and_stays_as_it_is(compiled):
    teacher = timm.create_model('resnet32_shike', num_classes=5)
    teacher.pretrained_cfg = dict(teacher.pretrained_cfg, mean=(0.5, 0.4, 0.3), std=(0.25, 0.5, 0.2))
    before = copy.deepcopy(teacher.state_dict())
    model, (images, target) = make_model(), batch()
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.3, 0.25, 0.5])
    task = ExpertTask(
        model, teacher=DistillationTeacher(teacher), distill_loss_weight=0.5, temperature=2.,
        mean=mean.tolist(), std=std.tolist())
    logits = copy.deepcopy(model).train().forward_experts(images)
    pixels = images * std.view(-1, 1, 1) + mean.view(-1, 1, 1)
    own = (pixels - torch.tensor([0.5, 0.4, 0.3]).view(-1, 1, 1)) / torch.tensor([0.25, 0.5, 0.2]).view(-1, 1, 1)
    expected = knowledge_distillation(logits, teacher.eval()(own), 2.)
    if compiled:
        task.compile(backend='eager')
        assert isinstance(task.teacher.model, torch._dynamo.OptimizedModule)
    result = task.train()(images, target)
    assert torch.allclose(result['kd'], expected, rtol=1e-4) and not result['kd'].requires_grad
    assert torch.allclose(result['loss'], representation_loss(logits, target).total + 0.5 * expected, rtol=1e-4)
    result['loss'].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert task.get_checkpoint_state()['state_dict'].keys() == model.state_dict().keys()


def test_a_teacher_by_name_sees_the_images_as_they_are():
    model, (images, target) = timm.create_model('resnet32_shike'), batch()
    task = ExpertTask(model, teacher=DistillationTeacher('resnet32_shike.paper_cifar100_lt_if100')).train()
    teacher = timm.create_model('resnet32_shike.paper_cifar100_lt_if100', pretrained=True).eval()
    expected = knowledge_distillation(copy.deepcopy(model).train().forward_experts(images), teacher(images))
    assert torch.equal(task(images, target)['kd'], expected.detach())


def test_retraining_freezes_all_but_new_classifiers():
    model = make_model()
    old_weight = model.classifier.weight.detach().clone()
    before = copy.deepcopy(model.state_dict())
    task = ClassifierRetrainingTask(model, COUNTS).train()
    assert not torch.equal(model.classifier.weight, old_weight)
    images, target = batch()
    reference = copy.deepcopy(model)
    loss = task(images, target)['loss']
    assert torch.allclose(loss, balanced_softmax(reference.forward_experts(images), target, torch.tensor(COUNTS)))
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ['classifier.weight']
    torch.optim.SGD(model.get_classifier().parameters(), lr=1.).step()
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    # BatchNorm statistics keep updating.
    assert 'classifier.weight' in changed and 'stem.1.running_mean' in changed
    assert all(name == 'classifier.weight' or 'running_' in name or 'num_batches' in name for name in changed)


def test_retraining_builds_no_graph_below_the_classifiers():
    task = ClassifierRetrainingTask(make_model(), COUNTS).train()
    features = []
    task.get_eval_model().global_pool.register_forward_hook(lambda module, inputs, output: features.append(output))
    task(*batch())
    assert not features[0].requires_grad


@pytest.mark.parametrize('compiled', [False, True])
def test_ema_and_checkpoint_state(compiled):
    task = ExpertTask(make_model())
    assert task.get_eval_model(ema=True) is None and not task.has_ema()
    task.setup_ema(decay=0.5)
    if compiled:
        task.compile(backend='eager')
    assert type(task.get_eval_model()).__name__ == type(task.get_eval_model(ema=True)).__name__ == 'Shike'
    average = task.get_eval_model(ema=True).classifier.weight.clone()
    with torch.no_grad():
        task.get_eval_model().classifier.weight.add_(1.)
    task.update_ema()
    assert torch.allclose(task.get_eval_model(ema=True).classifier.weight, average + 0.5)
    state = {**task.get_checkpoint_state(), **task.get_checkpoint_state(ema=True)}
    assert set(state) == {'state_dict', 'state_dict_ema'}
    assert set(state['state_dict']) == set(state['state_dict_ema']) == set(make_model().state_dict())


def test_clipping_can_leave_out_the_classifiers():
    task = ExpertTask(make_model())
    every = list(task.get_clip_parameters())
    assert len(every) == len(list(task.parameters()))
    assert len(list(task.get_clip_parameters(exclude_head=True))) == len(every) - 1


def frozen_statistics(model):
    """BatchNorm in eval mode, so that gradients do not depend on how a batch is split."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train(False)


def gradients(task):
    return {name: p.grad.clone() for name, p in task.get_eval_model().named_parameters() if p.grad is not None}


def worker(rank, port, path):
    dist.init_process_group('gloo', init_method=f'tcp://127.0.0.1:{port}', rank=rank, world_size=2)
    torch.set_num_threads(1)
    results = {}
    for name in ('one', 'two'):
        model = make_model()
        torch.manual_seed(2)
        task = ExpertTask(model) if name == 'one' else ClassifierRetrainingTask(model, COUNTS)
        task.prepare_distributed()
        frozen_statistics(task.trainable_module)
        images, target = batch()
        task(images[rank::2], target[rank::2])['loss'].backward()
        results[name] = gradients(task)
    if rank == 0:
        torch.save(results, path)
    dist.destroy_process_group()


def test_distributed_gradients_are_those_of_the_whole_batch(tmp_path, unused_port):
    mp.spawn(worker, args=(unused_port, str(tmp_path / 'gradients.pt')), nprocs=2)
    results = torch.load(tmp_path / 'gradients.pt', weights_only=True)
    for name in ('one', 'two'):
        model = make_model()
        torch.manual_seed(2)
        task = ExpertTask(model) if name == 'one' else ClassifierRetrainingTask(model, COUNTS)
        frozen_statistics(task.trainable_module)
        task(*batch())['loss'].backward()
        expected = gradients(task)
        assert set(results[name]) == set(expected)
        for key, gradient in expected.items():
            assert torch.allclose(results[name][key], gradient, rtol=1e-3, atol=1e-5), key


def test_mean_of_the_gradients_that_experts_send_into_the_trunk():
    model = make_model()
    images, target = batch()
    gradients = []
    for trunk_grad in ('sum', 'mean'):
        copied = copy.deepcopy(model)
        ExpertTask(copied, expert_cross_entropy, trunk_grad=trunk_grad)(images, target)['loss'].backward()
        gradients.append({name: parameter.grad for name, parameter in copied.named_parameters()})
    for name, summed in gradients[0].items():
        share = 3 if name.startswith(('stem', 'stages')) else 1
        torch.testing.assert_close(gradients[1][name] * share, summed, rtol=1e-4, atol=1e-7)


def test_stages_that_no_expert_reads_are_neither_run_nor_trained():
    """DistributedDataParallel wants gradients of all trained parameters, and compiled hooks want a gradient."""
    model = timm.create_model(
        'shike', backbone='test_efficientnet', private_stages=0, depths=[[1, 2], [2, 3]], num_experts=2, num_classes=5)
    model.stages[-1].register_forward_pre_hook(lambda *_: pytest.fail('A stage that is not read was run.'))
    task = ExpertTask(model, expert_cross_entropy, trunk_grad='mean')
    task.compile(backend='aot_eager')
    task(torch.randn(4, 3, 32, 32), torch.arange(4))['loss'].backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in model.stages[-1].parameters())
