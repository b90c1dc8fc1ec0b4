"""Low-rank updates: what they train, what is saved, and how a run goes on."""
import json

import pytest
import timm
import torch

import shike_timm
from shike_timm.checkpoints import load_checkpoint
from shike_timm.cli.eval import parse_eval_args
from shike_timm.cli.train import parse_train_args
from shike_timm.errors import InputError
from shike_timm.models.lora import add_lora, merge_lora
from shike_timm.pretrained.load import load_trained_model
from shike_timm.report.evaluate import evaluate_model
from shike_timm.training.runs import train
from shike_timm.training.trainer import Trainer


@pytest.mark.parametrize('freeze', [False, True])
def test_what_is_trained(freeze, caplog):
    caplog.set_level('INFO')
    torch.manual_seed(0)
    model = shike_timm.shike('test_vit', num_classes=5, num_experts=2, private_blocks=1).eval()
    images = torch.randn(2, 3, *model.pretrained_cfg['input_size'][1:])
    names, before = set(model.state_dict()), model.forward_experts(images)
    if freeze:
        model.freeze_trunk()
    add_lora(model, 2, images.shape[1:])
    torch.testing.assert_close(model.forward_experts(images), before, rtol=0, atol=0)
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model.forward_experts(images).square().mean().backward()
        optimizer.step()
    learnt = {name for name, one in model.named_parameters() if one.grad is not None and one.grad.any()}
    assert {name.split('.lora_')[0].split('.')[-1] for name in learnt if '.lora_' in name} == {
        'qkv', 'proj', 'fc1', 'fc2'}
    assert any(name.startswith('stages') for name in learnt) != freeze
    assert all('.lora_' in name or '.aligner.' in name or name.startswith('classifier') for name in learnt)
    assert 'classifier.weight' in learnt and any('.aligner.up' in name for name in learnt)
    layers = 4 * (2 if freeze else 2 + len(model.stages))
    assert f'rank 2 in {layers} of {layers} linear layers' in caplog.text
    after = model.forward_experts(images)
    merge_lora(model)
    assert set(model.state_dict()) == names
    torch.testing.assert_close(model.forward_experts(images), after)
    assert not torch.allclose(after, before, atol=1e-3)


def test_a_layer_that_is_never_called_gets_no_update(caplog):
    """BEiT reads the weights of `qkv` without a call."""
    caplog.set_level('INFO')
    model = shike_timm.shike(
        'beit_base_patch16_224', num_classes=5, private_blocks=1, depth=3, embed_dim=24, num_heads=2)
    add_lora(model, 2, (3, 224, 224))
    assert 'rank 2 in 15 of 20 linear layers' in caplog.text
    assert not any('qkv.lora' in name for name in model.state_dict())


def test_a_network_without_linear_layers():
    with pytest.raises(InputError, match='none to train'):
        add_lora(shike_timm.shike('test_resnet', num_classes=5), 2, (3, 32, 32))


@pytest.fixture
def options(tmp_path):
    torch.manual_seed(0)
    torch.save(timm.create_model('test_vit').state_dict(), tmp_path / 'weights.pth')
    return [
        '--hparams', 'finetune_lora', '--backbone', 'test_vit', '--pretrained-backbone', str(tmp_path / 'weights.pth'),
        '--private-blocks', '1', '--dataset', 'digits_lt', '--imb-factor', '20', '--img-size', '32', '--batch-size',
        '64', '--epochs', '2', '--crt-epochs', '1', '--workers', '0', '--device', 'cpu', '--experiment', 'run']


def test_a_run_saves_ordinary_models_and_goes_on(options, tmp_path, monkeypatch):
    whole = train(parse_train_args([*options, '--output', str(tmp_path / 'whole')]))
    run = tmp_path / 'whole' / 'run'
    plain = shike_timm.shike('test_vit', num_classes=10, private_blocks=1, img_size=(32, 32), fusion='residual')
    assert set(load_trained_model(str(run)).model.state_dict()) == set(plain.state_dict())
    for phase in whole:
        last = run / phase / 'last.pth.tar'
        assert any('.lora_' in name for name in load_checkpoint(last)['state_dict']) == (phase == 'stage_one')
        figures = evaluate_model(parse_eval_args(['--checkpoint', str(last), '--device', 'cpu', '--workers', '0']))
        assert figures['top1'] == pytest.approx(whole[phase]['top1'], abs=0.3)
    original = Trainer.train_epoch

    def dies(self, epoch, done):
        if (self.phase.number, epoch) == (1, 1):
            raise KeyboardInterrupt
        return original(self, epoch, done)

    monkeypatch.setattr(Trainer, 'train_epoch', dies)
    with pytest.raises(KeyboardInterrupt):
        train(parse_train_args([*options, '--output', str(tmp_path)]))
    monkeypatch.setattr(Trainer, 'train_epoch', original)
    train(parse_train_args(['--resume', str(tmp_path / 'run')]))
    for name in ('whole/run', 'run'):
        metrics = json.loads((tmp_path / name / 'metrics.json').read_text())
        assert all(metrics[phase]['top1'] == whole[phase]['top1'] for phase in whole)
        assert all(metrics[phase]['loss'] == whole[phase]['loss'] for phase in whole)
