"""Files that are damaged, or contradict themselves or one another: one sentence, and nothing hangs or is lost."""
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT
from image_data import load

import shike_timm
from shike_timm.checkpoints import load_checkpoint
from shike_timm.data.split_lists import EVAL_LIST, TRAIN_LIST
from shike_timm.errors import InputError
from shike_timm.files import read_json
from shike_timm.pretrained.folder import export_model
from shike_timm.pretrained.load import load_trained_model
from shike_timm.recipes import read_yaml

EVAL = ['--dataset', 'digits_lt', '--imb-factor', '20', '--workers', '0', '--device', 'cpu']
BOMB = 'a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n' + ''.join(
    f'{here}: &{here} [{", ".join(["*" + before] * 10)}]\n' for before, here in zip('abcdefgh', 'bcdefghi'))


def write_tar(path, *members):
    with tarfile.open(path, 'w') as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_a_member_added_again_counts_once(make_images, tmp_path):
    root = make_images({'cat': 3, 'dog': 3})
    files = [(str(path.relative_to(root)), path.read_bytes()) for path in sorted(root.rglob('*.png'))]
    (first, _), (_, new) = files[0], files[-1]
    write_tar(tmp_path / 'data.tar', *files, (f'./{first}', new))
    data = load(tmp_path / 'data.tar')
    assert sorted([*data.train.filenames(), *data.test.filenames()]) == [name for name, _ in files]
    told = data.describe()
    assert told.count(f'1 files of the archive that a later one of the same name replaces ({first})') == 1
    images = [one.read(one.filenames().index(first)) for one in (data.train, data.test) if first in one.filenames()]
    assert len(images) == 1 and images[0].tobytes() == shike_timm.data.dataset.Image.open(io.BytesIO(new)).tobytes()


def test_sides_that_overlap_are_refused(tiny_run, image_folder, tmp_path, run_script):
    for name in (TRAIN_LIST, EVAL_LIST):
        (tmp_path / name).write_text('path,label\na.png,ant\n')
    with pytest.raises(InputError, match=r"'a.png' is in '.*train.csv' and in '.*validation.csv'"):
        load(image_folder, run_folder=tmp_path)
    for split in ('train', 'train/ant'):
        status, _, error = run_script(
            'train', '--model', 'resnet32_shike', '--data-dir', image_folder, '--val-split', split, '--device', 'cpu',
            '--output', tmp_path / 'out')
        assert status == 2 and f"--val-split '{split}' has images of --train-split 'train'" in error


@pytest.mark.parametrize('text, message', [
    ('', "its first line is not 'path,label'"), ('name,label\na,b\n', 'is not .path,label.'),
    ('path,label\na\n', 'not enough')])
def test_damaged_lists_of_a_run(image_folder, tmp_path, text, message):
    for name in (TRAIN_LIST, EVAL_LIST):
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        load(image_folder, run_folder=tmp_path)


def edited(tiny_run, tmp_path, change):
    """A model folder whose configuration is changed."""
    folder = shutil.copytree(tiny_run / 'model', tmp_path / 'model')
    config = json.loads((folder / 'config.json').read_text())
    change(config)
    (folder / 'config.json').write_text(json.dumps(config))
    return folder


def put(*path):
    *path, value = path

    def change(config):
        for key in path[:-1]:
            config = config[key]
        config[path[-1]] = value
    return change


@pytest.mark.parametrize('change, message', [
    (put('num_classes', 30), 'its class names are not one for each of 30 classes'),
    (put('model_args', 'num_classes', 30), 'it is of 10 classes and of 30'),
    (put('label_names', ['a'] * 10), 'two of its classes have the same name'),
    (put('label_names', list('abcdefghi')), 'class names are not one for each of 10'),
    (put('class_counts', [1] * 9 + [0]), 'class counts are not one for each of 10'),
    (put('shot_counts', ['1'] * 10), 'counts for the shots are not one for each of 10'),
    (put('model_args', 'num_experts', 2), 'is of 2 experts, but the weights beside it are of 3'),
    (put('pretrained_cfg', 'mean', ['x']), "'mean' is 'x'"),
    (put('pretrained_cfg', 'mean', [0.5, 0.5]), "'mean' has 2 values, expected 3"),
    (put('pretrained_cfg', 'std', [0.]), '--std 0.0 is out of range'),
    (put('pretrained_cfg', 'std', [float('nan')]), '--std nan is out of range'),
    (put('pretrained_cfg', 'interpolation', 'wild'), "'interpolation' is 'wild'"),
    (put('pretrained_cfg', 'input_size', [3, 10 ** 9, 8]), '--input-size 1000000000 is out of range'),
    (put('pretrained_cfg', []), "'pretrained_cfg' and 'model_args' must hold names and values"),
    (put('architecture', 'resnet18'), 'cannot be loaded'),
])
def test_a_model_that_contradicts_itself_is_refused_everywhere(tiny_run, tmp_path, run_script, change, message):
    folder = edited(tiny_run, tmp_path, change)
    with pytest.raises(InputError, match=message):
        load_trained_model(str(folder))
    if 'experts' in message:
        for script, *argv in (
                ('eval', '--model', folder, *EVAL), ('predict', ROOT, '--model', folder), ('export', '--model', folder),
                ('publish', folder, '--repo-id', 'a/b'),
                ('train', *EVAL, '--initial-checkpoint', folder, '--output', tmp_path / 'out')):
            status, out, error = run_script(script, *argv)
            assert status == 2 and message in error and not out, (script, error)


