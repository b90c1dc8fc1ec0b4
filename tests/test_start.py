"""Training that begins with weights of a SHIKE model, and classifiers retrained for other classes."""
import copy
import json
import shutil

import pytest
import safetensors.torch
import timm
import torch
import yaml

from shike_timm.checkpoints import load_checkpoint, model_weights
from shike_timm.cli.train import parse_train_args
from shike_timm.data.config import PreprocessingConfig
from shike_timm.errors import InputError
from shike_timm.models.config import ModelConfig
from shike_timm.models.create import create_model, structure
from shike_timm.pretrained.load import TrainedModel, load_trained_model, with_trained_options
from shike_timm.pretrained.start import load_start, start_from
from shike_timm.training.runs import train


def load_from(*argv):
    args = parse_train_args([str(part) for part in argv])
    return load_start(args, args)


SMALL = ['--model', 'resnet32_shike', '--epochs', '1', '--warmup-epochs', '0', '--crt-epochs', '1', '--workers', '0']


def test_every_source_of_weights(tiny_run, tmp_path):
    one = tiny_run / 'stage_one' / 'last.pth.tar'
    two = tiny_run / 'stage_two' / 'last.pth.tar'
    expected = {path: model_weights(load_checkpoint(path), path) for path in (one, two)}
    bare = tmp_path / 'bare.safetensors'
    safetensors.torch.save_file(expected[one], bare)
    for source in (one, bare, tiny_run, tiny_run / 'model' / 'model.safetensors', f'local-dir:{tiny_run}/model'):
        start = load_from('--model', 'resnet32_shike', '--initial-checkpoint', source)
        state = expected[one if source in (one, bare) else two]
        assert all(torch.equal(start.model.state_dict()[name], value) for name, value in state.items())
        assert start.name and start.model.fusion == 'product'
        assert (start.class_names is None) == (source == bare)
        if source != bare:
            assert tuple(start.options['mean']) == (0.4914, 0.4822, 0.4465)
    packaged = load_from('--model', 'resnet32_shike', '--pretrained')
    assert len(packaged.class_names) == 100 and packaged.options['input_size'] == [3, 32, 32]
    assert packaged.model.cosine_scale == 30
    sized = load_from('--initial-checkpoint', tiny_run, '--img-size', '16')
    assert not {'img_size', 'input_size'} & set(sized.options)
    for argv, message in (
            (['--initial-checkpoint', '/nowhere'], "initial-checkpoint '/nowhere' does not exist"),
            (['--initial-checkpoint', str(bare), '--pretrained'], 'both bring weights'),
            (['--initial-checkpoint', str(tiny_run), '--fusion-type', 'residual'], 'residual differs from that of'),
            (['--pretrained', '--model', 'resnet50_shike.untrained'], 'No weights are published')):
        with pytest.raises(InputError, match=message):
            load_from(*argv)


def test_bare_weights_are_of_the_model_that_the_options_describe(tmp_path, caplog):
    model = timm.create_model('resnet32_shike', num_classes=4, num_experts=2, classifier='linear')
    torch.save(model.state_dict(), tmp_path / 'bare.pth')
    argv = ['--model', 'resnet32_shike', '--num-experts', '2', '--initial-checkpoint', tmp_path / 'bare.pth']
    start = load_from(*argv, '--cosine-scale', '20')
    assert start.model.num_classes == 4 and start.model.classifier_type == 'linear' and start.options == {}
    with pytest.raises(InputError, match='is of another architecture'):
        load_from(*argv, '--num-experts', '3')
    scaled = timm.create_model('resnet32_shike', num_classes=4, cosine_scale=20)
    torch.save(scaled.state_dict(), tmp_path / 'bare.pth')
    start = load_from(*argv, '--num-experts', '3', '--cosine-scale', '20')
    start_from(timm.create_model('resnet32_shike', num_classes=4, cosine_scale=20), start, list('abcd'))
    assert not caplog.text


@pytest.mark.parametrize('kwargs', [
    dict(), dict(num_experts=2, depths=[2, 1], fusion=False, classifier='linear'),
    dict(fusion='residual', aligner='separable', cosine_scale=20.),
    dict(private_stages=0, num_experts=2, depths=[[3], [1, 3]], pad_type='same', global_pool='avg',
         output_stride=16),
], ids=['plain', 'linear', 'residual', 'levels'])
def test_the_structure_of_a_model_makes_it_again(kwargs):
    model = timm.create_model('shike', backbone='test_efficientnet', num_classes=4, **kwargs)
    made = create_model(ModelConfig(model='shike', classifier=kwargs.get('classifier'), **structure(model)), 4)
    names = 'num_experts', 'depths', 'fusion', 'classifier_type', 'cosine_scale'
    assert [getattr(made, name) for name in names] == [getattr(model, name) for name in names]
    made.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(made.eval()(images), model.eval()(images))


