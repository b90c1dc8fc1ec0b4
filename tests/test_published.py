"""ImageNet-LT, iNaturalist 2018 and Places-LT: their layouts, lists and counts, and a few steps of their recipes."""
import json

import numpy as np
import pytest
import timm
import torch
from conftest import REAL_DATA
from image_data import load_evaluation, load_named
from PIL import Image

from shike_timm.cli.describe import describe_data, parse_describe_args
from shike_timm.cli.train import parse_train_args
from shike_timm.data import find_dataset
from shike_timm.data.sources import published
from shike_timm.errors import InputError
from shike_timm.metrics import shot_divisions
from shike_timm.training.runs import train

# Images of each class to train on, in label order; some classes' numbers are out of order as text.
COUNTS = (6, 3, 4, 2, 2, 3, 2, 2, 2, 2, 4)
IDS = [f'n{1440764 + 3 * c:08d}' for c in range(len(COUNTS))]


@pytest.fixture
def make(tmp_path):
    """Write JPEGs and lists; gives their folder."""
    root, rng = tmp_path / 'data', np.random.default_rng(0)

    def write(images, lists):
        for path in images:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (36, 40, 3), dtype=np.uint8)).save(root / path, 'jpeg')
        for name, entries in lists.items():
            (root / name).write_text(''.join(f'{path} {label}\n' for path, label in entries))
        return root

    return write


def imagenet_lt(make, prefix='', flat=False):
    train = [(f'train/{IDS[c]}/{IDS[c]}_{i}.JPEG', c) for c, count in enumerate(COUNTS) for i in range(count)]
    test = [(f'val/{IDS[c]}/ILSVRC2012_val_{c:08d}.JPEG', c) for c in range(len(COUNTS))]
    images = [path for path, _ in train] + [f"val/{path.split('/')[2]}" if flat else path for path, _ in test]
    lists = {'ImageNet_LT_train.txt': train, 'ImageNet_LT_test.txt': test}
    return make([prefix + path for path in images], lists)


def places_lt(make, prefix=''):
    train = [(f'train/place{c}/{i:08d}.jpg', c) for c, count in enumerate(COUNTS) for i in range(count)]
    test = [(f'val/place{c}/Places365_val_{c:08d}.jpg', c) for c in range(len(COUNTS))]
    return make(
        [prefix + path for path, _ in train + test], {'Places_LT_train.txt': train, 'Places_LT_test.txt': test})


def inat2018(make):
    folders = [f"train_val2018/{'Aves' if c % 2 else 'Plantae'}/{c}" for c in range(len(COUNTS))]
    train = [f'{folder}/{i:032x}.jpg' for folder, count in zip(folders, COUNTS) for i in range(count)]
    test = [(f'{folder}/{99:032x}.jpg', c) for c, folder in enumerate(folders)]
    return make(
        [*train, *(path for path, _ in test), f'test2018/{0:032x}.jpg'], {'iNaturalist18_val.txt': reversed(test)})


LAYOUTS = {
    'imagenet_lt': imagenet_lt,
    'imagenet_lt as it comes': lambda make: imagenet_lt(make, 'ILSVRC/Data/CLS-LOC/', flat=True),
    'places_lt': places_lt,
    'places_lt in its folder': lambda make: places_lt(make, 'places365_standard/'),
    'inat2018': inat2018,
}


@pytest.mark.parametrize('layout', LAYOUTS)
def test_layouts(make, layout, caplog):
    root, name = LAYOUTS[layout](make), layout.split()[0]
    data = load_named(name, str(root))
    assert data.class_counts == list(COUNTS) and data.class_names == [str(c) for c in range(len(COUNTS))]
    assert data.test.class_counts == [1] * len(COUNTS)
    for part in (data.train, data.test):  # the label is that of the path
        for i, target in enumerate(part.targets):
            path = part.filename(i)
            assert name == 'imagenet_lt' and IDS[target] in path or f'/{target}/' in path or (
                f'place{target}/' in path or path.endswith(f'_{target:08d}.JPEG'))
        assert all(item is not None for item in part)
    title = find_dataset(name).title
    assert caplog.text.count(f'is not the published list of {title}') == (1 if name == 'inat2018' else 2)
    told = describe_data(parse_describe_args(['--dataset', name, '--data-dir', str(root), '--workers', '0']))
    assert told['train']['images'] == sum(COUNTS) and told['evaluation']['images'] == len(COUNTS)
    assert len(load_evaluation(name, str(root))) == len(COUNTS)
    held = load_named(name, str(root), holdout=0.3)
    assert sum(held.class_counts) + len(held.test) == sum(COUNTS)


