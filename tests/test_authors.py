"""Checkpoints of the authors' CIFAR code: a file in their layout, and a network of its description."""
import itertools
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import shike_timm  # noqa: F401
from shike_timm.errors import InputError
from shike_timm.models.authors import is_authors_layout, translate_authors_weights
from shike_timm.pretrained.load import load_trained_model
from shike_timm.training.tasks import ClassifierRetrainingTask, RepresentationTask

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
def test_checkpoint_path_gives_the_authors_logits(tmp_path, weights, images, classifiers, prefix):
    path = save(tmp_path, weights, prefix)
    model = timm.create_model('resnet32_shike', checkpoint_path=path, authors_classifiers=classifiers).eval()
    expected = authors_logits(weights, images, classifiers or 'rt_classifiers')
    assert (model.forward_experts(images) - expected).abs().max() <= 1e-5
    assert (model(images) - expected.mean(1)).abs().max() <= 1e-5


def test_every_way_of_loading_translates(tmp_path, weights, images):
    expected = timm.create_model('resnet32_shike', checkpoint_path=save(tmp_path, weights)).state_dict()
    by_file = timm.create_model('resnet32_shike', pretrained=True, pretrained_cfg_overlay=dict(
        file=str(tmp_path / 'theirs.pth.tar')))
    direct = timm.create_model('resnet32_shike')
    direct.load_state_dict(weights)
    wrapped = torch.nn.ModuleDict({'net': timm.create_model('resnet32_shike')})
    wrapped.load_state_dict({f'net.{name}': value for name, value in weights.items()})
    parallel = timm.create_model('resnet32_shike')
    parallel.load_state_dict({f'module.{name}': value for name, value in weights.items()})
    by_value = timm.create_model('resnet32_shike', pretrained=True, pretrained_cfg_overlay=dict(state_dict=weights))
    trained = load_trained_model(checkpoint=str(tmp_path / 'theirs.pth.tar')).model
    for model in (by_file, direct, wrapped['net'], parallel, by_value, trained):
        assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_pretrained_weights_adapt_to_other_channels_and_classes(tmp_path, weights):
    overlay = dict(file=str(save(tmp_path, weights)))
    expected = timm.create_model('resnet32_shike', pretrained=True, pretrained_cfg_overlay=overlay).state_dict()
    adapted = timm.create_model(
        'resnet32_shike', pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1, num_classes=7).state_dict()
    torch.testing.assert_close(adapted['stem.0.weight'], expected['stem.0.weight'].sum(1, keepdim=True))
    assert adapted['classifier.weight'].shape == (3, 7, 64)
    assert all(torch.equal(value, expected[name]) for name, value in adapted.items() if name.startswith('experts'))
    features = timm.create_model('resnet32_shike', pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0)
    assert all(torch.equal(value, expected[name]) for name, value in features.state_dict().items())
    with pytest.raises(InputError, match='has 3 experts .* create it with num_experts=3, num_classes=100'):
        timm.create_model('resnet32_shike', checkpoint_path=overlay['file'], num_classes=7)
    with pytest.raises(InputError, match="'layer3s.2.*', for which the model has no place"):
        timm.create_model('resnet32_shike', pretrained=True, pretrained_cfg_overlay=overlay, num_experts=2)


def test_untrained_second_classifiers_are_refused(tmp_path, weights, images):
    """After the authors' stage one those are as their code makes them: columns of length 1."""
    fresh = {
        name: F.normalize(value, dim=0) if name.startswith('rt_') else value for name, value in weights.items()}
    path = save(tmp_path, fresh)
    with pytest.raises(InputError, match='is of stage one.*--authors-classifiers classifiers'):
        load_trained_model(checkpoint=str(path))
    with pytest.raises(InputError, match="authors_classifiers='classifiers'"):
        timm.create_model('resnet32_shike', checkpoint_path=path)
    model = load_trained_model(checkpoint=str(path), authors_classifiers='classifiers').model.eval()
    assert model.classifier_prior == 'train'
    with torch.inference_mode():
        expected = authors_logits(weights, images, 'classifiers')
        torch.testing.assert_close(model.forward_experts(images), expected, atol=1e-4, rtol=1e-4)


