"""describe.py: every defect of a folder is named, and its counts are right."""
import json
import shutil

import numpy as np
import pytest
from image_data import load
from PIL import Image
from timm.loss import load_class_stats

import shike_timm
from shike_timm.cli.describe import _label_gaps, describe_data, parse_describe_args
from shike_timm.data import SourceConfig, in_memory_set, load_training_data
from shike_timm.data.dataset import ImageSet, ImageSource, StreamSet
from shike_timm.data.inspect import find_similar, inspect_images
from shike_timm.data.sources.tar import FolderImages


@pytest.fixture
def defects(image_folder):
    """The folder of images with one defect of each kind."""
    train, validation = image_folder / 'train', image_folder / 'validation'
    shutil.copy(train / 'ant' / '0.png', train / 'ant' / 'copy.png')
    shutil.copy(train / 'ant' / '1.png', train / 'bee' / 'other.png')
    shutil.copy(train / 'cat' / '2.png', validation / 'cat' / 'seen.png')
    (train / 'bee' / 'page.jpg').write_text('<html>')
    whole = (train / 'bee' / '0.png').read_bytes()
    (train / 'bee' / '1.png').write_bytes(whole[:len(whole) // 2])
    Image.fromarray(np.array([[300, 7], [9, 60000], [1, 2]], dtype=np.uint16)).save(train / 'cat' / 'deep.png')
    (train / 'dog').mkdir()
    (validation / 'eel').mkdir()
    Image.new('L', (50, 40)).save(validation / 'eel' / '0.png')
    return image_folder


def short(path):
    return '/'.join(path.split('/')[-2:])


def test_every_defect_is_named(defects, tmp_path, run_script):
    status, out, error = run_script(
        'describe.py', '--data-dir', defects, '--json', '--workers', '0', '--class-stats', tmp_path / 'stats.json')
    assert status == 0, error
    told = json.loads(out)
    train, evaluation = told['train'], told['evaluation']
    assert {name: count for name, count in train['class_counts'].items() if count} == {'ant': 25, 'bee': 14, 'cat': 7}
    assert (train['images'], train['classes'], train['imbalance_factor']) == (46, 3, round(25 / 7, 4))
    assert train['modes'] in ({'RGB': 43, 'I;16': 1}, {'RGB': 43, 'I': 1})  # as older releases of Pillow read it
    assert (train['width'], train['height']) == ([2, 10, 10], [3, 12, 12]) and train['pixel_range'] == [1, 60000]
    assert {short(one['file']) for one in train['unreadable']} == {'bee/page.jpg', 'bee/1.png'}
    assert told['shots']['medium'] == dict(classes=1, images=25) and told['shots']['few'] == dict(classes=2, images=21)
    assert told['shots']['many'] == dict(classes=0, images=0)
    files = {
        kind: [[short(one['file']) for one in group] for group in groups]
        for kind, groups in told['duplicates'].items()}
    assert files == dict(
        within_class=[['ant/0.png', 'ant/copy.png']], across_classes=[['ant/1.png', 'bee/other.png']],
        across_splits=[['cat/2.png', 'cat/seen.png']])
    assert (told['only_in_train'], told['only_in_evaluation']) == ([], ['eel'])
    assert evaluation['modes'] == {'RGB': 13, 'L': 1} and evaluation['width'] == [10, 10, 50]
    counts, number = load_class_stats(str(tmp_path / 'stats.json'))
    assert counts.tolist()[:3] == [25, 14, 7] and number == 46
    again = ['describe.py', '--data-dir', defects, '--workers', '0', '--class-stats', tmp_path / 'stats.json']
    status, _, error = run_script(*again)
    assert status == 2 and "stats.json' exists" in error and load_class_stats(str(tmp_path / 'stats.json'))[1] == 46
    status, text, error = run_script('describe.py', '--data-dir', defects, '--workers', '0')
    assert status == 0 and all(word in text for word in (
        'training: 46 images of 3 classes', 'bee/page.jpg: cannot identify', 'eel',
        'ant/1.png (train, ant) = ', 'bee/other.png (train, bee)', 'equal images of evaluation in training: 1'))


def test_groups_and_numbers(image_folder, tmp_path):
    names = dict(zip(('ant', 'bee', 'cat'), ('1', '3', '7')))
    for split in ('train', 'validation'):
        for old, new in names.items():
            (image_folder / split / old).rename(image_folder / split / new)
            for i in range(2):
                path = image_folder / split / new / f'{i}.png'
                path.rename(path.with_name(f'track{new}{split if i else ""}_{i}.png'))
    told = shike_timm.describe(
        data_dir=str(image_folder), group_key='track[^_]*', workers=0, many_shot=20, few_shot=10, perceptual=False,
        class_stats=str(tmp_path / 'stats.json'))
    assert told['label_gaps'] == [2, 4, 5, 6] and told['similar'] is None
    assert {(leak['train'], leak['evaluation']) for leak in told['group_leaks']} == {
        (f'train/{name}/track{name}_0.png', f'validation/{name}/track{name}_0.png') for name in '137'}
    assert {shot: one['classes'] for shot, one in told['shots'].items()} == dict(many=1, medium=1, few=1)
    assert load_class_stats(str(tmp_path / 'stats.json'))[0].tolist() == [24, 12, 6]


def test_images_that_look_alike(tmp_path, monkeypatch, run_script):
    pytest.importorskip('imagehash')
    rng = np.random.default_rng(0)
    for i in range(6):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((96, 64), Image.BICUBIC)
        for name, size in (('ant', (96, 64)), ('bee', (48, 32))):
            (tmp_path / 'data' / name).mkdir(parents=True, exist_ok=True)
            if name == 'ant' or i < 2:
                coarse.resize(size).save(tmp_path / 'data' / name / f'{i}.jpg', quality=60)
    told = shike_timm.describe(data_dir=str(tmp_path / 'data'), workers=0)
    assert not any(told['duplicates'].values()) and not told['similar']['within_class']
    assert sorted(sorted(one['file'] for one in group) for group in told['similar']['across_classes']) == [
        [f'ant/{i}.jpg', f'bee/{i}.jpg'] for i in range(2)]
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    status, _, error = run_script('describe.py', '--data-dir', tmp_path / 'data', '--perceptual')
    assert status == 2 and 'shike-timm[describe]' in error


def test_hashes_within_a_few_bits():
    looks = [0, 0, 0b111, 2 ** 63, 0b1111, (1 << 40) - 1, 2 ** 64 - 1, 2 ** 64 - 2]
    assert sorted(map(sorted, find_similar(looks))) == [[0, 1, 2, 3, 4], [6, 7]]  # the fifth by way of the third


def test_hashes_that_share_many_bits():
    """They are found as by comparing each with each, and a hundred thousand of them in seconds."""
    rng = np.random.default_rng(0)
    shared = rng.integers(2 ** 32, size=10, dtype=np.uint64)[:, None] << np.uint64(32)
    looks = (shared + rng.integers(2 ** 32, size=10_000, dtype=np.uint64)).ravel()
    looks[:50] = looks[100] ^ (np.uint64(1) << np.arange(50, dtype=np.uint64))
    found = find_similar(looks.tolist())
    assert max(found, key=len)[:51] == [*range(50), 100]
    few = looks[:2000]
    near = np.unpackbits((few[:, None] ^ few).view(np.uint8).reshape(2000, -1, 8), axis=2).sum(2) <= 3
    expected = {tuple(sorted(group)) for group in map(np.flatnonzero, np.linalg.matrix_power(near[:200, :200], 9))}
    assert {tuple(group) for group in find_similar(few[:200].tolist())} == {one for one in expected if len(one) > 1}


def test_one_split_and_sets_in_memory(image_folder, run_script):
    shutil.rmtree(image_folder / 'validation')
    told = describe_data(parse_describe_args(['--data-dir', str(image_folder), '--workers', '0']))
    data = load(image_folder)  # `train` holds the same images out.
    assert told['evaluation']['class_counts'] == dict(zip(data.class_names, data.test.class_counts))
    assert told['train']['images'] == len(data.train) and told['no_evaluation'] is None and told['group_key'] is None
    assert sum(shot['classes'] for shot in told['shots'].values()) == 3
    for path in [*image_folder.rglob('*.png')]:
        number = int(path.stem)
        path.rename(path.with_name(f'{number // 3}_{number % 3}.png'))
    key = describe_data(parse_describe_args(['--data-dir', str(image_folder), '--workers', '0']))['group_key']
    told = describe_data(parse_describe_args(['--data-dir', str(image_folder), '--workers', '0', '--group-key', key]))
    assert told['evaluation']['images'] and told['group_leaks'] == [] and told['group_key'] is None
    held = [f.rpartition('_')[0] for f in load(image_folder, group_key=key).test.filenames()]
    assert {held.count(group) for group in held} == {3}
    told = describe_data(parse_describe_args(
        ['--data-dir', str(image_folder), '--workers', '0', '--holdout', '0.5', '--class-depth', '1']))
    assert told['train']['images'] + told['evaluation']['images'] == 42 and told['no_evaluation'] is None
    told = describe_data(parse_describe_args(['--dataset', 'digits_lt', '--imb-factor', '20', '--holdout', '0.1']))
    assert told['train']['modes'] == {'RGB': told['train']['images']} and told['train']['width'] == [8, 8, 8]
    assert told['evaluation']['classes'] == 10 and told['duplicates']['across_splits'] == []
    whole = describe_data(parse_describe_args(['--dataset', 'digits_lt', '--imb-factor', '20']))
    assert [shot['classes'] for shot in told['shots'].values()] == [
        shot['classes'] for shot in whole['shots'].values()]
    assert sum(shot['images'] for shot in told['shots'].values()) == told['train']['images']
    status, out, error = run_script('describe.py', '--data-dir', '/nowhere')
    assert status == 2 and not out and "data-dir '/nowhere' does not exist" in error
    for path in ('/nowhere/stats.json', image_folder):
        assert run_script('describe.py', '--data-dir', image_folder, '--class-stats', path)[0] == 2


def test_sets_of_other_kinds(tmp_path):
    """Files opened one at a time, images without files, and streams."""
    pixels = np.arange(3 * 4 * 4 * 3, dtype=np.uint8).reshape(3, 4, 4, 3)
    pixels[2] = pixels[0]
    images = [Image.fromarray(one) for one in pixels]
    for i, image in enumerate(images):
        image.save(tmp_path / f'{i}.png')

    class Files(ImageSource):
        def open(self, row):
            return Image.open(tmp_path / f'{row}.png')

    class Made(ImageSource):  # as torchvision's
        def open(self, row):
            return images[row]

    rows = np.array([2, 1, 0])
    for data in (
            StreamSet(list(zip(images, (1, 0, 1)))), in_memory_set(pixels, [1, 0, 1], 'ab'),
            ImageSet(Files(), [1, 0, 1], 'ab', rows=rows), ImageSet(Made(), [1, 0, 1], 'ab', rows=rows)):
        seen = inspect_images(data)
        assert [one.target for one in seen] == [1, 0, 1] and {one.mode for one in seen} == {'RGB'}
        assert seen[0].digest == seen[2].digest != seen[1].digest and seen[0].size == (4, 4)


def test_numbers_that_are_no_numbering_have_no_gaps():
    assert _label_gaps(['1', '2', '5']) == [3, 4]
    assert _label_gaps(['20240101', '4006381333931']) == _label_gaps(['1', 'two']) == []


def test_unreadable_images_are_not_held_out(make_images):
    """As in training, which leaves them out first."""
    root = make_images({'ant': 10, 'bee': 10})
    for name in ('0.png', '1.png', '2.png'):
        (root / 'ant' / name).write_text('<html>')
    told = describe_data(parse_describe_args(['--data-dir', str(root), '--workers', '0']))
    trained = load_training_data(SourceConfig(data_dir=str(root)))
    assert told['evaluation']['class_counts'] == dict(zip(('ant', 'bee'), trained.test.class_counts)) == dict(
        ant=2, bee=2)
    assert len(told['train']['unreadable']) == 3 and told['train']['class_counts'] == dict(ant=8, bee=8)


def test_each_image_is_read_once(make_images, monkeypatch):
    """Also where images are held out, which takes those that can be read."""
    root, opened = make_images({'ant': 10, 'bee': 10}), []
    read = FolderImages.open
    monkeypatch.setattr(FolderImages, 'open', lambda self, row: opened.append(self.paths[row]) or read(self, row))
    told = describe_data(parse_describe_args(['--data-dir', str(root), '--workers', '0']))
    assert told['evaluation']['images'] == 4 and sorted(opened) == sorted(set(opened)) and len(opened) == 20