def test_lists_are_given_or_found(make, tmp_path):
    root = places_lt(make)
    for name in ('train', 'test'):
        (root / f'Places_LT_{name}.txt').rename(tmp_path / name)
    for options, message in (
            ({}, "holds no 'Places_LT_train.txt'.* --train-list"),
            (dict(train_list=str(tmp_path / 'train')), "holds no 'Places_LT_test.txt'.* --val-list")):
        with pytest.raises(InputError, match=message):
            load_named('places_lt', str(root), **options)
    options = dict(train_list=str(tmp_path / 'train'), val_list=str(tmp_path / 'test'))
    assert load_named('places_lt', str(root), **options).class_counts == list(COUNTS)
    assert len(load_evaluation('places_lt', str(root), val_list=options['val_list'])) == len(COUNTS)
    (tmp_path / 'some').write_text('train/place0/00000000.jpg 0\n')
    with pytest.raises(InputError, match='share images'):
        load_named('places_lt', str(root), train_list=options['train_list'], val_list=str(tmp_path / 'some'))
    (root / 'lists').mkdir()
    for name in ('train', 'test'):
        (tmp_path / name).rename(root / 'lists' / f'Places_LT_{name}.txt')
    assert load_named('places_lt', str(root)).class_counts == list(COUNTS)
    for options, message in (((None,), 'No folder of data was named'), (('/nowhere',), "'/nowhere' does not exist")):
        with pytest.raises(InputError, match=message):
            load_named('places_lt', *options)


@pytest.fixture
def splits():
    if not REAL_DATA or not (REAL_DATA / 'splits').is_dir():
        pytest.skip('needs the published lists: name the folder that holds splits as SHIKE_DATA')
    return REAL_DATA / 'splits'


def shots(counts):
    return [int(mask.sum()) for mask in shot_divisions(counts).values()]


def touch(root, path):
    (root / path).parent.mkdir(parents=True)
    (root / path).touch()


def test_places_lt_is_the_published_one(splits, tmp_path, caplog):
    for path in ('train/airfield/00004851.jpg', 'val/airfield/Places365_val_00003597.jpg'):
        touch(tmp_path, path)
    data = load_named(
        'places_lt', str(tmp_path), check_images=False, train_list=str(splits / 'Places_LT_train.txt'),
        val_list=str(splits / 'Places_LT_test.txt'))
    assert (sum(data.class_counts), data.num_classes, len(data.test)) == (62_500, 365, 36_500)
    assert (max(data.class_counts), min(data.class_counts)) == (4980, 5)
    assert shots(data.class_counts) == [131, 163, 71]
    assert data.test.class_counts == [100] * 365 and 'not the published' not in caplog.text


def test_imagenet_lt_counts(splits, tmp_path, caplog):
    """Its training list is made up from the published class counts; the lists to evaluate on are the published ones."""
    counts = json.loads((splits / 'ImageNet_LT_train_class_counts.json').read_text())
    (tmp_path / 'train.txt').write_text(''.join(
        f'train/{c}/{i}.JPEG {c}\n' for c, count in enumerate(counts) for i in range(count)))
    for path in ('train/0/0.JPEG', 'val/n01440764/ILSVRC2012_val_00029930.JPEG'):
        touch(tmp_path, path)
    data = load_named(
        'imagenet_lt', str(tmp_path), train_list=str(tmp_path / 'train.txt'),
        val_list=str(splits / 'ImageNet_LT_test.txt'), check_images=False)
    assert data.class_counts == counts and shots(counts) == [385, 479, 136]
    assert (sum(counts), max(counts), min(counts)) == (115_846, 1280, 5)
    assert data.test.class_counts == [50] * 1000
    assert caplog.text.count('is not the published list') == 1 and "train.txt' is not" in caplog.text


