import numpy as np
import pytest
import timm
import torch
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

import shike_timm  # noqa: F401
from shike_timm.cli.train import parse_train_args
from shike_timm.errors import InputError
from shike_timm.models.classifiers import CLASSIFIERS
from shike_timm.models.create import create_model
from shike_timm.models.experts import ALIGNERS, conv_aligner


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_resnet32_has_the_authors_parameters():
    assert count(timm.create_model('resnet32_shike')) == 1_257_808


@pytest.mark.parametrize('aligner, expected', [('conv', 122.7), ('bottleneck', 61.1), ('separable', 57.55)])
def test_resnet50_has_the_parameters_counted_by_hand(aligner, expected):
    with torch.device('meta'):
        model = timm.create_model('resnet50_shike', aligner=aligner)
    one_classifier = 2048 * 1000
    assert (count(model) - 2 * one_classifier) / 1e6 == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize('num_experts, depths', [(1, (1,)), (2, (1, 2)), (3, (1, 2, 1)), (4, (1, 2, 1, 2))])
def test_default_depths(num_experts, depths):
    model = timm.create_model('resnet32_shike', num_experts=num_experts)
    assert model.depths == depths
    assert model.forward_experts(torch.randn(1, 3, 32, 32)).shape == (1, num_experts, 100)


def test_an_expert_fuses_the_stage_it_names():
    model = timm.create_model('resnet32_shike', depths=(2, 2, 2))
    assert [expert.aligner[0].in_channels for expert in model.experts] == [32, 32, 32]
    model = timm.create_model('resnet32_shike', fusion=False)
    assert all(expert.aligner is None for expert in model.experts)


def test_fusion_is_a_product():
    model = timm.create_model('resnet32_shike', num_experts=1, num_classes=3).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        shallow = model.stages[0](model.stem(images))
        expert = model.experts[0]
        expected = expert.stage(model.stages[1](shallow)) * expert.aligner(shallow)
        assert torch.equal(model.forward_features(images), expected)


@pytest.mark.parametrize('name', ['resnet32_shike', 'shike'])
def test_residual_fusion_starts_as_the_backbone(name):
    """deep * (1 + aligned), with `aligned` zero at first and learning from the first step."""
    options = {} if name == 'resnet32_shike' else dict(backbone='resnet18')
    model = timm.create_model(name, num_classes=3, fusion='residual', **options).eval()
    plain = timm.create_model(name, num_classes=3, fusion=False, **options).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images), plain(images))
    model(images).sum().backward()
    norms = [[part for part in expert.aligner if isinstance(part, nn.BatchNorm2d)][-1] for expert in model.experts]
    assert all(norm.weight.grad.abs().max() > 0 for norm in norms)
    nn.init.ones_(norms[0].weight)
    with torch.inference_mode():
        x, shared = model._forward_trunk(images)
        expert = model.experts[0]
        own, aligned = expert.stage(x), expert.aligner(shared[expert.depth])
        assert torch.allclose(expert(x, shared), own * (1 + aligned))


def test_a_saved_model_keeps_its_fusion_and_stages(tmp_path):
    model = timm.create_model('resnet32_shike', num_classes=3, fusion='residual', private_stages=2)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    loaded, images = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval(), torch.randn(2, 3, 32, 32)
    assert loaded.experts[0].residual and len(loaded.stages) == 1
    assert torch.equal(loaded(images), model.eval()(images))


def test_two_stages_of_their_own_are_counted_by_hand():
    """Stage two of the CIFAR ResNet has 88,768 parameters, which three experts have three times."""
    one, two = (
        sum(p.numel() for p in timm.create_model('resnet32_shike', private_stages=n, fusion=False).parameters())
        for n in (1, 2))
    assert two - one == 2 * 88_768


