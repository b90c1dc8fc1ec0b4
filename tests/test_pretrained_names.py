"""Registered names with pretrained=True: timm's weights of the backbone, from a Hub on loopback."""
import time

import pytest
import safetensors.torch
import timm
import torch
from huggingface_hub import constants
from loopback_hub import TOKEN, LoopbackHub
from timm.models import save_for_hf

import shike_timm
from shike_timm.cli.train import parse_train_args
from shike_timm.models.create import create_model
from shike_timm.models.registry import BACKBONES
from shike_timm.pretrained.folder import export_model


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that serves timm's repositories of the weights that are put into it."""
    with LoopbackHub() as server:
        monkeypatch.setattr(constants, 'ENDPOINT', server.endpoint)
        monkeypatch.setattr(
            constants, 'HUGGINGFACE_CO_URL_TEMPLATE', server.endpoint + '/{repo_id}/resolve/{revision}/{filename}')
        monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
        monkeypatch.setenv('HF_TOKEN', TOKEN)
        yield server
        server.shutdown()


def put(hub, name, net, folder):
    """Let the Hub serve a network as timm's repository of a name."""
    save_for_hf(net, str(folder), safe_serialization=True)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.repos[f'timm/{name}'] = {'private': False, 'commits': [files]}


def shaken(name, **kwargs):
    """A network whose statistics of BatchNorm are not those of a new one."""
    torch.manual_seed(0)
    net = timm.create_model(name, **kwargs)
    net.train()(torch.randn(4, 3, 64, 64))
    return net.eval()


NAMES = [
    pytest.param(name, marks=[] if name == 'resnet50_shike' else pytest.mark.slow) for name in BACKBONES]