def test_classifiers_go_by_names(tiny_run, caplog):
    model, names = load_trained_model(str(tiny_run)).model, [str(digit) for digit in range(10)]
    start = TrainedModel('x', copy.deepcopy(model), class_names=names)
    weight = start.model.classifier.weight
    start_from(model, start, names[::-1])
    assert torch.equal(model.classifier.weight, weight.flip(1)) and not caplog.text
    start.model.cosine_scale = 20.
    start_from(model, start, names)
    assert 'a cosine scale of 20 and go on at 30: give --cosine-scale 20' in caplog.text
    fresh = model.classifier.weight.clone()
    start.class_names = [*names[:9], 'nine']
    start_from(model, start, names)
    assert torch.equal(model.classifier.weight, fresh) and "only one of the models has the class '9'" in caplog.text
    start_from(model, TrainedModel('x', timm.create_model('resnet32_shike', num_classes=7)), names)
    assert torch.equal(model.classifier.weight, fresh)
    with pytest.raises(InputError, match="'experts.2.*' it holds nothing"):
        start_from(model, TrainedModel('x', timm.create_model('resnet32_shike', num_experts=2)), names)


def test_a_run_from_a_model_of_other_classes(tiny_run, image_folder, tmp_path, caplog, run_script):
    shutil.copytree(tiny_run / 'model', tmp_path / 'residual')
    config = json.loads((tmp_path / 'residual' / 'config.json').read_text())
    config.setdefault('model_args', {})['fusion'] = 'residual'
    (tmp_path / 'residual' / 'config.json').write_text(json.dumps(config))
    options = [
        *SMALL, '--data-dir', str(image_folder), '--batch-size', '8', '--lr', '0', '--device', 'cpu', '--output',
        str(tmp_path), '--experiment', 'fine', '--initial-checkpoint', f'local-dir:{tmp_path}/residual']
    train(parse_train_args(options))
    assert 'classifiers of' in caplog.text and 'are left out' in caplog.text
    tuned = load_checkpoint(tmp_path / 'fine' / 'stage_one' / 'last.pth.tar')
    source = load_checkpoint(tiny_run / 'stage_two' / 'last.pth.tar')['state_dict']
    assert torch.equal(tuned['state_dict']['stem.0.weight'], source['stem.0.weight'])
    assert tuned['state_dict']['classifier.weight'].shape[1] == 3
    saved = yaml.safe_load((tmp_path / 'fine' / 'args.yaml').read_text())
    assert saved['fusion_type'] == 'residual'  # as the model has it, though the option was not given
    assert saved['input_size'] == [3, 8, 8] and saved['initial_checkpoint'].startswith('local-dir:')
    # The same command once more, with what the run found out by itself, and a longer schedule.
    assert train(parse_train_args([*options, '--resume'])).keys() == {'stage_one', 'stage_two'}
    status, _, error = run_script('train.py', '--resume', tmp_path / 'fine', '--epochs', '9')
    assert status == 2 and f"--initial-checkpoint {tmp_path / 'fine'}" in error


def test_classifiers_retrained_for_other_classes(tiny_run, image_folder, tmp_path, run_script):
    argv = [
        '--checkpoint', tiny_run, '--dataset', '', '--data-dir', image_folder, '--batch-size', '8', '--output',
        tmp_path, '--crt-epochs', '1']
    status, _, error = run_script('retrain_classifier.py', *argv)
    assert status == 2 and "Class 'ant'" in error and '--num-classes 3' in error
    status, _, error = run_script('retrain_classifier.py', *argv, '--num-classes', '3', '--experiment', 'other')
    assert status == 0, error
    model = load_trained_model(str(tmp_path / 'other'))
    assert model.class_names == ['ant', 'bee', 'cat'] and model.class_counts == [24, 12, 6]
    source = load_checkpoint(tiny_run / 'stage_one' / 'last.pth.tar')['state_dict']
    assert torch.equal(model.model.stem[0].weight, source['stem.0.weight'])
    status, _, error = run_script('retrain_classifier.py', '--checkpoint', tiny_run, '--num-classes', '10')
    assert status == 2 and 'leave it out' in error


def test_hparams_given_again_go_over_those_of_the_run(image_folder, tmp_path):
    shutil.rmtree(image_folder / 'validation')
    (tmp_path / 'mine.yaml').write_text(yaml.safe_dump(dict(batch_size=8, img_size=8, no_aug=True)))
    options = [
        *SMALL, '--hparams', str(tmp_path / 'mine.yaml'), '--data-dir', str(image_folder), '--output', str(tmp_path),
        '--experiment', 'run', '--device', 'cpu']
    metrics = train(parse_train_args(options))
    args = parse_train_args([*options, '--resume', '--validation-batch-size', '3', '--workers', '0'])
    assert args.holdout == 0.2 and args.batch_size == 8
    assert train(args) == metrics


def test_a_size_that_is_given_takes_the_place_of_either_of_training():
    trained = TrainedModel('x', timm.create_model('resnet32_shike'))
    trained.options = dict(img_size=None, input_size=[3, 16, 12], mean=[0.5])
    sized = with_trained_options(PreprocessingConfig(img_size=8), trained)
    assert (sized.img_size, sized.input_size, sized.mean) == (8, None, [0.5])
    assert with_trained_options(PreprocessingConfig(), trained).input_size == [3, 16, 12]


def test_arguments_of_timms_network(tmp_path):
    config = parse_train_args([
        '--model', 'shike', '--backbone', 'test_efficientnet', '--model-kwargs', 'pad_type=same', 'bn_eps=0.5'])
    model = create_model(config, 3, 3)
    assert {layer.eps for layer in model.stages.modules() if isinstance(layer, torch.nn.BatchNorm2d)} == {0.5}
