"""What timm asks of its own models, asked of every registered name."""
import copy
from functools import partial

import pytest
import timm
import torch
from timm.layers import set_layer_config
from timm.models import get_model_input_config, get_notrace_functions, get_notrace_modules, group_parameters
from timm.optim import param_groups_layer_decay
from torch import nn
from torchvision.models.feature_extraction import NodePathTracer, create_feature_extractor, get_graph_node_names

from shike_timm.models.experts import to_map

NAMES = timm.list_models(module='registry')
TAGGED = timm.list_models(module='registry', include_tags=True)
BACKBONES = dict(
    resnet50_shike='resnet50', resnext50_shike='resnext50_32x4d', resnet152_shike='resnet152', shike='resnet50')
SMALL = {  # what differs in more than the size of its backbone
    'resnet32_shike': {},
    'shike': dict(backbone='test_resnet'),
    'vit': dict(backbone='test_vit3', img_size=64),  # register tokens, attention pooling
    'eva': dict(backbone='eva02_tiny_patch14_224', img_size=56, depth=6, embed_dim=48, num_heads=3),
    'swin': dict(
        backbone='swin_tiny_patch4_window7_224', img_size=64, window_size=4, embed_dim=16, num_heads=(1, 2, 4, 8)),
}


def create(name, **kwargs):
    return timm.create_model(
        name if name in NAMES else 'shike', pretrained=False, **dict(SMALL.get(name, {}), **kwargs))


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def small_images(model, batch_size=2):
    channels, *size = get_model_input_config(model)['input_size']
    return torch.randn(batch_size, channels, *(min(side, 64) for side in size))


def as_map(model, features):
    return to_map(features, model.feature_info[-1], small_images(model).shape[2:])


@pytest.fixture(scope='module', params=SMALL)
def built(request):
    """A small model of each kind, made once; tests that change it work on a copy."""
    torch.manual_seed(0)
    return create(request.param, num_classes=7).eval()


@pytest.fixture
def model(built):
    return copy.deepcopy(built)


def test_every_name_has_a_default_configuration():
    assert set(NAMES) == {'resnet32_shike', 'resnet50_shike', 'resnext50_shike', 'resnet152_shike', 'shike'}
    assert {'resnet32_shike.cifar100_lt_if100', 'resnet32_shike.paper_cifar100_lt_if100'} < set(TAGGED)
    assert timm.get_pretrained_cfg('resnet32_shike').tag == 'cifar100_lt_if100' and len(TAGGED) == len(NAMES) + 4
    assert timm.list_models(module='registry', name_matches_cfg=True) == NAMES


@pytest.mark.parametrize('name', [
    pytest.param(name, marks=pytest.mark.slow) if 'resnet152' in name else name for name in TAGGED])
