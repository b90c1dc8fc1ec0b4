"""A frozen trunk: what it saves, and that nothing else changes."""
import copy

import pytest
import timm
import torch

import shike_timm
from shike_timm.cli.train import parse_train_args
from shike_timm.pretrained.load import load_trained_model
from shike_timm.training.runs import train


def saved_bytes(model, images):
    """Bytes of the tensors that a step keeps for its backward pass, each storage once, without parameters."""
    kept, own = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model.forward_experts(images).square().mean()
    loss.backward()
    return sum(kept.values())


@pytest.mark.parametrize('backbone', ['test_resnet', 'test_vit', 'test_convnext'])
def test_a_frozen_trunk_keeps_no_activations(backbone):
    torch.manual_seed(0)
    model = shike_timm.shike(backbone, num_classes=5, num_experts=2, fusion='residual').eval()
    images = torch.randn(2, 3, *model.pretrained_cfg['input_size'][1:])
    whole, frozen = copy.deepcopy(model), copy.deepcopy(model)
    frozen.freeze_trunk()
    trunk, outputs = (*frozen.stem.modules(), *frozen.stages.modules()), []
    for module in trunk:
        module.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    assert saved_bytes(frozen, images.requires_grad_()) < saved_bytes(whole, images.detach())
    assert outputs and not any(
        one.requires_grad for output in outputs for one in (output if isinstance(output, tuple) else (output,))
        if isinstance(one, torch.Tensor))
    assert images.grad is None
    for (name, own), expected in zip(frozen.named_parameters(), whole.parameters()):
        if name.startswith(('stem', 'stages')):
            assert own.grad is None and not own.requires_grad
        else:
            torch.testing.assert_close(own.grad, expected.grad, msg=name)
    frozen.set_grad_checkpointing()
    torch.testing.assert_close(frozen(images), model(images))


def test_a_frozen_trunk_compiles_and_exports_as_before():
    torch.manual_seed(0)
    model = shike_timm.shike('test_resnet', num_classes=5)
    model.freeze_trunk()
    images = torch.randn(2, 3, 32, 32)
    explained = torch._dynamo.explain(model)(images)
    assert explained.graph_break_count == 0
    torch._dynamo.reset()
    model.eval()
    with timm.layers.set_scriptable(True):
        scriptable = shike_timm.shike('test_resnet', num_classes=5)
    scriptable.load_state_dict(model.state_dict())
    scriptable.freeze_trunk()
    scripted = torch.jit.script(scriptable.eval())
    torch.testing.assert_close(scripted(images), model(images))
    program = torch.export.export(model, (images,))
    torch.testing.assert_close(program.module()(images), model(images))


def test_the_recipe_of_a_vit(tmp_path):
    torch.manual_seed(0)
    torch.save(timm.create_model('test_vit').state_dict(), tmp_path / 'weights.pth')
    metrics = train(parse_train_args([
        '--hparams', 'finetune_vit', '--backbone', 'test_vit', '--pretrained-backbone', str(tmp_path / 'weights.pth'),
        '--dataset', 'digits_lt', '--imb-factor', '20', '--img-size', '32', '--batch-size', '64', '--epochs', '1',
        '--crt-epochs', '1', '--workers', '0', '--device', 'cpu', '--output', str(tmp_path), '--experiment', 'run']))
    assert metrics['stage_two']['balanced'] > 20
    model = load_trained_model(str(tmp_path / 'run')).model
    assert model.fusion == 'none' and model.num_experts == 1 and model.classifier.scale == 25