@pytest.mark.parametrize('name', NAMES)
def test_the_backbones_logits_and_a_start_for_fine_tuning(hub, tmp_path, name):
    backbone, tag = BACKBONES[name]
    net, images = shaken(backbone), torch.randn(2, 3, 64, 64)
    put(hub, f'{backbone}.{tag}', net, tmp_path / 'hub')
    model = timm.create_model(name, pretrained=True).eval()
    with torch.inference_mode():
        expected = net(images)
        torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)
        for expert in model.forward_experts(images).unbind(1):
            torch.testing.assert_close(expert, expected, rtol=1e-5, atol=1e-5)
    assert model.pretrained_cfg['crop_pct'] == timm.get_pretrained_cfg(f'{backbone}.{tag}').crop_pct
    export_model(model, tmp_path / 'saved', timm.data.resolve_model_data_config(model))
    again = timm.create_model(f'local-dir:{tmp_path}/saved', pretrained=True).eval()
    assert (again.fusion, again.classifier_type) == ('residual', 'linear')
    assert torch.equal(again(images), model(images))
    # Other classes and grey images, adapted as timm adapts them.
    grey = timm.create_model(name, pretrained=True, num_classes=7, in_chans=1).eval()
    plain = timm.create_model(f'{backbone}.{tag}', pretrained=True, num_classes=7, in_chans=1).eval()
    assert grey(images[:, :1]).shape == (2, 7) and grey.classifier.weight.std() > 0
    features = plain.forward_head(plain.forward_features(images[:, :1]), pre_logits=True)
    ours = grey.forward_head(grey.forward_features(images[:, :1]), pre_logits=True)
    torch.testing.assert_close(ours, features.repeat(1, 3), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('backbone', ['test_resnet', 'test_vit', 'test_efficientnet'])
def test_any_backbone(hub, tmp_path, backbone, caplog):
    name = f'{backbone}.r160_in1k'
    net, size = timm.create_model(backbone, num_classes=1000).eval(), 160
    put(hub, name, net, tmp_path / 'hub')
    images = torch.randn(2, 3, size, size)
    model = timm.create_model('shike', backbone=backbone, pretrained=True).eval()
    torch.testing.assert_close(model(images), net(images), rtol=1e-5, atol=1e-5)
    assert not caplog.records
    cosine = timm.create_model('shike', backbone=backbone, pretrained=True, classifier='cosine')
    assert 'The classifiers are new' in caplog.text and cosine.classifier_type == 'cosine'
    levels = timm.create_model('shike', backbone=backbone, pretrained=True, features_only=True)
    assert len(levels(images)) >= 3
    # On the command line it is --pretrained-backbone.
    torch.save(net.state_dict(), tmp_path / 'file.pth')
    argv = ['--model', 'shike', '--backbone', backbone]
    made = [
        create_model(parse_train_args([*argv, *more]), 5, fresh=True).state_dict()
        for more in (['--pretrained'], ['--pretrained-backbone', str(tmp_path / 'file.pth')])]
    assert all(torch.equal(made[0][key], value) for key, value in made[1].items() if '.aligner.' not in key
               and 'classifier' not in key)


def test_lists_and_weights_that_are_not_fetched(hub, tmp_path, run_script):
    listed = timm.list_pretrained('*shike*')
    assert {f'{name}.backbone_{tag}' for name, (_, tag) in BACKBONES.items()} < set(listed)
    untrained = timm.create_model('resnet50_shike', device='meta')
    assert untrained.pretrained_cfg['crop_pct'] == 0.875 and untrained.fusion == 'product'
    with pytest.raises(OSError, match='model.safetensors of huggingface.co/timm/resnet50.a1_in1k .*FILE') as raised:
        timm.create_model('resnet50_shike', pretrained=True)
    assert '\n' not in str(raised.value)
    status, _, error = run_script(
        'train.py', '--model', 'resnet50_shike', '--pretrained', '--dataset', 'digits_lt', '--img-size', '32',
        '--device', 'cpu', '--output', tmp_path / 'out')
    assert status == 2 and 'give it as --pretrained-backbone FILE' in error and len(error.splitlines()) == 1
    with pytest.raises(RuntimeError, match="timm has no weights of 'test_convnext4'"):
        timm.create_model('shike', backbone='test_convnext4', pretrained=True)


def test_weights_of_shike_are_taken_as_they_are(tmp_path):
    model = shike_timm.shike('test_resnet', num_classes=5)
    safetensors.torch.save_file(model.state_dict(), tmp_path / 'own.safetensors')
    overlay = dict(file=str(tmp_path / 'own.safetensors'), num_classes=5)
    again = timm.create_model(
        'shike', backbone='test_resnet', pretrained=True, num_classes=5, pretrained_cfg_overlay=overlay)
    assert all(torch.equal(again.state_dict()[key], value) for key, value in model.state_dict().items())


def test_without_a_network_one_sentence_within_seconds(hub, run_script, tmp_path, monkeypatch):
    hub.shutdown()
    hub.server_close()
    start = time.perf_counter()
    status, _, error = run_script(
        'train.py', '--dataset', 'digits_lt', '--model', 'shike', '--backbone', 'resnet18', '--pretrained-backbone',
        '--in-chans', '3', '--img-size', '32', '--output', tmp_path / 'out')
    assert status == 2 and not (tmp_path / 'out').exists(), error
    assert '--pretrained-backbone FILE' in error and '--no-pretrained-backbone' in error and 'timm/resnet18' in error
    assert time.perf_counter() - start < 30  # The Hub's client would try again for a minute.


@pytest.mark.parametrize('classifier', ['cosine', 'linear'])
def test_weights_of_the_backbone_without_private_stages(classifier):
    net, images = shaken('test_resnet'), torch.randn(2, 3, 64, 64)
    options = dict(backbone='test_resnet', private_stages=0, num_experts=2, classifier=classifier)
    model = timm.create_model(
        'shike', pretrained=True, pretrained_cfg_overlay=dict(state_dict=net.state_dict()), **options).eval()
    other = timm.create_model('shike', **options).eval()
    other.load_backbone(net.state_dict())
    with torch.inference_mode():
        assert torch.equal(model.pool_levels(images), other.pool_levels(images))
        assert model(images).shape == (2, 1000)