def test_inat2018_is_derived(splits, tmp_path, monkeypatch, caplog):
    """Of the folders of all images, in the order in which numbers sort as text, as many train as were published."""
    counts = json.loads((splits / 'iNaturalist18_train_class_counts.json').read_text())
    listed = [line.split()[0] for line in (splits / 'iNaturalist18_val.txt').read_text().splitlines()]
    folders = {}
    for path in listed:
        folders.setdefault(path.split('/', 1)[1].rpartition('/')[0], []).append(path.rpartition('/')[2])
    for folder, files in folders.items():
        files += [f'{i:032x}.jpg' for i in range(counts[int(folder.rpartition('/')[2])])]
    folders = dict(sorted(folders.items()))
    monkeypatch.setattr(published, 'list_folder', lambda *args: folders)
    touch(tmp_path, listed[0])
    options = dict(val_list=str(splits / 'iNaturalist18_val.txt'), check_images=False)
    data = load_named('inat2018', str(tmp_path), **options)
    assert data.class_names == [str(c) for c in range(8142)]
    assert data.class_counts == counts and sum(counts) == 437_513 and (max(counts), min(counts)) == (1000, 2)
    assert shots(counts) == [842, 4076, 3224]
    assert data.test.class_counts == [3] * 8142 and 'not the published' not in caplog.text
    assert published.counts_digest(counts) == find_dataset('inat2018').whole_counts[1]


def test_an_incomplete_inat2018_is_told(make, monkeypatch):
    root = inat2018(make)
    monkeypatch.setattr(published, '_has_digest', lambda path, digest: True)  # the published list
    with pytest.raises(InputError, match='has 32 images of 11 classes to train on, expected the 437513 .* complete it'):
        load_named('inat2018', str(root))


TINY = [
    '--img-size', '32', '--batch-size', '16', '--epochs', '1', '--warmup-epochs', '0', '--crt-epochs', '1', '--workers',
    '0', '--device', 'cpu', '--experiment', 'run']


def run(recipe, root, output, *options):
    train(parse_train_args([
        '--hparams', recipe, '--data-dir', str(root), *TINY, '--output', str(output), *options]))
    metrics = json.loads((output / 'run' / 'metrics.json').read_text())
    assert list(metrics) == ['stage_one', 'stage_two'] and all(np.isfinite(one['loss']) for one in metrics.values())
    assert json.loads((output / 'run' / 'model' / 'config.json').read_text())['class_counts'] == list(COUNTS)


@pytest.mark.parametrize('recipe, options', [
    ('imagenet_lt_resnet50', ['--no-torchcompile']),
    pytest.param('imagenet_lt_resnet50', [], marks=pytest.mark.slow),
    pytest.param('imagenet_lt_resnext50', [], marks=pytest.mark.slow),
    pytest.param('inat2018_resnet50', [], marks=pytest.mark.slow),
])
def test_recipes_train(make, tmp_path, recipe, options):
    run(recipe, LAYOUTS[recipe.rpartition('_')[0]](make), tmp_path, *options)


@pytest.mark.parametrize('options', [['--no-torchcompile'], []], ids=['eager', 'compiled'])
@pytest.mark.slow
def test_places_lt_keeps_the_shared_stages(make, tmp_path, options):
    torch.manual_seed(0)
    backbone = timm.create_model('resnet152').state_dict()
    torch.save(backbone, tmp_path / 'resnet152.pth')
    run(
        'places_lt_resnet152', places_lt(make), tmp_path, '--pretrained-backbone', str(tmp_path / 'resnet152.pth'),
        *options)
    fresh = timm.create_model('resnet152_shike')
    fresh.load_backbone(str(tmp_path / 'resnet152.pth'))
    before = fresh.state_dict()
    after = timm.create_model(f'local-dir:{tmp_path}/run/model', pretrained=True).state_dict()
    shared = [name for name in before if name.startswith(('stem.', 'stages.'))]
    experts = [name for name in before if name.startswith('experts.') and name.endswith('weight')]
    assert len(shared) > 500 and all(torch.equal(after[name], before[name]) for name in shared)
    assert not any(torch.equal(after[name], before[name]) for name in experts)