def test_a_configuration_of_fewer_classes_than_its_weights(tiny_run, tmp_path):
    """timm drops the classifiers of such a folder, and random ones would be evaluated."""
    def change(config):
        config['model_args']['num_classes'] = config['num_classes'] = 4
        for key in ('label_names', 'class_counts', 'shot_counts'):
            config[key] = config[key][:4]
        config['model_args'].pop('class_counts')

    with pytest.raises(InputError, match='is of 4 classes, but the weights beside it are of 10'):
        load_trained_model(str(edited(tiny_run, tmp_path, change)))


@pytest.mark.parametrize('name, value, message', [
    ('class_names', ['a'] * 10, 'two of its classes have the same name'),
    ('class_counts', [1] * 9, 'class names are not'),
    ('num_experts', 'x', "'num_experts' is 'x'"), ('class_counts', None, 'of 0 classes'), ('std', [0.], '--std 0.0'),
    ('classifier_prior', 'x', "must be 'uniform'"), ('classifier_scale', 'x', 'is damaged')])
def test_a_checkpoint_that_contradicts_itself(tiny_run, tmp_path, name, value, message):
    checkpoint = load_checkpoint(tiny_run / 'stage_two' / 'last.pth.tar')
    setattr(checkpoint['args'], name, value)
    torch.save(checkpoint, tmp_path / 'changed.pth.tar')
    with pytest.raises(InputError, match=message):
        load_trained_model(checkpoint=str(tmp_path / 'changed.pth.tar'))


@pytest.mark.parametrize('text, message', [
    (BOMB, 'more than 10000 values'), ('a: ' + '[' * 5000, 'recursion'), ('a: !!int ""', 'not valid YAML'),
    ('a: &a [*a]', 'more than 10000 values'), ('[1]', 'holds a list')])
def test_yaml(tmp_path, text, message):
    (tmp_path / 'file.yaml').write_text(text)
    with pytest.raises(InputError, match=message):
        read_yaml(str(tmp_path / 'file.yaml'))


@pytest.mark.parametrize('text', ['', '[' * 5000, '[]', '{"a": 1' + '0' * 5000 + '}', '\0'])
def test_json(tmp_path, text):
    (tmp_path / 'file.json').write_text(text)
    with pytest.raises(InputError, match='file.json'):
        read_json(tmp_path / 'file.json')


def test_archives_in_archives(tmp_path):
    content = b''
    for _ in range(30):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode='w') as tar:
            info = tarfile.TarInfo('inner.tar')
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        content = buffer.getvalue()
    (tmp_path / 'outer.tar').write_bytes(content)
    with pytest.raises(InputError, match='more than 10 deep'):
        load(tmp_path / 'outer.tar')


@pytest.mark.parametrize('metrics', ['', '{"stage_one": {}}', '{"stage_one": {"experts": [], "top1": "x"}}', '[]'])
def test_damaged_metrics_of_a_run(tiny_run, tmp_path, run_script, metrics):
    run = shutil.copytree(tiny_run, tmp_path / 'run')
    (run / 'metrics.json').write_text(metrics)
    for script, *argv in (('train', '--resume', run), ('publish', run, '--repo-id', 'a/b')):
        status, _, error = run_script(script, *argv)
        assert status == 2 and 'metrics.json' in error and len(error.splitlines()) == 1


