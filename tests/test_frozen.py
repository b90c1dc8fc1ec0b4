"""Experts without private stages, and training on cached features of a frozen trunk."""
import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from run_helpers import without_seconds

from shike_timm.cli.train import parse_train_args
from shike_timm.data.dataset import in_memory_set
from shike_timm.errors import InputError
from shike_timm.models.create import create_model
from shike_timm.pretrained.folder import export_model
from shike_timm.pretrained.load import load_trained_model
from shike_timm.report.runs import ReportConfig, make_report
from shike_timm.training.features import FeatureLoader, standardise
from shike_timm.training.folder import read_args
from shike_timm.training.phases import plan_phases
from shike_timm.training.runs import train
from shike_timm.training.search import _folds, search
from shike_timm.training.signals import Interrupted, StopFlag


@pytest.fixture(scope='module')
def backbone_file(tmp_path_factory):
    """Weights of a tiny backbone that have not been trained. They give features nevertheless."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('weights') / 'net.pth'
    torch.save(timm.create_model('test_efficientnet').state_dict(), path)
    return path


def level_model(**kwargs):
    torch.manual_seed(0)
    return timm.create_model('shike', private_stages=0, num_classes=5, **kwargs).eval()


@pytest.mark.parametrize('backbone', ['test_efficientnet', 'test_vit', 'test_convnext'])
def test_logits_are_those_of_standardised_features_side_by_side(backbone):
    model = level_model(backbone=backbone, num_experts=2, depths=[[2, 3], 1])
    features = np.random.default_rng(0).normal(3, 2, (40, 2, sum(model.level_widths))).astype(np.float16)
    standardise(model, features)
    images = torch.randn(3, 3, 160, 160)
    with torch.no_grad():
        pooled = model.pool_levels(images)
        last = len(model.stages)
        logits, from_pooled = model.forward_experts(images), model.forward_expert_head(model.forward_levels(pooled))
    assert model.depths == ((2, 3), (1, last))
    flat = torch.from_numpy(features).double().flatten(0, 1)
    scaled = (pooled.double() - flat.mean(0)) / (flat.var(0, correction=0) + 1e-5).sqrt()
    levels = scaled.split(model.level_widths, 1)
    width = model.num_features // 2
    for m, chosen in enumerate(model.depths):
        own = torch.cat([levels[level - 1] for level in chosen], 1)
        cosines = F.normalize(F.pad(own, (0, width - own.shape[1]))) @ F.normalize(
            model.classifier.weight[m].detach().double()).T
        torch.testing.assert_close(logits[:, m].double(), 30 * cosines, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(from_pooled, logits)


def test_pooled_tokens_are_the_class_token_beside_the_mean_of_patches():
    model = level_model(backbone='test_vit', num_experts=1)
    images = torch.randn(2, 3, 160, 160)
    assert model.level_widths == [2 * 64] * len(model.stages)
    with torch.no_grad():
        x, shared = model._forward_trunk(images, every=True)
        pooled = model.pool_levels(images).split(model.level_widths, 1)
    torch.testing.assert_close(pooled[0], torch.cat([shared[1][:, 0], shared[1][:, 1:].mean(1)], 1))


def test_saved_models_and_chosen_experts_give_the_same_logits(tmp_path):
    model = level_model(backbone='test_efficientnet', num_experts=3)
    images = torch.randn(2, 3, 96, 96)
    export_model(model, tmp_path / 'model', timm.data.resolve_data_config({}, model=model))
    loaded = load_trained_model(str(tmp_path / 'model')).model.eval()
    with torch.no_grad():
        expected = model.forward_experts(images)
        torch.testing.assert_close(loaded.forward_experts(images), expected)
        loaded.set_experts([2, 0])
        torch.testing.assert_close(loaded.forward_experts(images), expected[:, [2, 0]])


def test_a_frozen_trunk_keeps_the_statistics_of_its_features():
    model = level_model(backbone='test_efficientnet')
    model.freeze_trunk()
    before = [expert.norm.running_mean.clone() for expert in model.experts]
    model.train()(torch.randn(4, 3, 64, 64))
    assert all(torch.equal(expert.norm.running_mean, mean) for expert, mean in zip(model.experts, before))


def test_each_epoch_has_each_image_once_in_a_random_view():
    features = np.arange(40, dtype=np.float16).reshape(20, 2, 1)
    loader = FeatureLoader(features, np.arange(20), 5, torch.device('cpu'))
    loader.sampler.set_epoch(0, 0, 4)
    batches = list(loader)
    x, target = (torch.cat(parts) for parts in zip(*batches))
    assert sorted(target.tolist()) == list(range(20)) and len(batches) == len(loader) == 4
    assert set((x[:, 0] - 2 * target).tolist()) == {0., 1.}


FROZEN = [
    '--hparams', 'frozen', '--backbone', 'test_efficientnet', '--dataset', 'digits_lt', '--imb-factor', '5',
    '--img-size', '32', '--in-chans', '3', '--epochs', '2', '--val-interval', '2', '--workers', '0',
    '--experiment', 'run']


def frozen_run(folder, backbone_file, *extra):
    args = [*FROZEN, '--pretrained-backbone', str(backbone_file), '--output', str(folder), *map(str, extra)]
    return train(parse_train_args(args))


def test_the_recipe_chooses_experts_and_trains_them(backbone_file, tmp_path, monkeypatch):
    metrics = frozen_run(tmp_path, backbone_file)
    run = tmp_path / 'run'
    found, args = (json.loads((run / 'search.json').read_text()), yaml.safe_load((run / 'args.yaml').read_text()))
    assert found[0]['balanced'] == max(one['balanced'] for one in found)
    assert args['levels'] == found[0]['levels'] and args['lr'] == found[0]['lr'] and not args['search']
    assert metrics['stage_one']['top1'] > 30  # of ten classes, with an untrained backbone
    model = load_trained_model(str(run)).model
    assert ['+'.join(map(str, one)) for one in model.depths] == found[0]['levels']
    assert model.classifier_prior == 'uniform'
    # The choice can be trained again without a search, and gives the same model.
    again = tmp_path / 'again'
    frozen_run(again, backbone_file, '--hparams', run / 'args.yaml', '--output', again)
    assert without_seconds(again / 'run') == without_seconds(run)


def test_an_interrupted_run_goes_on_without_another_search(backbone_file, tmp_path, monkeypatch):
    from shike_timm.training import features, trainer

    frozen_run(tmp_path / 'whole', backbone_file)
    original = trainer.Trainer.train_epoch

    def stop(self, epoch, done):
        if epoch == 1:
            raise KeyboardInterrupt
        return original(self, epoch, done)

    monkeypatch.setattr(trainer.Trainer, 'train_epoch', stop)
    with pytest.raises(KeyboardInterrupt):
        frozen_run(tmp_path / 'cut', backbone_file)
    monkeypatch.undo()
    monkeypatch.setattr(trainer, 'search', lambda *args: pytest.fail('a second search'))
    monkeypatch.setattr(features, '_write_views', lambda *args: pytest.fail('features computed again'))
    frozen_run(tmp_path / 'cut', backbone_file, '--resume')  # The same command again.
    assert without_seconds(tmp_path / 'cut' / 'run') == without_seconds(tmp_path / 'whole' / 'run')


def test_other_images_get_other_features(backbone_file, tmp_path):
    def features(*extra):
        frozen_run(tmp_path, backbone_file, '--no-search', '--epochs', '1', '--experiment', str(len(extra)), *extra)
        return set(tmp_path.glob('features-*.npy'))

    first = features()
    assert len(first) == 1 and features('--lr', '0.1') == first
    assert len(features('--imb-seed', '1', '--lr', '0.1')) == 2  # As many images of each class, but others.


def test_a_stop_during_the_features_leaves_no_file(backbone_file, tmp_path, monkeypatch):
    from shike_timm.training import trainer

    original, calls = trainer.Shike.pool_levels, []

    def stop(self, x):
        if not calls:
            os.kill(os.getpid(), signal.SIGTERM)
        calls.append(x)
        return original(self, x)

    monkeypatch.setattr(trainer.Shike, 'pool_levels', stop)
    with pytest.raises(Interrupted):
        frozen_run(tmp_path, backbone_file, '--batch-size', '16')
    assert not list(tmp_path.glob('features-*'))


def test_a_transformer_of_another_size_is_searched(tmp_path):
    torch.manual_seed(0)
    torch.save(timm.create_model('test_vit').state_dict(), tmp_path / 'vit.pth')
    frozen_run(tmp_path, tmp_path / 'vit.pth', '--backbone', 'test_vit', '--epochs', '1')
    model = load_trained_model(str(tmp_path / 'run')).model.eval()
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_pooled_features_have_no_maps(backbone_file, tmp_path):
    frozen_run(tmp_path, backbone_file, '--no-search', '--epochs', '1')
    image = tmp_path / 'image.png'
    Image.new('RGB', (32, 32)).save(image)
    with pytest.raises(InputError, match='so there are no maps'):
        make_report(ReportConfig(runs=[str(tmp_path / 'run')], cam=[str(image)], device='cpu', workers=0))


@pytest.mark.parametrize('extra, sentence', [
    (['--search', '--levels', '1+2'], '--search chooses --levels'),
    (['--num-experts', '1'], '--search chooses --num-experts'),
    (['--private-stages', '1'], '--cache-features goes with --private-stages 0'),
    (['--no-freeze-trunk'], '--cache-features goes with --private-stages 0'),
    (['--mixup', '0.2'], 'does not go with --mixup'),
    (['--no-pretrained-backbone', '--initial-checkpoint', 'RUN'], '--search makes new experts on a backbone'),
    (['--method', 'ce'], '--search tries balanced softmax and SGD alone'),
    (['--opt', 'adamw'], '--search tries balanced softmax and SGD alone'),
    (['--hflip', '0'], '--cache-features 2 keeps mirror images'),
], ids=['levels', 'experts', 'private', 'unfrozen', 'mixup', 'start', 'method', 'opt', 'hflip'])
def test_what_does_not_go_with_cached_features(extra, sentence):
    with pytest.raises(InputError, match=sentence):
        plan_phases(parse_train_args([*FROZEN, *extra]))


def test_fine_tuning_begins_with_the_experts_found(backbone_file, tmp_path):
    frozen_run(tmp_path, backbone_file, '--no-search', '--levels', '2', '1+3', '--model-kwargs', 'pad_type=same')
    found = load_trained_model(str(tmp_path / 'run')).model
    args = [arg for arg in FROZEN if arg not in ('frozen', '--backbone', 'test_efficientnet')]
    args.insert(1, 'finetune_heads')
    metrics = train(parse_train_args([
        *args, '--initial-checkpoint', str(tmp_path / 'run'), '--lr', '0', '--weight-decay', '0', '--experiment',
        'tuned', '--epochs', '1', '--model-kwargs', 'bn_eps=0.002', '--output', str(tmp_path)]))
    tuned, saved = load_trained_model(str(tmp_path / 'tuned')).model, read_args(tmp_path / 'tuned')
    torch.testing.assert_close(tuned.classifier.weight, found.classifier.weight)
    assert tuned.depths == found.depths == ((2,), (1, 3)) and not tuned.trunk_frozen and list(metrics) == ['stage_one']
    assert saved['backbone'] == 'test_efficientnet' and saved['levels'] == ['2', '1+3']
    assert saved['cosine_scale'] == 25 and saved['head_init'] == 'means'  # They are kept all the same.
    assert saved['model_kwargs'].items() >= dict(pad_type='same', bn_eps=0.002).items()
    assert not torch.equal(tuned.experts[0].norm.running_mean, found.experts[0].norm.running_mean)


def test_a_frozen_trunk_needs_the_statistics_of_its_features():
    config = parse_train_args([*FROZEN, '--no-search', '--levels', '1+2'])
    with pytest.raises(InputError, match='need the mean and deviation of its features'):
        plan_phases(replace(config, cache_features=None))


def test_a_search_follows_the_base_rate_and_the_run_keeps_what_it_chose(backbone_file, tmp_path):
    frozen_run(tmp_path, backbone_file, '--lr-base', '0.5', '--channels-last')
    rate, saved = 0.5 * 128 / 256, read_args(tmp_path / 'run')
    tried = json.loads((tmp_path / 'run' / 'search.json').read_text())
    assert {one['lr'] for one in tried} == {rate, 0.05} and saved['lr'] == tried[0]['lr'] and saved['lr_base'] is None


def test_the_pooling_of_frozen_levels_is_the_mean():
    with pytest.raises(ValueError, match="global_pool 'max' needs private stages"):
        level_model(backbone='test_resnet', global_pool='max')


def test_the_search_takes_a_batch_of_one_image():
    data = in_memory_set(np.zeros((31, 2, 2, 3), np.uint8), np.repeat([0, 1, 2], [16, 10, 5]), ['a', 'b', 'c'])
    left = 31 - int((_folds(data, seed=0) == 0).sum())
    features = np.random.default_rng(0).normal(size=(31, 2, 4)).astype(np.float16)
    config = replace(parse_train_args(FROZEN), batch_size=left - 1)
    found = search(features, data, [2, 2], config, StopFlag())
    assert found[0]['balanced'] == max(one['balanced'] for one in found)


def test_folds_have_a_fifth_of_each_class_and_whole_groups():
    targets = np.repeat([0, 1, 2], [50, 10, 1])
    data = in_memory_set(np.zeros((61, 2, 2, 3), np.uint8), targets, ['a', 'b', 'c'])
    folds = _folds(data, seed=0)
    assert [np.bincount(folds[targets == c]).tolist() for c in (0, 1)] == [[10] * 5, [2] * 5]
    assert folds[60] == -1
    data.groups = np.arange(61) // 4
    folds = _folds(data, seed=0)
    assert all(len(set(folds[data.groups == group])) == 1 for group in range(15))


@pytest.mark.parametrize('extra, sentence', [
    (['--levels', '1+2'], 'goes with --private-stages 0'),
    (['--private-stages', '0', '--levels', '1+two'], 'numbers of stages with'),
    (['--private-stages', '0', '--levels', '1+9'], 'depths must name one or several shared stages'),
], ids=['private', 'words', 'range'])
def test_levels_that_cannot_be_read(extra, sentence):
    config = parse_train_args(['--model', 'shike', '--backbone', 'test_efficientnet', *extra])
    with pytest.raises(InputError, match=sentence):
        create_model(config, 3)


def test_levels_say_how_many_experts_there_are():
    config = parse_train_args(
        ['--model', 'shike', '--backbone', 'test_efficientnet', '--private-stages', '0', '--levels', '1+2', '2+3'])
    assert create_model(config, 3).num_experts == 2
    with pytest.raises(ValueError, match='depths must name one shared stage'):
        timm.create_model('shike', backbone='test_efficientnet', depths=[[1, 2], 1, 1])
