"""Transformers as backbones: columns of blocks, sizes of images and patches, exports of a run."""
import copy
import json

import pytest
import timm
import torch
from timm.models import get_model_input_config

import shike_timm
from shike_timm.checkpoints import load_checkpoint
from shike_timm.report import page
from shike_timm.report.cam import expert_maps

VIT = 'test_vit3'  # timm's own for tests: 9 blocks, 3 register tokens, no class token, attention pooling
SMALL_VIT = dict(backbone='vit_tiny_patch16_224', embed_dim=48, num_heads=3, img_size=32)


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    torch.manual_seed(0)
    plain = timm.create_model('test_vit').eval()
    path = tmp_path_factory.mktemp('weights') / 'vit.pth'
    torch.save(plain.state_dict(), path)
    return path, plain


def test_a_column_is_shared_up_to_its_last_sixth():
    model = timm.create_model('shike', **SMALL_VIT)
    assert len(model.stages) == 10 and model.depths == (8, 9, 10) and model.fusion == 'residual'
    assert [info['module'] for info in model.feature_info[-2:]] == ['stages.9', 'experts']
    deep = timm.create_model('shike', **SMALL_VIT, depth=24, private_blocks=3, num_experts=4)
    assert len(deep.stages) == 21 and deep.depths == (15, 17, 19, 21)
    assert timm.create_model('shike', **SMALL_VIT, num_experts=1).depths == (10,)
    decayed = [name for name, _ in model.named_parameters() if name in model.no_weight_decay()]
    assert decayed == ['stem.cls_token', 'stem.pos_embed']
    for options, message in (
            (dict(private_stages=1), 'is made of blocks: give private_blocks in place of private_stages'),
            (dict(private_blocks=12), r'private_blocks of .* must be 1 to 11, got 12'),
            (dict(fusion='product'), "gives tokens: use 'residual'"),
            (dict(depths=(1, 2, 11)), 'numbers between 1 and 10'),
    ):
        with pytest.raises(ValueError, match=message):
            timm.create_model('shike', **dict(SMALL_VIT, **options))
    for name in ('resnet32_shike', 'shike'):
        with pytest.raises(ValueError, match='made of stages: give private_stages in place of private_blocks'):
            timm.create_model(name, private_blocks=1)
    with pytest.raises(ValueError, match="global_pool must be '' or 'token'"):
        model.reset_classifier(3, 'avg')


def test_one_vector_is_fused_into_all_tokens(weights):
    model = shike_timm.shike('test_vit', pretrained_backbone=weights[0], num_classes=3).eval()
    images, expert = torch.randn(2, 3, 160, 160), model.experts[1]
    with torch.no_grad():
        x, shared = model._forward_trunk(images)
        own, tokens = expert.stage(x), shared[expert.depth]
        assert torch.equal(expert(x, shared), own)  # at the start an expert is its backbone
        torch.nn.init.normal_(expert.aligner.up.weight)
        aligner = expert.aligner
        vector = torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=1)
        factor = aligner.up(torch.nn.functional.gelu(aligner.down(aligner.norm(vector))))
        torch.testing.assert_close(expert(x, shared), own * (1 + factor[:, None]))
        assert sorted(shared) == sorted(set(model.depths))  # no other features are kept


def test_positions_are_resampled_when_weights_load(weights):
    path, plain = weights
    resized = timm.create_model('test_vit', img_size=64, pretrained=True, pretrained_cfg_overlay=dict(
        file=str(path)), num_classes=0).eval()
    model = shike_timm.shike(
        'test_vit', img_size=64, pretrained_backbone=path, num_experts=1, fusion=False, num_classes=0).eval()
    assert get_model_input_config(model)['input_size'] == (3, 64, 64)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(images), resized(images))
        assert not torch.equal(model.stem.pos_embed, plain.pos_embed)
        fixed, dynamic = (
            timm.create_model('shike', **SMALL_VIT, dynamic_img_size=dynamic).eval() for dynamic in (False, True))
        assert dynamic(images).shape == (2, 1000)
        with pytest.raises(AssertionError, match='64'):
            fixed(images)
    assert fixed._traits['fixed_input_size'] and not dynamic._traits['fixed_input_size']
    other = timm.create_model('shike', **SMALL_VIT, patch_size=8, reg_tokens=2, drop_path_rate=0.2)
    assert other.num_prefix_tokens == 3 and other.forward_features(images[..., :32, :32]).shape[1] == 3 + 16
    assert max(m.drop_prob for m in other.modules() if isinstance(m, timm.layers.DropPath)) == pytest.approx(0.2)


