"""Classifiers that begin at class means: their values, and the runs that ask for them."""
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import TINY
from run_helpers import run, without_seconds

from shike_timm.checkpoints import load_checkpoint, load_weights
from shike_timm.cli.retrain_classifier import parse_retrain_args
from shike_timm.cli.train import parse_train_args
from shike_timm.models.create import create_model
from shike_timm.training import trainer
from shike_timm.training.class_means import begin_at_class_means, class_means
from shike_timm.training.phases import plan_phases
from shike_timm.training.runs import prepare, retrain, train
from shike_timm.training.signals import StopFlag
from shike_timm.training.trainer import Trainer

MEANS = ['--crt-init', 'means', '--no-aug']
SHORT = [*MEANS, '--epochs', '1', '--warmup-epochs', '0', '--crt-epochs', '1']


class Points(torch.nn.Module):
    """Two experts: images are features, and the second expert doubles and turns them."""

    num_experts, num_classes, head_hidden_size = 2, 3, 4

    def __init__(self, kind='cosine'):
        super().__init__()
        self.classifier = timm.create_model(
            'resnet32_shike', num_classes=3, num_experts=2, classifier=kind).classifier
        self.classifier.weight = torch.nn.Parameter(self.classifier.weight.detach()[:, :, :2].clone())

    def forward_features(self, x):
        x = x.flatten(1)
        return torch.cat((x, 2 * x.flip(1)), 1)

    def forward_head(self, x, pre_logits):
        assert pre_logits and not self.training
        return x

    def get_classifier(self):
        return self.classifier


IMAGES = torch.tensor([[3., 4.], [0., 2.], [8., 6.], [1., 0.]])[:, :, None, None]
TARGET = torch.tensor([0, 0, 2, 2])  # class 1 has no images


@pytest.mark.parametrize('batch_size', [1, 3, 4])
def test_means_are_exact_whatever_the_batch(batch_size):
    model = Points().train()
    before = model.classifier.weight.detach().clone()
    batches = list(zip(IMAGES.split(batch_size), TARGET.split(batch_size)))
    means, counts, norms = class_means(model, batches, StopFlag())
    # Class 0: (0.6, 0.8) + (0, 1) = (0.6, 1.8), which is 3 (0.2, 0.6). Class 2: (0.8, 0.6) + (1, 0) = (1.8, 0.6).
    one = torch.tensor([[1., 3.], [0., 0.], [3., 1.]], dtype=torch.float64) / 10 ** 0.5
    torch.testing.assert_close(means, torch.stack((one, one.flip(1))), rtol=1e-7, atol=0)
    assert counts.tolist() == [2, 0, 2]
    torch.testing.assert_close(norms, torch.tensor([4.5, 9.], dtype=torch.float64))
    assert begin_at_class_means(model, batches, StopFlag()) == 4 and model.training
    assert torch.equal(model.classifier.weight[:, 1], before[:, 1])
    torch.testing.assert_close(model.classifier.weight[:, 0], torch.stack((one[0], one[0].flip(0))).float())


def test_linear_classifiers_decide_as_cosine_ones_at_first():
    batches = [(IMAGES, torch.tensor([0, 1, 2, 1]))]
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(100, 2, 2, generator=generator)
    logits = []
    for kind in ('cosine', 'linear'):
        model = Points(kind)
        begin_at_class_means(model, batches, StopFlag())
        logits.append(model.classifier(features))
    assert torch.equal(logits[0].argmax(-1), logits[1].argmax(-1))
    norms = torch.tensor([4.5, 9.])[:, None]
    torch.testing.assert_close(logits[1], logits[0] * features.norm(dim=-1, keepdim=True) / norms)


def expected_means(path, key):
    """The class means of a run's training images without augmentation, by the weights of a checkpoint."""
    args = parse_train_args([*TINY, '--no-aug'])
    model = create_model(args, 10)
    load_weights(model, load_checkpoint(path)[key], path)
    data = prepare(args, plan_phases(args), torch.device('cpu')).data.train
    mean, std = (torch.tensor(values)[:, None, None] for values in (
        model.pretrained_cfg['mean'], model.pretrained_cfg['std']))
    images = (torch.as_tensor(data.images).permute(0, 3, 1, 2) / 255 - mean) / std
    features = model.forward_head(model.eval().forward_features(images), pre_logits=True)
    features = F.normalize(features.detach().unflatten(1, (3, -1)).double(), dim=-1)
    target = torch.as_tensor(data.targets)
    return F.normalize(torch.stack([features[target == c].sum(0) for c in range(10)], 1), dim=-1).float()


@pytest.mark.parametrize('options', [[], ['--batch-size', '48', '--no-device-data', '--model-ema']], ids=len)
def test_stage_two_begins_at_the_means_of_all_images(tmp_path, options):
    folder, _ = run(tmp_path, *SHORT, '--crt-lr', '0', *options)
    stage_two = load_checkpoint(folder / 'stage_two' / 'last.pth.tar')
    keys = ['state_dict', *(['state_dict_ema'] if '--model-ema' in options else [])]
    expected = expected_means(folder / 'stage_one' / 'last.pth.tar', keys[-1])
    for key in keys:
        torch.testing.assert_close(stage_two[key]['classifier.weight'], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('place', ['begin_at_class_means', 'train_epoch'])
def test_a_run_killed_in_or_after_the_pass_goes_on_with_the_same_bits(tmp_path, monkeypatch, place):
    options = [option for option in SHORT if option != '--no-aug']
    expected, _ = run(tmp_path / 'whole', *options)

    def dies(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if place == 'train_epoch':
            original = Trainer.train_epoch
            patch.setattr(Trainer, place, lambda self, *args: (
                dies() if self.phase.is_retraining else original(self, *args)))
        else:
            patch.setattr(trainer, place, dies)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, *options)
    train(parse_train_args(['--resume', str(tmp_path / 'run')]))
    assert without_seconds(tmp_path / 'run') == without_seconds(expected)
    retrain(*parse_retrain_args(['--checkpoint', str(expected), '--output', str(tmp_path), '--experiment', 'again']))
    states = [
        load_checkpoint(folder / 'stage_two' / 'last.pth.tar')['state_dict']['classifier.weight']
        for folder in (expected, tmp_path / 'run', tmp_path / 'again')]
    assert torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])


def test_stage_one_begins_at_the_means_of_a_pretrained_backbone(tmp_path):
    torch.manual_seed(0)
    torch.save(timm.create_model('test_resnet').state_dict(), tmp_path / 'weights.pth')
    few = ['--model', 'shike', '--backbone', 'test_resnet', '--pretrained-backbone', tmp_path / 'weights.pth',
           '--img-size', '32', '--freeze-trunk', '--classifier', 'linear', '--no-aug', '--epochs', '1',
           '--warmup-epochs', '0', '--crt-epochs', '0', '--method', 'ce']
    _, means = run(tmp_path / 'means', *few, '--head-init', 'means', '--lr', '0')
    _, fresh = run(tmp_path / 'random', *few, '--lr', '0')
    assert means['stage_one']['top1'] > fresh['stage_one']['top1'] + 10