def test_configuration_and_shapes(name):
    model = timm.create_model(name, device='meta').eval()
    cfg, state = model.default_cfg, model.state_dict()
    images = torch.empty(1, *cfg['input_size'], device='meta')
    assert model.in_chans == cfg['input_size'][0] and model.num_classes == cfg['num_classes']
    for key in ('first_conv', 'classifier'):
        assert all(f'{part}.weight' in state for part in ([cfg[key]] if isinstance(cfg[key], str) else cfg[key]))
    features = model.forward_features(images)
    assert features.shape == (1, model.num_features, *cfg['pool_size'])
    assert model.forward_head(features, pre_logits=True).shape == (1, model.head_hidden_size)
    assert model(images).shape == model.train()(images).shape == (1, cfg['num_classes'])
    half = model.eval().to(torch.bfloat16)(images.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16
    if name.split('.')[0] in BACKBONES:  # one expert alone is timm's network
        plain = timm.create_model(name, num_experts=1, fusion=False, classifier='linear', device='meta')
        assert count(plain) == count(timm.create_model(BACKBONES[name.split('.')[0]], device='meta'))


@pytest.mark.parametrize('name', SMALL)
def test_classifier_and_pooling_can_go_at_any_time(name):
    model = create(name, device='meta')
    images = small_images(model, 1).to('meta')
    pooled, unpooled = (1, model.head_hidden_size), model.forward_features(images).shape
    assert unpooled[model.channel_dim] == model.num_features
    model.reset_classifier(0)
    assert model.num_classes == 0 and model(images).shape == pooled
    model.reset_classifier(0, '')
    assert model(images).shape == unpooled
    assert create(name, num_classes=0, device='meta')(images).shape == pooled
    assert create(name, num_classes=0, global_pool='', device='meta')(images).shape == unpooled
    model.to(torch.float64).train()
    model.reset_classifier(2)
    parameter, = model.get_classifier().parameters()
    assert parameter.device.type == 'meta' and parameter.dtype == torch.float64
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize('name', SMALL)
def test_device_and_data_type_are_those_asked_for(name):
    model = create(name, device='meta', dtype=torch.float64)
    tensors = [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]
    assert all(t.device.type == 'meta' and t.dtype == torch.float64 for t in tensors)
    model.requires_grad_(False)
    model.reset_classifier(0, '')
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises((TypeError, ValueError), match='not_an_argument'):
        create(name, not_an_argument=1)


def test_pooling_is_kept_unless_changed(model):
    images = small_images(model)
    with torch.inference_mode():
        assert torch.equal(model(images), model.forward_experts(images).mean(1))
        before = model.classifier.weight
        model.reset_classifier(7, model.default_pool if model.has_fixed_pool else 'max')
        assert not torch.equal(model.get_classifier().weight, before)
        expected = model.forward_head(model.forward_features(images), pre_logits=True)
        model.reset_classifier(5)
        assert torch.equal(model.forward_head(model.forward_features(images), pre_logits=True), expected)
        assert model(images).shape == (2, 5)


def test_checkpointing_changes_nothing(model):
    images = small_images(model)
    results = []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        output = model(images)
        output.square().mean().backward()
        results.append([output.detach(), *(p.grad.clone() for p in model.parameters())])
        _, intermediates = model.forward_intermediates(images)
        results[-1].append(intermediates[0].detach())
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_intermediates_agree_with_their_description(model):
    images = small_images(model)
    output, intermediates = model.forward_intermediates(images)
    info = model.feature_info
    assert len(intermediates) == len(info) >= 3
    for one, level in zip(intermediates, info):
        assert one.shape == (2, level['num_chs'], *(-(-side // level['reduction']) for side in images.shape[2:]))
    assert torch.equal(output, model.forward_features(images))
    assert torch.equal(as_map(model, output), intermediates[-1])
    modules = dict(model.named_modules())
    assert all(level['module'] in modules for level in info)
    for i in range(len(info)):
        taken, = model.forward_intermediates(images, indices=[i], stop_early=True, intermediates_only=True)
        assert torch.equal(taken, intermediates[i])
    last, taken = model.forward_intermediates(images, indices=2)
    assert len(taken) == 2 and torch.equal(taken[-1], as_map(model, last))
    taken, = model.forward_intermediates(images, indices=[-2], intermediates_only=True)
    assert torch.equal(taken, intermediates[-2])
    for wrong in (0, len(info) + 1, [], [len(info)], [-len(info) - 1]):
        with pytest.raises(ValueError, match=f'{len(info)} feature levels'):
            model.forward_intermediates(images, indices=wrong)


def test_pruned_levels_are_the_same_and_all_used(model):
    images = small_images(model)
    with torch.no_grad():
        expected = model.forward_intermediates(images, intermediates_only=True)
        whole = copy.deepcopy(model)
        whole.prune_intermediate_layers([len(expected) - 1], prune_head=False)
        assert torch.equal(whole(images), model(images))
    for i, tap in enumerate(expected):
        pruned = copy.deepcopy(model)
        kept = pruned.prune_intermediate_layers([i], prune_norm=True)
        features = as_map(pruned, pruned.forward_features(images))
        taken, = pruned.forward_intermediates(images, indices=kept, intermediates_only=True)
        assert torch.equal(features, tap) and torch.equal(taken, tap)
        features.sum().backward()
        assert all(p.grad is not None for p in pruned.parameters())
        pruned.reset_classifier(3, 'avg')
        assert pruned(images).shape == (2, 3) and pruned.head_hidden_size == tap.shape[1]


@pytest.mark.parametrize('name', SMALL)
@torch.inference_mode()
def test_features_only(name):
    model = create(name, features_only=True).eval()
    images = small_images(model)
    channels, reductions = model.feature_info.channels(), model.feature_info.reduction()
    features = model(images)
    assert [f.shape[1] for f in features] == channels and len(features) >= 3
    assert [images.shape[-1] / f.shape[-1] for f in features] == reductions
    two = create(name, features_only=True, out_indices=(0, 2)).eval()
    assert [f.shape[1] for f in two(images)] == [channels[0], channels[2]]


def test_layer_wise_learning_rates_rise_with_depth(model):
    parameters = dict(model.named_parameters())
    for coarse in (True, False):
        layer = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
        assert set(layer) == set(parameters)
        order = [
            {layer[name] for name in parameters if name.startswith(prefix)}
            for prefix in ('stem', *(f'stages.{i}.' for i in range(len(model.stages))), 'experts', 'classifier')
        ]
        assert all(max(low) < min(high) for low, high in zip(order, order[1:]))
    assert len(set(layer.values())) > len(model.stages) + 3  # blocks apart
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    scale = {id(p): group['lr_scale'] for group in groups for p in group['params']}
    assert scale[id(model.classifier.weight)] == 1 > scale[id(parameters[next(iter(parameters))])]


@pytest.mark.parametrize('name', ['resnet32_shike', 'shike', 'swin'])
def test_scripts(name):
    with set_layer_config(scriptable=True):
        model = create(name, num_classes=7).eval()
    images = small_images(model)
    scripted = torch.jit.script(model)
    with torch.no_grad():
        torch.testing.assert_close(scripted(images), model(images), rtol=1e-4, atol=1e-5)
    assert scripted.train().stem.training and not scripted.eval().stem.training


def traced(model):
    options = dict(
        leaf_modules=get_notrace_modules(), autowrap_functions=get_notrace_functions(), param_shapes_constant=True)
    train_nodes, eval_nodes = get_graph_node_names(model, tracer_kwargs=options)
    assert NodePathTracer(**options).trace(model)
    return create_feature_extractor(
        model, train_return_nodes=train_nodes[-1:], eval_return_nodes=eval_nodes[-1:], tracer_kwargs=options)


def test_traces_forward_and_backward(model):
    images = small_images(model)
    graph = traced(model)
    with torch.inference_mode():
        output, = graph(images).values()
        assert torch.equal(output, model(images))
        script_output, = torch.jit.script(graph)(images).values()
        torch.testing.assert_close(script_output, output, rtol=1e-4, atol=1e-5)
    output, = graph.train()(images).values()
    output.mean().backward()
    assert all(p.grad is not None for p in graph.parameters())


def test_pretrained_weights_are_adapted(built, tmp_path):
    name, state, options = built.default_cfg['architecture'], built.state_dict(), dict(built._model_args)
    torch.save(state, tmp_path / 'weights.pth')
    load = partial(timm.create_model, name, pretrained=True, pretrained_cfg_overlay=dict(
        file=str(tmp_path / 'weights.pth'), num_classes=7), **options)
    first_conv = built.default_cfg['first_conv']

    def same(model, prefix=''):
        names = [key for key in state if not key.startswith(('classifier', f'{first_conv}.'))]
        own = model.state_dict()
        return all(torch.equal(own[prefix + key], state[key]) for key in names if not prefix or '.head.' not in key)

    for num_classes in (5, 0):
        model = timm.create_model(name, **dict(options, in_chans=1, num_classes=num_classes))
        loaded = load(in_chans=1, num_classes=num_classes)
        assert same(loaded) and not same(model) and loaded.num_classes == num_classes
        adapted = loaded.get_submodule(first_conv).weight
        torch.testing.assert_close(adapted, state[f'{first_conv}.weight'].sum(1, keepdim=True))
    assert same(load(features_only=True), 'model.')


def test_weights_that_are_asked_for_come_before_those_of_the_package(tmp_path):
    model = create('resnet32_shike')
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    overlay = dict(url=f'file://{tmp_path}/weights.pth')
    loaded = timm.create_model(
        'resnet32_shike', pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=tmp_path / 'cache')
    assert torch.equal(loaded.classifier.weight, model.classifier.weight)
    packaged = timm.create_model('resnet32_shike', pretrained=True)
    assert not torch.equal(packaged.classifier.weight, model.classifier.weight)
    assert len(packaged.pretrained_cfg['label_names']) == 100


@pytest.mark.parametrize('name', ['resnet50_shike', 'resnext50_shike', 'resnet152_shike'])
def test_missing_weights_are_one_sentence(name):
    with pytest.raises(RuntimeError, match=f"No weights are published for '{name}'.*shike train") as raised:
        timm.create_model(f'{name}.untrained', pretrained=True)
    assert '\n' not in str(raised.value)


def test_drop_rates_act_in_training_only():
    for name in SMALL:
        model = create(name, drop_path_rate=0.5, num_classes=3).eval()
        images = small_images(model)
        assert any(isinstance(m, timm.layers.DropPath) and m.drop_prob == 0.5 for m in model.modules())
        with torch.no_grad():
            assert torch.equal(model(images), model(images))
            model.train()
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    nn.init.ones_(module.eval().weight)  # timm starts residual branches at 0
            assert not torch.equal(model(images), model(images))


@pytest.mark.parametrize('output_stride', [8, 16])
def test_output_stride(output_stride):
    model = create('resnet50_shike', output_stride=output_stride, device='meta').eval()
    images = torch.empty(1, 3, 64, 64, device='meta')
    for tap, level in zip(model.forward_intermediates(images, intermediates_only=True), model.feature_info):
        assert tap.shape[-1] == 64 // level['reduction']
    assert model.feature_info[-1]['reduction'] == output_stride
    with pytest.raises(ValueError, match='output_stride of the CIFAR ResNet cannot be changed, got 8'):
        create('resnet32_shike', output_stride=8)
