"""Runs on users' own images: what is trained, refused, kept and told."""
import csv
import io
import json
import logging
import os
import shutil

import numpy as np
import pytest
import timm
import torch
import yaml
from image_data import CPU, RUN, load, load_evaluation
from PIL import Image

import shike_timm
import shike_timm_cli
from shike_timm.cli.train import parse_train_args
from shike_timm.metrics import METRICS
from shike_timm.pretrained.folder import export_model
from shike_timm.pretrained.load import load_trained_model
from shike_timm.pretrained.teacher import load_teacher


@pytest.fixture
def coloured(tmp_path):
    """A folder of twelve classes named 1 to 12, each of one colour."""
    for c in range(1, 13):
        folder = tmp_path / 'colours' / str(c)
        folder.mkdir(parents=True)
        for i in range(3):
            Image.new('RGB', (8, 8), (20 * c, 255 - 20 * c, 100 * (c % 2) + i)).save(folder / f'{i}.png')
    return tmp_path / 'colours'


def metrics(path):
    return json.loads(path.read_text())


def test_names_decide_wherever_labels_meet_weights(run_script, coloured, tmp_path):
    root, out = tmp_path / 'split', tmp_path / 'out'
    shutil.copytree(coloured, root / 'train')
    shutil.copytree(coloured, root / 'val')
    data = ['--data-dir', root]
    status, _, error = run_script('train.py', *RUN, *data, '--output', out, '--many-shot', '2', '--few-shot', '1')
    assert status == 0, error
    assert "36 training images of 12 classes, from 3 of '1' to 3 of '1', imbalance factor 1. Evaluation: 36" in error
    run = out / 'run'
    trained = metrics(run / 'metrics.json')['stage_two']
    assert trained['many'] == trained['balanced'] and trained['few'] is None
    reversed_map = tmp_path / 'map.txt'
    reversed_map.write_text('\n'.join(map(str, range(12, 0, -1))) + '\n')
    sources = ([], ['--dataset', 'torch/image_folder'], ['--class-map', reversed_map], ['--checkpoint'])
    for i, extra in enumerate(sources):
        model = ['--model', f'local-dir:{run}/model']
        if extra == ['--checkpoint']:
            model, extra = ['--checkpoint', run / 'stage_two' / 'last.pth.tar'], []
        result = tmp_path / f'{i}.json'
        status, _, error = run_script(
            'eval.py', *model, *data, *extra, '--img-size', '8', '--device', 'cpu', '--workers', '0',
            '--results-file', result)
        assert status == 0, error
        assert metrics(result)['top1'] == trained['top1'] and metrics(result)['per_class']['names'][1] == '2'
    # The model knows its data and its shot divisions.
    for model in (run, run / 'model', run / 'stage_two' / 'last.pth.tar'):
        found = shike_timm.evaluate(model=str(model), device='cpu', workers=0)
        assert {key: found[key] for key in METRICS} == {key: trained[key] for key in METRICS}
    status, _, error = run_script('eval', '--model', run, '--device', 'cpu', '--results-file', tmp_path / 'r.csv')
    table = list(csv.DictReader((tmp_path / 'r.csv').open()))
    assert status == 0 and [row['name'] for row in table] == ['all images', 'mean of classes', *map(str, range(1, 13))]
    assert float(table[0]['recall']) == trained['top1'] and float(table[1]['f1']) == trained['macro_f1']
    assert float(table[1]['recall']) == trained['balanced']
    assert sum(float(row['recall']) for row in table[2:]) / 12 == pytest.approx(trained['balanced'], abs=0.01)
    assert shike_timm.evaluate(model=str(run), many_shot=3, device='cpu', workers=0)['many'] is None
    # Resumed and retrained with classes in another order: the weights' own order is kept.
    (run / 'metrics.json').unlink()
    shutil.rmtree(run / 'stage_two')
    teacher = ['--kd-model-name', f'local-dir:{run}/model', '--class-map', reversed_map]
    status, _, error = run_script('train.py', *RUN, *data, *teacher, '--output', tmp_path / 'taught')
    assert status == 0, error
    shutil.rmtree(root / 'train' / '7')
    status, _, error = run_script('train.py', '--resume', run)
    assert status == 2 and "Class '7'" in error
    shutil.copytree(coloured / '7', root / 'train' / '8', dirs_exist_ok=True, copy_function=lambda a, b: shutil.copy(
        a, b.replace('.png', 'x.png')))
    shutil.copytree(coloured / '7', root / 'train' / '7')
    (root / 'train' / '6').rename(root / 'train' / 'six')
    status, _, error = run_script('retrain_classifier.py', '--checkpoint', run, '--output', tmp_path / 'again')
    assert status == 2 and "Class 'six'" in error and len(error.strip().splitlines()) == 1
    (root / 'train' / 'six').rename(root / 'train' / '6')
    status, _, error = run_script('train.py', '--resume', run)
    assert status == 0 and "'8' with 6 after 3" in error, error
    assert metrics(run / 'metrics.json')['stage_two']['top1'] is not None