@pytest.mark.parametrize('halvings, kinds', [
    (1, ['Conv2d', 'BatchNorm2d', 'ReLU']),
    (2, ['Conv2d', 'BatchNorm2d', 'ReLU', 'Conv2d', 'BatchNorm2d']),
    (3, ['Conv2d', 'BatchNorm2d', 'ReLU', 'Conv2d', 'BatchNorm2d', 'Conv2d', 'BatchNorm2d', 'ReLU']),
])
def test_conv_aligner_is_the_authors_chain(halvings, kinds):
    aligner = conv_aligner(4, 4 * 2 ** halvings, halvings)
    assert [type(layer).__name__ for layer in aligner] == kinds
    assert aligner(torch.randn(1, 4, 16, 16)).shape == (1, 4 * 2 ** halvings, 16 >> halvings, 16 >> halvings)


@pytest.mark.parametrize('aligner', ALIGNERS.values())
def test_aligners_keep_the_resolution_where_asked(aligner):
    assert aligner(4, 12, 0)(torch.randn(1, 4, 8, 8)).shape == (1, 12, 8, 8)


def test_initial_values():
    torch.manual_seed(0)
    model = timm.create_model('resnet32_shike')
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 5000:
            fan_in = module.weight[0].numel()
            assert float(module.weight.detach().std()) == pytest.approx((2 / fan_in) ** 0.5, rel=0.06)
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()
    first, second = (expert.stage[0].conv1.weight for expert in list(model.experts)[:2])
    assert not torch.equal(first, second)


def test_cosine_classifier():
    model = timm.create_model('resnet32_shike', num_classes=5)
    features = torch.randn(4, 3, 64)
    cosine = nn.functional.cosine_similarity(features[:, :, None], model.classifier.weight, dim=-1)
    assert torch.allclose(model.classifier(features), 30 * cosine, atol=1e-4)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert model.classifier(features).dtype == torch.float32


@pytest.mark.parametrize('change', [
    lambda model: model, lambda model: setattr(model.classifier, 'scale', 10.),
    lambda model: (setattr(model.classifier, 'scale', 10.), model.set_experts([2, 1]))])
def test_a_saved_model_keeps_its_cosine_scale(tmp_path, change):
    model = timm.create_model('resnet32_shike', num_classes=5, cosine_scale=20).eval()
    assert model.classifier.scale == 20
    model.reset_classifier(5, cosine_scale=16)
    assert model.classifier.scale == 16
    change(model)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    assert loaded.classifier.scale == model.classifier.scale and torch.equal(loaded(images), model(images))
    model = timm.create_model('resnet32_shike', num_classes=0, cosine_scale=20)
    assert model._model_args['cosine_scale'] == 20  # without classifiers too, for those to come


def test_numpy_integers(tmp_path):
    model = timm.create_model(
        'resnet32_shike', num_classes=np.int64(5), num_experts=np.int32(2), depths=np.array([2, 1]))
    assert (model.num_classes, model.num_experts, model.depths) == (5, 2, (2, 1))
    model.reset_classifier(np.int64(4))
    model.set_experts(np.array([1]))
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert (loaded.num_classes, loaded.num_experts, loaded.depths) == (4, 1, (1,))
    for wrong in ([True], [1.], ['0']):
        with pytest.raises(ValueError, match='experts must be different numbers'):
            model.set_experts(wrong)


@pytest.mark.parametrize('num_experts, hint', [(2, r'num_experts=3, then model.set_experts\(\[0, 1\]\)'), (4, '=3.$')])
def test_weights_of_another_number_of_experts(num_experts, hint):
    with pytest.raises(ValueError, match=f'weights are of 3 experts, not of {num_experts}: .*{hint}'):
        timm.create_model('resnet32_shike', pretrained=True, num_experts=num_experts)


def test_linear_classifier():
    model = timm.create_model('resnet32_shike', num_classes=5, classifier='linear')
    features = torch.randn(4, 3, 64)
    for m in range(3):
        expected = nn.functional.linear(features[:, m], model.classifier.weight[m], model.classifier.bias[m])
        assert torch.allclose(model.classifier(features)[:, m], expected, atol=1e-5)