def test_damaged_options_of_a_run_show_before_it_is_evaluated(tiny_run, tmp_path, run_script, monkeypatch):
    monkeypatch.setattr('shike_timm.report.runs.evaluate', None)
    monkeypatch.setattr('shike_timm.report.evaluate.evaluate', None)
    run = shutil.copytree(tiny_run, tmp_path / 'run')
    (run / 'args.yaml').write_text('seed: [')
    for script, *argv in (
            ('report', run, '--output', tmp_path / 'report'),
            ('eval', '--model', run, *EVAL, '--report', tmp_path / 'report')):
        status, _, error = run_script(script, *argv)
        assert status == 2 and 'args.yaml' in error and not (tmp_path / 'report').exists()


def test_pipes_are_not_read(image_folder, tmp_path):
    """Each of these would wait for ever."""
    os.mkfifo(image_folder / 'train' / 'ant' / 'pipe.png')
    os.mkfifo(tmp_path / 'config.json')
    data = load(image_folder)
    assert len(data.train) == 42 and "1 unreadable (train/ant/pipe.png)" in data.describe()
    rows = list(shike_timm.predict(image_folder / 'train' / 'ant', model='resnet32_shike', workers=0, device='cpu'))
    assert [row['error'] for row in rows if row['error']] == ['it is no file']
    with pytest.raises(InputError):
        read_json(tmp_path / 'config.json')
    with pytest.raises(InputError, match='it is no file'):
        load(tmp_path / 'config.json')


def test_two_results_in_one_file(run_script, tmp_path):
    (tmp_path / 'link').symlink_to('one')
    status, _, error = run_script(
        'eval', '--model', 'resnet32_shike', *EVAL, '--results-file', tmp_path / 'one', '--save-logits',
        tmp_path / 'link')
    assert status == 2 and 'name two files' in error


def test_long_names(run_script, tmp_path, image_folder):
    predict = ['predict', image_folder, '--model', 'resnet32_shike', '--workers', '0', '--results-file']
    status, _, error = run_script(*predict, tmp_path / ('x' * 300))
    assert status == 2 and 'File name too long' in error
    status, _, error = run_script(*predict, tmp_path / ('x' * 255))
    assert status == 0 and len(os.listdir(tmp_path)) == 2, error
    status, _, error = run_script('train', *EVAL, '--output', tmp_path, '--experiment', 'x' * 300)
    assert status == 2 and 'File name too long' in error


def test_a_model_folder_may_be_a_link(tmp_path):
    model = timm.create_model('resnet32_shike')
    (tmp_path / 'elsewhere').mkdir()
    (tmp_path / 'model').symlink_to('elsewhere')
    export_model(model, tmp_path / 'model', timm.data.resolve_model_data_config(model))
    assert (tmp_path / 'model').is_symlink() and (tmp_path / 'elsewhere' / 'config.json').is_file()


@pytest.mark.slow
@pytest.mark.parametrize('shell, status, message', [
    ('predict {images} | head -1 > /dev/null; exit ${{PIPESTATUS[0]}}', 141, None),
    ('predict - <&-', 2, 'Standard input is closed'), ('predict {images} >&-', 2, 'Standard output is closed')])
def test_closed_pipes(image_folder, shell, status, message):
    script = f'{sys.executable} {ROOT}/shike_timm_cli.py predict --model resnet32_shike --topk 0 -b 1 -j 0 --device cpu'
    command = shell.format(images=image_folder).replace('predict', script, 1)
    done = subprocess.run(['bash', '-c', command], capture_output=True, text=True)
    assert done.returncode == status and 'Traceback' not in done.stderr and 'Errno' not in done.stderr, done.stderr
    if message:
        assert message in done.stderr


def test_saved_logits(tiny_run, tmp_path, run_script):
    status, _, error = run_script('eval', '--model', tiny_run, *EVAL, '--save-logits', tmp_path / 'good.npz')
    assert status == 0, error
    good = dict(np.load(tmp_path / 'good.npz'))
    for name, value in (
            ('logits', good['logits'].astype(str)), ('logits', good['logits'] * np.nan),
            ('targets', good['targets'] + .5),
            ('shots', good['shots'] + 3), ('class_counts', 0 * good['class_counts']), ('costs', np.array('[')),
            ('costs', np.array('[{"experts": 1}]')), ('class_names', good['class_names'][1:]), ('logits', np.zeros(3))):
        np.savez(tmp_path / 'bad.npz', **{**good, name: value})
        status, _, error = run_script('report', tmp_path / 'bad.npz', '--output', tmp_path / 'report')
        assert status == 2 and 'bad.npz' in error and len(error.splitlines()) == 1, (name, error)
        assert not (tmp_path / 'report').exists()