def test_a_run_keeps_the_lists_of_both_sides(run_script, coloured, tmp_path, caplog):
    out = tmp_path / 'out'
    status, _, error = run_script('train.py', *RUN, '--data-dir', coloured, '--output', out)
    assert status == 0 and '12 images, 0.2 of each class' in error, error
    run = out / 'run'
    held = {row['path'] for row in csv.DictReader((run / 'validation.csv').open())}
    assert len(held) == 12 and (run / 'args.yaml').read_text().count('holdout: 0.2') == 1
    trained = metrics(run / 'metrics.json')['stage_two']
    for i in range(5):
        Image.new('RGB', (8, 8)).save(coloured / '3' / f'later{i}.png')
    moved = coloured.rename(tmp_path / 'moved')
    status, _, error = run_script(
        'eval.py', '--model', f'local-dir:{run}/model', '--data-dir', moved, '--img-size', '8', '--device', 'cpu',
        '--workers', '0', '--results-file', tmp_path / 'result.json')
    assert status == 0 and '5 images that the run does not list' in error, error
    result = metrics(tmp_path / 'result.json')
    assert result['top1'] == trained['top1'] and result['many'] == trained['many'] and sum(
        result['per_class']['total']) == 12
    status, _, error = run_script(
        'retrain_classifier.py', '--checkpoint', run, '--data-dir', moved, '--output', tmp_path / 'again')
    assert status == 0, error
    shutil.copytree(moved, tmp_path / 'parent' / 'photos')
    shutil.rmtree(tmp_path / 'parent' / 'photos' / '1')
    options = dict(class_names=[str(c) for c in range(1, 13)], run_folder=str(run))
    assert len(load_evaluation('', str(tmp_path / 'parent'), **options)) == 38
    assert f"22 images of '{tmp_path / 'parent'}' have the folder and the name" in caplog.text
    again = next((tmp_path / 'again').iterdir())
    assert {row['path'] for row in csv.DictReader((again / 'validation.csv').open())} == held


@pytest.mark.parametrize('options, message', [
    (['--batch-size', '1'], 'BatchNorm'),
    (['--in-chans', '2'], 'channels are not read'),
    (['--input-size', '1', '8', '8', '--in-chans', '3'], 'contradicts'),
    (['--pixel-range', '5', '5'], '--pixel-range 5 5 is empty'),
    (['--class-map', '/nowhere.txt'], "class-map '/nowhere.txt' cannot be read"),
])
def test_refused_before_anything_is_written(run_script, coloured, tmp_path, options, message):
    argv = [option for option in RUN if options[0] != '--input-size' or option not in ('--img-size', '8')]
    status, _, error = run_script('train.py', *argv, '--data-dir', coloured, '--output', tmp_path / 'out', *options)
    assert status == 2 and message in error and len(error.strip().splitlines()) == 1, error
    assert not (tmp_path / 'out').exists()


