"""Bad input: status 2, one sentence that names the wrong value, and unchanged files."""
import os
import pickle
import shutil

import pytest
import timm
import torch
from conftest import TINY

from shike_timm.checkpoints import load_checkpoint, model_weights
from shike_timm.errors import one_line
from shike_timm.pretrained.folder import export_model


def snapshot(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob('*') if path.is_file()}


@pytest.fixture
def refused(run_script, tmp_path):
    """Check that a script refuses its arguments, names `value`, and touches nothing."""
    (tmp_path / 'out').mkdir(exist_ok=True)

    def check(value, script, *argv):
        before = snapshot(tmp_path)
        status, out, error = run_script(script, *argv)
        assert status == 2, error
        assert str(value) in error
        lines = error.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith(f'shike {script}: error: ')
        assert not out
        assert snapshot(tmp_path) == before
        assert not list((tmp_path / 'out').iterdir())

    return check


@pytest.mark.parametrize('value, argv', [
    ("model 'resnet32_shyke'", ['--model', 'resnet32_shyke']),
    ("model 'resnet50'", ['--model', 'resnet50']),
    ("data-dir '/nowhere'", ['--dataset', '', '--imb-factor', '100', '--data-dir', '/nowhere']),
    ("'/nowhere'", ['--dataset', 'cifar100_lt', '--data-dir', '/nowhere']),
    ('--num-classes 7', ['--num-classes', '7']),
    ('got (1, 9, 1)', ['--depths', '1', '9', '1']),
    ('private_stages of the CIFAR ResNet must be 1 or 2, got 3', ['--private-stages', '3']),
    ('class 7 with no training image', ['--imb-factor', '500']),
    ("'digits_lt' has images of 3 channels, not of 1", ['--in-chans', '1']),
    ('--clip-grad -1.0 ', ['--clip-grad', '-1']),
    ('--crt-cosine-scale 20 ', ['--crt-cosine-scale', '20', '--classifier', 'linear']),
    ('--head-init means would average', ['--head-init', 'means']),
    ('got 16.0 with linear ones', ['--cosine-scale', '16', '--classifier', 'linear']),
    ('--mixup 0.2', ['--mixup', '0.2']),
    ('--amp-dtype float16', ['--amp', '--amp-dtype', 'float16']),
    ('--epocs', ['--epocs', '3']),
    ("device 'abacus'", ['--device', 'abacus']),
    ("optimizer 'sdg'", ['--opt', 'sdg']),
    ("--torchcompile 'gcc'", ['--torchcompile', 'gcc']),
    ('--mean has 2', ['--mean', '0.5', '0.5']),
    ("aa 'wild'", ['--aa', 'wild']),
    ("model 'resnet32_shike.foo'", ['--model', 'resnet32_shike.foo']),
    ("names weights", ['--model', 'resnet32_shike.cifar100_lt_if100']),
    ('--holdout 1.0 ', ['--holdout', '1']),
    ('holdout 0.95 leaves class ', ['--holdout', '0.95']),
    ("--kd-model-name 'nothing' cannot teach: Unknown model", ['--kd-model-name', 'nothing']),
    ("--kd-model-name 'local-dir:/nowhere' cannot teach", ['--kd-model-name', 'local-dir:/nowhere']),
    ('has 100 classes, the data has 10', ['--kd-model-name', 'resnet32_shike.paper_cifar100_lt_if100']),
    ("'/nowhere' holds no run", ['--resume', '/nowhere']),
])
def test_train_arguments(refused, tmp_path, value, argv):
    refused(value, 'train', *TINY, '--output', tmp_path / 'out', *argv)


def test_hparams_files(refused, tmp_path):
    (tmp_path / 'bad.yaml').write_text('epoch: 3\n')
    refused("unknown key 'epoch'", 'train', '--hparams', tmp_path / 'bad.yaml', '--output', tmp_path / 'out')


def test_data_folders(refused, tmp_path, image_folder):
    data = ['--dataset', '', '--imb-factor', '100', '--data-dir', image_folder, '--output', tmp_path / 'out']
    (image_folder / 'train' / 'cat').rename(image_folder / 'train' / 'dog')
    refused("Class 'cat'", 'train', *TINY, *data)
    (tmp_path / 'empty').mkdir()
    refused(tmp_path / 'empty', 'train', *TINY, *data, '--data-dir', tmp_path / 'empty')


def test_damaged_cifar(refused, tmp_path, cifar_root):
    folder = tmp_path / 'cifar-100-python'
    folder.mkdir()
    for name in ('train', 'meta'):
        (folder / name).symlink_to((cifar_root / 'cifar-100-python' / name).resolve())
    (folder / 'test').write_bytes(b'not the test images')
    refused(
        folder / 'test', 'train', *TINY, '--dataset', 'cifar100_lt', '--data-dir', tmp_path,
        '--output', tmp_path / 'out')