def test_weights_from_before_experts_had_heads_load():
    """ConvNeXt has a norm between pooling and classifier, which earlier versions left out."""
    model = shike_timm.shike('test_convnext', num_classes=3)
    old = {name: value for name, value in model.state_dict().items() if '.head.' not in name}
    assert len(old) < len(model.state_dict())
    images, new = torch.randn(2, 3, 64, 64), copy.deepcopy(model).eval()
    model.eval().load_state_dict(old)
    with torch.no_grad():
        features = model.forward_features(images).mean((2, 3))
        torch.testing.assert_close(model(images), model.classifier(features.unflatten(1, (3, -1))).mean(1))
        assert not torch.allclose(model(images), new(images))


def test_a_graph_without_breaks():
    torch._dynamo.reset()
    model = timm.create_model('shike', **SMALL_VIT, num_classes=3)
    explained = torch._dynamo.explain(model.forward_experts)(torch.randn(2, 3, 32, 32))
    assert explained.graph_break_count == 0 and explained.graph_count == 1


@pytest.mark.slow
def test_a_run_with_a_transformer(tmp_path, run_script, image_folder, weights, monkeypatch):
    """From training over evaluation, prior, report and exports to prediction: always the same answer."""
    monkeypatch.setattr(page, 'DRAWINGS', {})  # they take seconds
    device = ['--workers', '0', '--device', 'cpu']
    status, _, err = run_script(
        'train', '--model', 'shike', '--backbone', 'test_vit', '--pretrained-backbone', weights[0], '--img-size', '32',
        '--private-blocks', '2', '--freeze-trunk', '--layer-decay', '0.9', '--data-dir', image_folder, '--epochs', '2',
        '--warmup-epochs', '0', '--crt-epochs', '1', '--batch-size', '8', '--output', tmp_path, '--experiment', 'run',
        *device)
    assert status == 0, err
    state = load_checkpoint(tmp_path / 'run' / 'stage_two' / 'last.pth.tar')['state_dict']
    assert torch.equal(state['stages.0.0.attn.qkv.weight'], weights[1].blocks[0].attn.qkv.weight)
    top1 = json.loads((tmp_path / 'run' / 'metrics.json').read_text())['stage_two']['top1']
    model = timm.create_model(f'local-dir:{tmp_path}/run/model', pretrained=True).eval()
    assert len(model.stages) == 4 and get_model_input_config(model)['input_size'] == (3, 32, 32)
    status, _, err = run_script(
        'eval', '--model', tmp_path / 'run', '--data-dir', image_folder, '--results-file', tmp_path / 'eval.json',
        '--report', tmp_path / 'report', '--cam', image_folder / 'validation' / 'ant', *device)
    assert status == 0 and json.loads((tmp_path / 'eval.json').read_text())['top1'] == top1, err
    status, _, err = run_script(
        'eval', '--model', tmp_path / 'run', '--data-dir', image_folder, '--img-size', '48', *device)
    assert (status == 0) != model._traits['fixed_input_size'], err
    images = sorted(str(path) for path in (image_folder / 'validation').rglob('*.png'))
    own = [row['label'][0] for row in shike_timm.predict(
        images, model=str(tmp_path / 'run'), device='cpu', workers=0)]
    assert sum(path.split('/')[-2] == label for path, label in zip(images, own)) / len(images) == (
        pytest.approx(top1 / 100, abs=1e-4))
    for file_format in ('onnx', 'torch-export'):
        status, _, err = run_script(
            'export', '--model', tmp_path / 'run', '--format', file_format, '--output', tmp_path / file_format)
        assert status == 0, err
    exported = shike_timm.predict(images, model=str(tmp_path / 'onnx'), device='cpu', workers=0)
    assert [row['label'][0] for row in exported] == own
    maps = expert_maps(model, torch.randn(2, 3, 32, 32), [0, 1])
    assert maps.shape == (2, 3, 32, 32) and maps.max() == pytest.approx(1, abs=1e-5)
    model.set_target_prior('train')
    model.set_experts([2, 0])
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 3)