def test_one_channel_two_classes_and_a_class_of_one(run_script, tmp_path):
    for name, count in (('dark', 9), ('light', 1)):
        (tmp_path / 'data' / name).mkdir(parents=True)
        for i in range(count):
            Image.new('L', (9, 12), 40 * (name == 'light')).save(tmp_path / 'data' / name / f'{i}.png')
    argv = [option for option in RUN if option not in ('--img-size', '8')]
    status, _, error = run_script(
        'train.py', *argv, '--data-dir', tmp_path / 'data', '--output', tmp_path / 'out', '--input-size', '1', '16',
        '12')
    assert status == 0, error
    assert "1 class has no image held out" in error
    config = json.loads((tmp_path / 'out' / 'run' / 'model' / 'config.json').read_text())
    assert config['pretrained_cfg']['input_size'] == [1, 16, 12] and config['shot_counts'] == [9, 1]
    status, _, error = run_script(
        'eval.py', '--model', f"local-dir:{tmp_path / 'out' / 'run' / 'model'}", '--data-dir', tmp_path / 'data',
        '--device', 'cpu', '--workers', '0')
    assert status == 0, error


def test_a_teacher_of_another_order_is_heard_right(make_images, tmp_path):
    data = load(make_images({'ant': 5, 'bee': 5, 'cat': 5}))
    model = timm.create_model('resnet32_shike', num_classes=3)
    for i, order in enumerate((['ant', 'bee', 'cat'], ['cat', 'ant', 'bee'])):
        config = timm.data.resolve_model_data_config(model)
        export_model(model, tmp_path / f'{i}', config, order, pixel_range=[0, 9], exif=True)
    images = torch.rand(2, 3, 32, 32)
    own, other = (load_teacher(f'local-dir:{tmp_path}/{i}', data, (3, 32, 32), CPU)(images) for i in range(2))
    assert torch.equal(other, own[:, [1, 2, 0]]) and not torch.equal(other, own)
    trained = load_trained_model(f'local-dir:{tmp_path}/0')
    assert trained.options == dict(exif=True, pixel_range=[0, 9])


@pytest.mark.parametrize('channels, mean', [(1, (0.25,)), (3, (0.1, 0.2, 0.45))])
def test_a_teacher_of_grey_images(make_images, tmp_path, channels, mean):
    data = load(make_images({'ant': 5, 'bee': 5}))
    model = timm.create_model('resnet32_shike', num_classes=2, in_chans=channels).eval()
    size = (channels, 32, 32)
    config = dict(timm.data.resolve_data_config(dict(input_size=size), model=model), mean=mean, std=mean)
    export_model(model, tmp_path / 'grey', config, data.class_names)
    teacher = load_teacher(f'local-dir:{tmp_path}/grey', data, (1, 32, 32), CPU)
    assert teacher.mean_kd.shape == (1, 1, 1, 1) and teacher.std_kd.item() == pytest.approx(0.25)
    assert teacher(torch.rand(2, 1, 32, 32)).shape == (2, 2)