class Payload:
    def __reduce__(self):
        return os.abort, ()


def test_checkpoints(refused, tmp_path, tiny_run):
    good = tiny_run / 'stage_one' / 'last.pth.tar'
    truncated, pickled, bare = tmp_path / 'truncated.pth.tar', tmp_path / 'pickled.pth.tar', tmp_path / 'bare.pth.tar'
    truncated.write_bytes(good.read_bytes()[:100_000])
    torch.save({'state_dict': {}, 'extra': Payload()}, pickled)
    legacy = tmp_path / 'legacy.pth.tar'
    legacy.write_bytes(pickle.dumps(Payload()))
    torch.save({'state_dict': {}}, bare)
    for path, value in ((truncated, 'truncated'), (pickled, 'pickled object'), (legacy, 'pickled object')):
        for script in ('retrain-classifier', 'eval'):
            extra = ['--output', tmp_path / 'out'] if script == 'retrain-classifier' else []
            refused(f"'{path}' ", script, '--checkpoint', path, '--dataset', 'digits_lt', *extra)
            refused(value, script, '--checkpoint', path, '--dataset', 'digits_lt', *extra)
    refused('bare.pth.tar', 'eval', '--checkpoint', bare, '--dataset', 'digits_lt')
    refused('gone.pth.tar', 'eval', '--checkpoint', tmp_path / 'gone.pth.tar', '--dataset', 'digits_lt')
    refused(
        "'experts.0.aligner.0.weight'", 'retrain-classifier', '--checkpoint', good, '--no-fusion',
        '--output', tmp_path / 'out')
    refused(
        "residual differs from stage one's, product", 'retrain-classifier', '--checkpoint', good, '--fusion-type',
        'residual', '--output', tmp_path / 'out')
    refused(
        'No class of the evaluation data is in the division of', 'retrain-classifier', '--checkpoint', good,
        '--eval-metric', 'few', '--few-shot', '1', '--output', tmp_path / 'out')


@pytest.mark.parametrize('options', [['--holdout', '0.1'], ['--holdout', '0.1', '--imb-factor', '10']])
def test_holding_out_what_stage_one_has_seen(refused, tmp_path, tiny_run, options):
    refused(
        'would evaluate on images that stage one was trained on', 'retrain-classifier', '--checkpoint', tiny_run,
        '--output', tmp_path / 'out', *options)


def test_teachers_that_do_not_fit(refused, tmp_path, tiny_run):
    def teacher(model, labels, counts=None):
        folder = tmp_path / 'teacher'
        export_model(model, folder, timm.data.resolve_model_data_config(model), labels, counts or [])
        return f'local-dir:{folder}'

    def check(value, name, *options):
        refused(value, 'train', *TINY, '--output', tmp_path / 'out', '--kd-model-name', name, *options)

    digits = [str(digit) for digit in range(10)]
    resnet = timm.create_model('resnet10t', num_classes=10)
    check("calls class 3 'x', which the data does not have", teacher(resnet, [*digits[:3], 'x', *digits[4:]]))
    check('the images that --holdout keeps', teacher(resnet, digits), '--holdout', '0.1')
    check('the images that --holdout keeps', f'local-dir:{tiny_run}/model', '--holdout', '0.1')
    check(
        'cannot teach: Input height (8) should be divisible by patch size (16)',
        teacher(timm.create_model('test_vit', num_classes=10, img_size=32), digits))


@pytest.mark.parametrize('old', [False, True])
def test_resuming_with_a_teacher(run_script, tmp_path, tiny_run, old):
    shutil.copytree(tiny_run / 'stage_one', tmp_path / 'run' / 'stage_one')
    if old:  # from a version without teachers
        path = tmp_path / 'run' / 'stage_one' / 'last.pth.tar'
        checkpoint = load_checkpoint(path)
        del checkpoint['args'].kd_model_name
        torch.save(checkpoint, path)
    before = snapshot(tmp_path)
    status, _, error = run_script(
        'train', *TINY, '--resume', tmp_path / 'run', '--kd-model-name', f'local-dir:{tiny_run}/model')
    assert status == 2 and '--kd-model-name' in error and "differs from the resumed run's None" in error
    assert snapshot(tmp_path) == before


def test_resuming_with_another_model(run_script, tmp_path, tiny_run):
    shutil.copytree(tiny_run / 'stage_one', tmp_path / 'run' / 'stage_one')
    before = snapshot(tmp_path)
    status, _, error = run_script('train', *TINY, '--resume', tmp_path / 'run', '--num-experts', '2')
    assert status == 2 and '--num-experts 2 differs' in error and len(error.strip().splitlines()) == 1
    assert snapshot(tmp_path) == before