def test_links_may_be_numbered_from_one(weights):
    one, other = timm.create_model('resnet32_shike'), timm.create_model('resnet32_shike')
    one.load_state_dict(weights)
    other.load_state_dict(authors_weights(first_link=1))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def test_own_layout_is_left_alone(tmp_path):
    model = timm.create_model('resnet32_shike')
    assert not is_authors_layout(model.state_dict())
    with pytest.raises(RuntimeError, match='Missing key'):
        model.load_state_dict({})


@pytest.mark.parametrize('change, message', [
    (lambda w: w.pop('layer2.3.bn1.bias'), "nothing for 'stages.1.3.bn1.bias'"),
    (lambda w: w.pop('rt_classifiers.1.weight'), "no 'rt_classifiers.1.weight': use a whole file"),
    (lambda w: w.update({'conv1.weight': torch.zeros(16, 3, 5, 5)}), r"'conv1.weight' with the shape \(16, 3, 5, 5\)"),
    (lambda w: w.update({f'rt_classifiers.{m}.weight': torch.zeros(64, 9) for m in (0, 1, 2)}),
     '3 experts and 9 classes'),
    (lambda w: w.update({'rt_classifiers.2.weight': torch.zeros(64, 9)}), 'of different shapes'),
    (lambda w: w.update({'rt_classifiers.3.weight': torch.zeros(64, 100)}), 'has 4 experts .* num_experts=4'),
    (lambda w: w.update({'rt_classifiers.0.weight': torch.zeros(64)}), r"'rt_classifiers.0.weight' with the shape \("),
    (lambda w: w.update({'rt_classifiers.x.weight': torch.zeros(64, 100)}), "holds 'rt_classifiers.x.weight'"),
    (lambda w: w.update({'bn1.bias': 3}), "holds a int as 'bn1.bias', expected a tensor"),
    (lambda w: [w.pop(name) for name in list(w) if re.match(r'[a-z_3]+s\.0\.', name)], "no 'rt_classifiers.0.weight'"),
    (lambda w: w.update({'layer4.0.conv1.weight': torch.zeros(1)}), "'layer4.0.conv1.weight', which that code does"),
    (lambda w: w.update({'layer1.5.conv1.weight': torch.zeros(1)}), "'layer1.5.conv1.weight', for which the model"),
    (lambda w: w.update({'shallow_exps.0.convs.StridedConv9.conv.1.bias': torch.zeros(1)}), 'StridedConv9'),
])
def test_a_file_that_does_not_fit_is_one_sentence(weights, change, message):
    changed = dict(weights)
    change(changed)
    model = timm.create_model('resnet32_shike')
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=message) as raised:
        model.load_state_dict(changed)
    assert '\n' not in str(raised.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_other_numbers_of_classes_and_experts(tmp_path, images):
    weights = authors_weights(num_classes=7, num_experts=2)
    with pytest.raises(InputError, match='create it with num_experts=2, num_classes=7'):
        timm.create_model('resnet32_shike', checkpoint_path=save(tmp_path, weights))
    model = load_trained_model(checkpoint=str(tmp_path / 'theirs.pth.tar'), authors_classifiers='classifiers').model
    with torch.inference_mode():
        logits = model.eval().forward_experts(images)
    assert (logits - authors_logits(weights, images, 'classifiers', num_classes=7, num_experts=2)).abs().max() <= 1e-5


def test_eval_reads_them(tmp_path, weights, run_script):
    shrunk = {
        name: value[:, :10].contiguous() if re.match('(rt_)?classifiers', name) else value
        for name, value in weights.items()
    }
    path = save(tmp_path, shrunk)
    command = ['eval.py', '--dataset', 'digits_lt', '--img-size', '8', '--workers', '0', '--device', 'cpu']
    tables = {}
    for classifiers in SETS:
        status, tables[classifiers], err = run_script(
            *command, '--checkpoint', path, '--authors-classifiers', classifiers)
        assert status == 0, err
        assert tables[classifiers].splitlines()[-1].startswith('ensemble')
    assert tables['classifiers'] != tables['rt_classifiers'] == run_script(*command, '--checkpoint', path)[1]
    del shrunk['layer1.0.bn2.running_var']
    status, out, err = run_script(*command, '--checkpoint', save(tmp_path, shrunk))
    assert status == 2 and err.count('\n') == 1 and "nothing for 'stages.0.0.bn2.running_var'" in err


def test_the_file_is_never_unpickled(tmp_path, weights):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / 'executed'), 'w'))

    torch.save({'state_dict': weights, 'best': Payload()}, tmp_path / 'theirs.pth.tar')
    with pytest.raises(RuntimeError, match='weights_only=True'):
        timm.create_model('resnet32_shike', checkpoint_path=tmp_path / 'theirs.pth.tar')
    with pytest.raises(InputError, match='could run any code'):
        load_trained_model(checkpoint=str(tmp_path / 'theirs.pth.tar'))
    assert not (tmp_path / 'executed').exists()


