"""Checkpoints of the authors' CIFAR code and their losses, against a network built from its description."""
import importlib.util
import itertools
import json
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch import nn

from shike_timm.errors import InputError
from shike_timm.pretrained.load import load_trained_model
from shike_timm.training.tasks import ClassifierRetrainingTask, ExpertTask

TOOL = 'tools/convert_authors.py'
spec = importlib.util.spec_from_file_location('convert_authors', ROOT / TOOL)
converting = importlib.util.module_from_spec(spec)
spec.loader.exec_module(converting)

SETS = ('rt_classifiers', 'classifiers')


def conv_norm(in_chs, out_chs, size, stride):
    return nn.Conv2d(in_chs, out_chs, size, stride, size // 2, bias=False), nn.BatchNorm2d(out_chs)


class Block(nn.Module):
    def __init__(self, in_chs, out_chs):
        super().__init__()
        stride = out_chs // in_chs
        self.conv1, self.bn1 = conv_norm(in_chs, out_chs, 3, stride)
        self.conv2, self.bn2 = conv_norm(out_chs, out_chs, 3, 1)
        self.shortcut = nn.Sequential(*(conv_norm(in_chs, out_chs, 1, stride) if stride > 1 else ()))

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


def layer(in_chs, out_chs):
    return nn.Sequential(Block(in_chs, out_chs), *(Block(out_chs, out_chs) for _ in range(4)))


class Authors(nn.Module):
    """Their network from its description, with the names and shapes of their checkpoints and random values."""

    def __init__(self, num_classes=100, num_experts=3, first_link=0):
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1 = conv_norm(3, 16, 3, 1)
        self.layer1, self.layer2 = layer(16, 16), layer(16, 32)
        self.layer3s, self.shallow_exps = nn.ModuleList(), nn.ModuleList()
        for m in range(num_experts):
            self.layer3s.append(layer(32, 64))
            self.shallow_exps.append(nn.ModuleDict(dict(convs=nn.ModuleDict({
                f'StridedConv{k + first_link}': nn.ModuleDict(dict(conv=nn.Sequential(
                    *conv_norm(width, 2 * width, 3, 2), *([] if k == 1 else [nn.ReLU()])))) for k, width in enumerate(
                        ((16, 32), (32,))[m % 2])}))))
        for name in SETS[::-1]:
            heads = [nn.Linear(num_classes, 64, bias=False) for _ in range(num_experts)]  # only for its [64, C] weight
            setattr(self, name, nn.ModuleList(heads))
        for value in self.state_dict().values():
            if value.ndim == 1:
                value.add_(0.2 * torch.rand(value.shape))

    def forward(self, x, classifiers):
        first = self.layer1(F.relu(self.bn1(self.conv1(x))))
        second = self.layer2(first)
        logits = []
        for m, (deep, exp, head) in enumerate(zip(self.layer3s, self.shallow_exps, getattr(self, classifiers))):
            shallow = (first, second)[m % 2]
            for link in exp['convs'].values():
                shallow = link['conv'](shallow)
            features = (shallow * deep(second)).mean((2, 3))
            logits.append(30 * F.normalize(features, dim=1) @ F.normalize(head.weight, dim=0))
        return torch.stack(logits, dim=1)


def authors_weights(**kwargs):
    return Authors(**kwargs).state_dict()


def authors_logits(weights, images, classifiers, **kwargs):
    network = Authors(**kwargs)
    network.load_state_dict(weights)
    with torch.inference_mode():
        return network.eval()(images, classifiers)


def elementwise_kl(p, q):
    return p * (p.log() - q.log())


def authors_stage_one(logits, target, target_mass):
    """Their loss, pair by pair and sample by sample: KL terms averaged over batch and classes, DKT times 10.

    Their DKT puts the logits 0 and -30 of teacher and student at the target, where Eq. 8 leaves the class out.
    """
    batch, num_experts, num_classes = logits.shape
    total = sum(F.cross_entropy(logits[:, m], target) for m in range(num_experts))
    probs = logits.softmax(-1)
    for j, k in itertools.permutations(range(num_experts), 2):
        total = total + elementwise_kl(probs[:, j], probs[:, k]).sum() / (batch * num_classes)
    for sample, label in zip(logits, target.tolist()):
        others = torch.tensor([c for c in range(num_classes) if c != label])
        average, teacher = sample.mean(0)[others], sample.max(0).values[others]
        hardest = average.argmax()
        teacher = torch.where(torch.arange(len(others)) == hardest, average, teacher)
        students = sample[:, others]
        if target_mass:
            teacher = torch.cat([teacher, teacher.new_zeros(1)])
            students = torch.cat([students, students.new_full((num_experts, 1), -30)], dim=1)
        for student in students:
            kl = elementwise_kl(teacher.softmax(-1), student.softmax(-1)).sum()
            total = total + 10 * kl / (batch * num_classes)
    return total


def authors_stage_two(logits, target, counts):
    return sum(F.cross_entropy(logits[:, m] + counts.log(), target) for m in range(logits.shape[1]))


@pytest.fixture(scope='module')
def weights():
    return authors_weights()


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def save(tmp_path, weights, prefix=''):
    path = tmp_path / 'theirs.pth.tar'
    torch.save({'epoch': 200, 'state_dict': {prefix + name: value for name, value in weights.items()}}, path)
    return path


@pytest.mark.parametrize('classifiers', [None, *SETS])
@pytest.mark.parametrize('prefix', ['', 'module.'])
@torch.inference_mode()
def test_a_converted_checkpoint_gives_the_authors_logits(tmp_path, weights, images, run_script, classifiers, prefix):
    options = ['--classifiers', classifiers] if classifiers else []
    status, _, error = run_script(TOOL, save(tmp_path, weights, prefix), tmp_path / 'new' / 'model', *options)
    assert status == 0, error
    model = timm.create_model(f'local-dir:{tmp_path}/new/model', pretrained=True).eval()
    expected = authors_logits(weights, images, classifiers or 'rt_classifiers')
    assert (model.forward_experts(images) - expected).abs().max() <= 1e-5
    assert (model(images) - expected.mean(1)).abs().max() <= 1e-5
    assert model.classifier_prior == ('train' if classifiers == 'classifiers' else 'uniform')
    assert 'label_names' not in json.loads((tmp_path / 'new' / 'model' / 'config.json').read_text())
    assert run_script(TOOL, tmp_path / 'theirs.pth.tar', tmp_path / 'new')[0] == 2  # it exists


def test_untrained_second_classifiers_are_refused(tmp_path, weights, images):
    """After the authors' stage one those are as their code makes them: columns of length 1."""
    fresh = {
        name: F.normalize(value, dim=0) if name.startswith('rt_') else value for name, value in weights.items()}
    path = save(tmp_path, fresh)
    with pytest.raises(InputError, match='is of stage one.*--classifiers classifiers'):
        converting.convert(path, tmp_path / 'model')
    converting.convert(path, tmp_path / 'model', 'classifiers')
    model = load_trained_model(str(tmp_path / 'model')).model.eval()
    assert model.classifier_prior == 'train'
    with torch.inference_mode():
        expected = authors_logits(weights, images, 'classifiers')
        torch.testing.assert_close(model.forward_experts(images), expected, atol=1e-4, rtol=1e-4)


def test_links_may_be_numbered_from_one(weights):
    one, other = converting.translate(weights), converting.translate(authors_weights(first_link=1))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_other_checkpoints_are_refused(tmp_path, tiny_run):
    with pytest.raises(InputError, match="which the authors' code does not have"):
        converting.convert(tiny_run / 'stage_one' / 'last.pth.tar', tmp_path / 'model')
    with pytest.raises(InputError, match="no 'rt_classifiers.0.weight'"):
        converting.translate({})


@pytest.mark.parametrize('change, message', [
    (lambda w: w.pop('layer2.3.bn1.bias'), "at 'stages.1.3.bn1.bias' it holds nothing"),
    (lambda w: w.pop('rt_classifiers.1.weight'), "no 'rt_classifiers.1.weight': use a complete one"),
    (lambda w: w.update({'conv1.weight': torch.zeros(16, 3, 5, 5)}), r"'stem.0.weight' it holds \(16, 3, 5, 5\)"),
    (lambda w: w.update({'rt_classifiers.2.weight': torch.zeros(64, 9)}), r'shapes \[\(64, 9\), \(64, 100\)\]'),
    (lambda w: w.update({'rt_classifiers.3.weight': torch.zeros(64, 100)}), "'experts.3.* it holds nothing"),
    (lambda w: w.update({'rt_classifiers.0.weight': torch.zeros(64)}), r"'rt_classifiers' of the shapes \[\(64,\)"),
    (lambda w: w.update({f'rt_classifiers.{m}.weight': torch.zeros(64) for m in range(3)}), r'of the shapes \[\(64,\)'),
    (lambda w: w.update({'rt_classifiers.x.weight': torch.zeros(64, 100)}), "holds 'rt_classifiers.x.weight'"),
    (lambda w: w.update({'bn1.bias': 3}), "holds a int as 'bn1.bias', not a tensor"),
    (lambda w: [w.pop(name) for name in list(w) if re.match(r'[a-z_3]+s\.0\.', name)], "no 'rt_classifiers.0.weight'"),
    (lambda w: w.update({'layer4.0.conv1.weight': torch.zeros(1)}), "'layer4.0.conv1.weight', which the authors' code"),
    (lambda w: w.update({'layer1.5.conv1.weight': torch.zeros(1)}), "at 'stages.0.5.conv1.weight' .* expects nothing"),
    (lambda w: w.update({'shallow_exps.0.convs.StridedConv9.conv.1.bias': torch.zeros(1)}), 'StridedConv9'),
])
def test_a_file_that_does_not_fit_is_one_sentence(tmp_path, weights, run_script, change, message):
    changed = dict(weights)
    change(changed)
    status, _, error = run_script(TOOL, save(tmp_path, changed), tmp_path / 'model')
    assert status == 2 and error.count('\n') == 1 and re.search(message, error), error
    assert not (tmp_path / 'model').exists()


def test_other_numbers_of_classes_and_experts(tmp_path, images):
    weights = authors_weights(num_classes=7, num_experts=2)
    converting.convert(save(tmp_path, weights), tmp_path / 'model', 'classifiers')
    model = load_trained_model(str(tmp_path / 'model')).model
    with torch.inference_mode():
        logits = model.eval().forward_experts(images)
    assert (logits - authors_logits(weights, images, 'classifiers', num_classes=7, num_experts=2)).abs().max() <= 1e-5


def test_a_model_folder_from_before_the_tool_loads(tmp_path, weights, images):
    converting.convert(save(tmp_path, weights), tmp_path / 'model')
    before = load_trained_model(str(tmp_path / 'model')).model.eval()
    config = json.loads((tmp_path / 'model' / 'config.json').read_text())
    config['model_args']['authors_classifiers'] = 'rt_classifiers'
    (tmp_path / 'model' / 'config.json').write_text(json.dumps(config))
    model = load_trained_model(str(tmp_path / 'model')).model.eval()
    with torch.inference_mode():
        assert torch.equal(model(images), before(images)) and 'authors_classifiers' not in model._model_args


@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_a_checkpoint_that_is_not_converted_yet_is_refused(tmp_path, weights, run_script, prefix):
    path = save(tmp_path, weights, prefix)
    for argv in (
            ['eval.py', '--checkpoint', path, '--dataset', 'digits_lt'],
            ['train.py', '--model', 'resnet32_shike', '--dataset', 'digits_lt', '--initial-checkpoint', path]):
        status, out, error = run_script(*argv, '--workers', '0', '--device', 'cpu')
        assert status == 2 and not out and error.count('\n') == 1 and f'convert it with {TOOL}' in error


def test_eval_takes_a_converted_model(tmp_path, weights, run_script):
    shrunk = {
        name: value[:, :10].contiguous() if re.match('(rt_)?classifiers', name) else value
        for name, value in weights.items()
    }
    path = save(tmp_path, shrunk)
    tables = set()
    for classifiers in SETS:
        converting.convert(path, tmp_path / classifiers, classifiers)
        status, out, err = run_script(
            'eval.py', '--dataset', 'digits_lt', '--img-size', '8', '--workers', '0', '--device', 'cpu', '--model',
            tmp_path / classifiers)
        assert status == 0 and out.splitlines()[-1].startswith('ensemble'), err
        tables.add(out)
    assert len(tables) == 2


def test_the_file_is_never_unpickled(tmp_path, weights):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / 'executed'), 'w'))

    torch.save({'state_dict': weights, 'best': Payload()}, tmp_path / 'theirs.pth.tar')
    with pytest.raises(InputError, match='could run any code'):
        converting.convert(tmp_path / 'theirs.pth.tar', tmp_path / 'model')
    assert not (tmp_path / 'executed').exists()