def write_every_defect(root):
    """A folder with one defect of each kind; gives what each is called where it is told of."""
    rng = np.random.default_rng(0)

    def picture(mode='RGB'):
        return Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).convert(mode)

    counts = {'ant': 6, 'naïve, "b"': 5, 'one': 1, 'market/indoor': 4, 'market/outdoor': 4, 'church/outdoor': 4}
    for folder, count in {**counts, '.ipynb_checkpoints': 2, '__MACOSX/ant': 1}.items():
        (root / folder).mkdir(parents=True)
        for i in range(count):
            picture().save(root / folder / f'{i}.png')
    (root / 'dog').mkdir()
    ant = root / 'ant'
    picture().save(root / 'loose.png')
    for path in ('._0.png', 'Thumbs.db', '.DS_Store', 'notes.txt', 'clip.mp4'):
        (ant / path).write_bytes(b'x')
    for mode, name in (('CMYK', 'ink.JPG'), ('L', 'grey.png'), ('LA', 'clear.png'), ('RGBA', 'glass.webp')):
        picture(mode).save(ant / name)
    picture().convert('P').save(ant / 'palette.png', transparency=0)
    Image.fromarray(rng.integers(0, 65536, (9, 12)).astype(np.uint16)).save(ant / 'deep.png')
    Image.fromarray(rng.integers(0, 2 ** 31, (9, 12)).astype(np.int32)).save(ant / 'deeper.tif')
    Image.fromarray(rng.random((9, 12), dtype=np.float32)).save(ant / 'float.tif')
    exif = Image.Exif()
    exif[0x0112] = 6
    picture().save(ant / 'turned.jpg', exif=exif)
    for name in ('other.bmp', 'other.gif'):
        picture().save(ant / name)
    readable = 6 + 11
    whole = (ant / '0.png').read_bytes()
    (ant / 'cut.png').write_bytes(whole[:len(whole) // 2])
    (ant / 'empty.jpg').write_bytes(b'')
    (ant / 'page.jpg').write_text('<html>')
    (ant / 'gone.png').symlink_to('nowhere')
    Image.new('1', (14000, 14000)).save(ant / 'bomb.png')
    shutil.copy(ant / '1.png', root / 'naïve, "b"' / 'copy.png')
    shutil.copy(ant / '2.png', ant / 'again.png')
    return readable + 1


def test_a_folder_of_all_defects_trains_and_each_is_named(run_script, tmp_path):
    root, out = tmp_path / 'data', tmp_path / 'out'
    ants = write_every_defect(root)
    argv = [*RUN, '--data-dir', root, '--output', out]
    status, _, error = run_script('train.py', *argv)
    assert status == 2 and '--class-depth 1 or --class-depth 2' in error and not out.exists()
    status, _, error = run_script('train.py', *argv, '--class-depth', '2')
    assert status == 0, error
    config = metrics(out / 'run' / 'model' / 'config.json')
    assert config['exif'] is True
    assert dict(zip(config['label_names'], config['shot_counts'])) == {
        'ant': ants, 'naïve, "b"': 6, 'one': 1, 'market/indoor': 4, 'market/outdoor': 4, 'church/outdoor': 4}
    assert 'means over 5 of 6 classes' in error
    assert metrics(out / 'run' / 'metrics.json')['stage_two']['balanced_classes'] == 5
    line = next(line for line in error.splitlines() if line.startswith('Data: '))
    for words in (
            "of 6 classes, from", "to 1 of 'one'", '1 image beside the class folders (loose.png)',
            '1 folder without images (dog)', '2 files of other types (.mp4, .txt)', '5 hidden names', '5 unreadable (',
            '1 class has no image held out', '0.2 of each class of the training set, held out by name'):
        assert line.count(words) == 1, (words, line)
    for name, why in (
            ('cut.png', 'truncated'), ('empty.jpg', 'cannot identify'), ('page.jpg', 'cannot identify'),
            ('gone.png', 'No such file'), ('bomb.png', 'decompression bomb')):
        assert error.count(f"'ant/{name}' cannot be read and is left out") == 1 and why in error, error
    status, text, _ = run_script('describe.py', '--data-dir', root, '--class-depth', '2', '--workers', '0', '--json')
    told = json.loads(text)
    both = told['train'], told['evaluation']
    assert status == 0 and sum(len(one['unreadable']) for one in both) == 5 and told['train']['classes'] == 6
    assert sum(one['turned'] for one in both) == 1
    assert {'CMYK', 'P', 'LA', 'L', 'F'} < {*both[0]['modes'], *both[1]['modes']}
    assert len(told['duplicates']['across_classes']) == 1
    assert len(told['duplicates']['within_class']) + len(told['duplicates']['across_splits']) >= 1
    assert len(told['train']['left_out']) == 4


def test_a_folder_alone_gets_the_recipe_for_its_device(monkeypatch, caplog):
    caplog.set_level('INFO')
    config = parse_train_args(['--data-dir', 'photos'])
    assert (config.model, config.private_stages, config.pretrained_backbone) == ('shike', 0, 'default')
    assert config.search and config.backbone in caplog.text and '--hparams frozen' in caplog.text
    assert parse_train_args(['--data-dir', 'photos', '--img-size', '96']).img_size == 96
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    config = parse_train_args(['--data-dir', 'photos'])
    assert (config.backbone, config.num_experts, config.method) == ('convnext_tiny', 1, 'balanced_softmax')


@pytest.mark.parametrize('argv', [
    ['--data-dir', 'photos', '--model', 'resnet32_shike'],
    ['--data-dir', 'photos', '--hparams', 'quickstart'],
    ['--data-dir', 'data', '--dataset', 'cifar100_lt'],
    [],
], ids=['model', 'recipe', 'benchmark', 'nothing'])
def test_a_named_recipe_model_or_benchmark_is_kept(argv):
    config = parse_train_args(argv)
    assert config.cache_features is None and config.backbone is None


def test_a_large_batch_is_lowered_to_a_small_set(run_script, coloured, tmp_path):
    status, _, error = run_script(
        'train.py', *RUN, '--data-dir', coloured, '--output', tmp_path / 'out', '--batch-size', '30')
    assert status == 0 and 'lowered to 24' in error, error
    assert yaml.safe_load((tmp_path / 'out' / 'run' / 'args.yaml').read_text())['batch_size'] == 24


def test_a_run_on_lists_is_evaluated_without_them(coloured, run_script, tmp_path):
    lists = {name: tmp_path / f'{name}.csv' for name in ('train', 'val')}
    for number, path in enumerate(lists.values()):
        rows = (f'{c}/{i}.png,class {c}\n' for c in '123' for i in (number, 2)[:2 - number])
        path.write_text('file,kind\n' + ''.join(rows))
    base = [*RUN, '--data-dir', coloured, '--target-key', 'kind', '--train-list', lists['train']]
    for name, extra in (('both', ['--val-list', lists['val']]), ('one', ['--holdout', '0.4'])):
        assert run_script('train.py', *base, *extra, '--output', tmp_path / name)[0] == 0
        run = tmp_path / name / 'run'
        found = shike_timm.evaluate(model=str(run), device='cpu', workers=0)
        assert found['loss'] == metrics(run / 'metrics.json')['stage_two']['loss']
        assert found['per_class']['total'] == [1] * 3
    args = (run / 'args.yaml').read_text()
    (run / 'args.yaml').write_text(args.replace(f'data_dir: {coloured}', "data_dir: 'pipe:touch x'"))
    status, _, error = run_script('eval.py', '--model', run, '--device', 'cpu')
    assert status == 2 and 'may not start a process' in error


def test_names_that_the_output_cannot_print(make_images, tmp_path, monkeypatch):
    """A class whose name is no UTF-8, one that is not in the code page of the output, and a directed output."""
    root, out = make_images({'train/漢字': 4, 'train/x': 4}), tmp_path / 'out'
    monkeypatch.setattr(logging.root.manager, 'disable', logging.CRITICAL)  # xdist cannot send such names.
    (root / 'train' / 'x').rename(root / 'train' / os.fsdecode(b'caf\xe9'))
    shutil.copytree(root / 'train', root / 'val')

    def run(*argv):
        stdout = io.TextIOWrapper(io.BytesIO(), encoding='cp1252')
        monkeypatch.setattr('sys.stdout', stdout)
        monkeypatch.setattr('sys.argv', ['shike', *map(str, argv)])
        assert shike_timm_cli.main() == 0
        stdout.flush()
        return stdout.buffer.getvalue().decode('cp1252')

    run('train', *RUN, '--data-dir', root, '--output', out)
    table = run('predict', root / 'val', '--model', out / 'run', '--topk', '2', '--workers', '0', '--device', 'cpu')
    assert 'caf\\udce9' in table and '\\u6f22\\u5b57' in table and table.count('\n') == 9
    run('predict', root / 'val', '--model', out / 'run', '--device', 'cpu', '--results-file', tmp_path / 'p.csv')
    assert {row['label'] for row in csv.DictReader((tmp_path / 'p.csv').open(encoding='utf-8'))} <= {
        'caf\\udce9', '漢字'}
    assert 'caf\\udce9 4' in run('describe', '--data-dir', root, '--workers', '0')
    run('eval', '--model', out / 'run', '--device', 'cpu', '--workers', '0', '--report', tmp_path / 'report')