def relative_difference(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max())


def compare_with_the_authors(classifiers, make_task, reference_loss):
    """Largest relative difference of loss and of each parameter's gradient, in training mode and float64."""
    network = Authors().double().train()
    model = timm.create_model('resnet32_shike')
    model.load_state_dict(translate_authors_weights(network.state_dict(), model.state_dict(), classifiers))
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(8, 3, 32, 32, generator=generator, dtype=torch.float64)
    target = torch.randint(100, (8,), generator=generator)
    task = make_task(model)
    model.double().train()
    with torch.no_grad():  # new classifiers of stage two start from the same values
        weights = translate_authors_weights(network.state_dict(), model.state_dict(), classifiers)
        model.classifier.weight.copy_(weights['classifier.weight'])
    loss = task(images, target)['loss']
    loss.backward()
    expected = reference_loss(network(images, classifiers), target)
    expected.backward()
    gradients = {
        name: torch.zeros_like(value) if value.grad is None else value.grad
        for name, value in (*network.named_parameters(), *network.named_buffers())}
    gradients = translate_authors_weights(gradients, model.state_dict(), classifiers)
    compared = [
        relative_difference(value.grad, gradients[name]) for name, value in model.named_parameters()
        if value.requires_grad]
    return relative_difference(loss.detach(), expected.detach()), max(compared), len(compared)


@pytest.mark.parametrize('target_mass, low, high', [(False, 0, 1e-9), (True, 1e-6, 1e-3)])
def test_stage_one_agrees_with_the_authors(target_mass, low, high):
    """To rounding with Eq. 8; the mass that their code leaves on the target, which we do not, moves it a little."""
    loss, gradient, num_compared = compare_with_the_authors(
        'classifiers', RepresentationTask, lambda logits, target: authors_stage_one(logits, target, target_mass))
    print(f'stage one, {target_mass=}: loss {loss:.1e}, gradients {gradient:.1e}')
    assert low <= loss <= high and low <= gradient <= high and num_compared == 181


def test_stage_two_agrees_with_the_authors():
    counts = torch.linspace(500, 5, 100).long()
    loss, gradient, num_compared = compare_with_the_authors(
        'rt_classifiers', lambda model: ClassifierRetrainingTask(model, counts.tolist()),
        lambda logits, target: authors_stage_two(logits, target, counts.double()))
    print(f'stage two: loss {loss:.1e}, gradients {gradient:.1e}')
    assert loss <= 1e-9 and gradient <= 1e-9 and num_compared == 1