def test_output_folders(run_script, tmp_path, tiny_run):
    before = snapshot(tiny_run)
    status, _, error = run_script('train', *TINY, '--output', tiny_run.parent)
    assert status == 2 and f"'{tiny_run}' already holds a run" in error
    assert snapshot(tiny_run) == before
    (tmp_path / 'file').write_text('kept')
    status, _, error = run_script('train', *TINY, '--output', tmp_path / 'file')
    assert status == 2 and f"'{tmp_path / 'file' / 'run'}' cannot be written" in error
    assert (tmp_path / 'file').read_text() == 'kept'


@pytest.mark.parametrize('value, argv', [
    ('either as --model or as --checkpoint', []),
    ("model 'local-dir:/nowhere'", ['--model', 'local-dir:/nowhere']),
    ("model 'resnet50_shike'", ['--model', 'resnet50_shike', '--pretrained']),
    ("Class '0'", ['--model', 'resnet32_shike', '--pretrained']),
    ("model 'resnet18'", ['--model', 'resnet18']),
    ("model 'local-dir:", ['--model', 'local-dir:PICKLED']),
    ("results-file '/nowhere/x.json'", ['--model', 'resnet32_shike', '--results-file', '/nowhere/x.json']),
    ("results-file '/' is a folder", ['--model', 'resnet32_shike', '--results-file', '/']),
    ("save-logits '/nowhere/x.npz'", ['--model', 'resnet32_shike', '--save-logits', '/nowhere/x.npz']),
])
def test_eval_arguments(refused, value, argv, tmp_path):
    if argv[-1:] == ['local-dir:PICKLED']:
        (tmp_path / 'config.json').write_text('{"architecture": "resnet32_shike", "pretrained_cfg": {}}')
        (tmp_path / 'pytorch_model.bin').write_bytes(pickle.dumps(Payload()))
        argv = ['--model', f'local-dir:{tmp_path}']
    refused(value, 'eval', '--dataset', 'digits_lt', '--workers', '0', '--device', 'cpu', *argv)


def test_eval_of_a_pretrained_network_that_is_none_of_ours(refused, monkeypatch):
    create = timm.create_model
    monkeypatch.setattr(timm, 'create_model', lambda name, pretrained: create(name))  # nothing is downloaded
    refused("model 'resnet18' is a ResNet", 'eval', '--model', 'resnet18', '--pretrained', '--dataset', 'digits_lt')


def test_messages_of_others_become_one_line():
    assert one_line('first.\n  second. ') == 'first. second' and one_line('') == ''
    assert one_line(FileNotFoundError()) == 'FileNotFoundError'
    for text in ('word ' * 100, 'x' * 400):
        assert one_line(ValueError(text)) == text[:300] + ' [...]'


def test_an_average_comes_before_the_weights():
    keys = ('state_dict_ema', 'model_ema', 'state_dict', 'model')
    checkpoint = {key: dict(weight=torch.tensor(i)) for i, key in enumerate(keys)}
    for i, key in enumerate(keys):
        assert int(model_weights(checkpoint, 'file')['weight']) == i
        del checkpoint[key]


def test_processes_that_nobody_starts(refused, tmp_path, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '4')
    refused('4 processes are expected', 'train', *TINY, '--output', tmp_path / 'out')


def test_resuming_with_other_options(refused, tmp_path, tiny_run):
    tiny_run = shutil.copytree(tiny_run, tmp_path / 'run')
    refused('--opt adamw differs', 'train', '--resume', tiny_run, '--opt', 'adamw')
    refused('--weight-decay 0.0 differs', 'train', '--resume', tiny_run, '--weight-decay', '0')
    text = tmp_path / 'text.pth.tar'
    text.write_text('aa: null')
    refused('truncated or not a checkpoint', 'retrain-classifier', '--checkpoint', text)
    refused('--crt-epochs 0', 'train', '--resume', tiny_run, '--crt-epochs', '0')
    refused('is of stage one', 'train', '--resume', tiny_run / 'stage_one' / 'last.pth.tar')
    torch.save({'state_dict': {}}, tmp_path / 'weights.pth.tar')
    refused('not in the stage_one or stage_two of a run', 'train', '--resume', tmp_path / 'weights.pth.tar')
    (tmp_path / 'stage_one').mkdir()
    (tmp_path / 'weights.pth.tar').rename(tmp_path / 'stage_one' / 'last.pth.tar')
    refused('no state to resume from', 'train', *TINY, '--resume', tmp_path)
    refused('--crt-epochs 0', 'retrain-classifier', '--checkpoint', tiny_run, '--crt-epochs', '0')


def test_a_killed_worker_of_any_command_is_one_sentence(monkeypatch, run_script):
    def killed(args):
        raise RuntimeError('DataLoader worker (pid 7) is killed by signal: Killed. ')

    monkeypatch.setattr('shike_timm.cli.describe.describe_data', killed)
    status, _, error = run_script('describe', '--data-dir', 'x')
    assert status == 1 and 'A process that loads images is gone' in error and len(error.splitlines()) == 1