def relative_difference(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max())


def compare_with_the_authors(classifiers, make_task, reference_loss):
    """Largest relative difference of loss and of each parameter's gradient, in training mode and float64."""
    network = Authors().double().train()
    model = timm.create_model('resnet32_shike')
    model.load_state_dict(converting.translate(network.state_dict(), classifiers))
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(8, 3, 32, 32, generator=generator, dtype=torch.float64)
    target = torch.randint(100, (8,), generator=generator)
    task = make_task(model)
    model.double().train()
    with torch.no_grad():  # new classifiers of stage two start from the same values
        model.classifier.weight.copy_(converting.translate(network.state_dict(), classifiers)['classifier.weight'])
    loss = task(images, target)['loss']
    loss.backward()
    expected = reference_loss(network(images, classifiers), target)
    expected.backward()
    gradients = {
        name: torch.zeros_like(value) if value.grad is None else value.grad
        for name, value in (*network.named_parameters(), *network.named_buffers())}
    gradients = converting.translate(gradients, classifiers)
    compared = [
        relative_difference(value.grad, gradients[name]) for name, value in model.named_parameters()
        if value.requires_grad]
    return relative_difference(loss.detach(), expected.detach()), max(compared), len(compared)


@pytest.mark.parametrize('target_mass, low, high', [(False, 0, 1e-9), (True, 1e-6, 1e-3)])
def test_stage_one_agrees_with_the_authors(target_mass, low, high):
    """To rounding with Eq. 8; the mass that their code leaves on the target, which we do not, moves it a little."""
    loss, gradient, num_compared = compare_with_the_authors(
        'classifiers', ExpertTask, lambda logits, target: authors_stage_one(logits, target, target_mass))
    print(f'stage one, {target_mass=}: loss {loss:.1e}, gradients {gradient:.1e}')
    assert low <= loss <= high and low <= gradient <= high and num_compared == 181


def test_stage_two_agrees_with_the_authors():
    counts = torch.linspace(500, 5, 100).long()
    loss, gradient, num_compared = compare_with_the_authors(
        'rt_classifiers', lambda model: ClassifierRetrainingTask(model, counts.tolist()),
        lambda logits, target: authors_stage_two(logits, target, counts.double()))
    print(f'stage two: loss {loss:.1e}, gradients {gradient:.1e}')
    assert loss <= 1e-9 and gradient <= 1e-9 and num_compared == 1