@pytest.mark.parametrize('num_classes', [-1, 3.5, '7', True])
def test_a_wrong_number_of_classes_changes_nothing(num_classes):
    model = timm.create_model('resnet32_shike', num_classes=4)
    with pytest.raises(ValueError, match='num_classes must be a whole number'):
        model.reset_classifier(num_classes)
    assert model.num_classes == 4 and model(torch.randn(1, 3, 32, 32)).shape == (1, 4)


def test_dropout_acts_in_training_only():
    model = timm.create_model('resnet32_shike', drop_rate=0.5).eval()
    features = torch.ones(2, 192, 4, 4)
    assert (model.forward_head(features, pre_logits=True) == 1).all()
    assert (model.train().forward_head(features, pre_logits=True) == 0).any()


@pytest.mark.parametrize('arguments, message', [
    (dict(num_experts=0), 'num_experts must be a whole number of at least 1, got 0'),
    (dict(num_experts=1.5), 'num_experts must be a whole number of at least 1, got 1.5'),
    (dict(private_stages=-1), 'private_stages must be a whole number of at least 0, got -1'),
    (dict(private_stages=3), 'private_stages of the CIFAR ResNet must be 1 or 2, got 3'),
    (dict(backbone='resnet18', private_stages=4), "private_stages of 'resnet18' must be 1 to 3, got 4"),
    (dict(depths=(1, 3, 1)), r'between 1 and 2, .* got \(1, 3, 1\)'),
    (dict(depths=(0, 1, 1)), r'got \(0, 1, 1\)'),
    (dict(depths=(1, 2)), 'one shared stage for each of 3 experts'),
    (dict(classifier='tree'), "cosine, linear, got 'tree'"),
    (dict(cosine_scale=0), 'cosine_scale must be above 0 .* got 0 with cosine'),
    (dict(cosine_scale=20, classifier='linear'), 'got 20 with linear'),
    (dict(aligner='none'), "conv, bottleneck, separable, got 'none'"),
    (dict(global_pool='catavgmax'), "got 'catavgmax'"),
    (dict(global_pool=''), "global_pool ''.*num_classes=0"),
])
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model('shike' if 'backbone' in arguments else 'resnet32_shike', **arguments)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_cosines_of_half_precision_are_those_of_float32(dtype):
    """Also of features that are all zero, and of those whose norm float16 does not hold."""
    classifier = CLASSIFIERS['cosine'](2, 64, 5)
    features = torch.randn(4, 2, 64)
    features[0] = 0.
    features[1] *= 9_000
    logits = classifier(features)
    assert not logits[0].any() and logits[1].abs().max() > 1
    half = CLASSIFIERS['cosine'](2, 64, 5).to(dtype)
    half.load_state_dict(classifier.state_dict())
    for given in (features, features.to(dtype)):
        found = half(given)
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), logits, atol=0.3, rtol=0)


@pytest.mark.parametrize('classifier', list(CLASSIFIERS))
def test_symbolic_tracing(classifier):
    model = timm.create_model('resnet32_shike', num_classes=5, classifier=classifier).eval()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(images), model(images), atol=0, rtol=0)
    extractor = create_feature_extractor(model, ['stages.0', 'classifier'])
    with torch.no_grad():
        found = extractor(images)
        torch.testing.assert_close(found['classifier'].mean(1), model(images), atol=0, rtol=0)


def test_weights_of_the_classifiers_alone_leave_the_heads_of_experts():
    model = timm.create_model('shike', backbone='test_convnext', num_classes=4).eval()
    images = torch.randn(1, 3, 64, 64)
    before = model(images)
    model.load_state_dict({k: v for k, v in model.state_dict().items() if k.startswith('classifier')}, strict=False)
    torch.testing.assert_close(model(images), before)


def test_an_option_is_not_given_as_an_argument_of_the_network_too():
    config = parse_train_args(['--model', 'resnet32_shike', '--model-kwargs', 'drop_path_rate=0.1'])
    with pytest.raises(InputError, match='--model-kwargs drop_path_rate has an option of its own'):
        create_model(config, 4)


def test_a_patch_size_that_does_not_divide_the_image_is_refused():
    with pytest.raises(ValueError, match='divisible by patch size'):
        timm.create_model('shike', backbone='test_vit', img_size=100)
