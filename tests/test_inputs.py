"""Images as users keep them, in folders, archives and lists: what is data, of which class, on which side."""
import csv
import io
import json
import os
import shutil
import tarfile
import unicodedata
from collections import Counter

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import resolve_data_config

from shike_timm.checkpoints import export_model
from shike_timm.data import (
    Augmentation,
    create_eval_dataset,
    create_eval_loader,
    create_train_loader,
    load_training_data,
)
from shike_timm.data.datasets import natural_order
from shike_timm.data.files import Names
from shike_timm.data.images import ImageDecoder
from shike_timm.errors import InputError
from shike_timm.loading import load_teacher, load_trained_model

CPU = torch.device('cpu')


@pytest.fixture
def make(tmp_path):
    """Write images of different colours, `{'cat': 3, 'dog/left': 2}` by folder or single paths; gives their root."""
    root, rng = tmp_path / 'root', np.random.default_rng(0)

    def write(*paths):
        for path in paths:
            if isinstance(path, dict):
                write(*(f'{folder}/{i}.png' for folder, count in path.items() for i in range(count)))
                continue
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (6, 5, 3), dtype=np.uint8)).save(root / path)
        return root

    return write


def names_of(data):
    return [data.dataset.filename(i) for i in range(len(data.dataset))]


def labels_of(data):
    return {data.dataset.filename(i): data.class_names[target] for i, target in enumerate(data.dataset.targets)}


def load(root, **options):
    return load_training_data('', str(root), **options)


def test_a_folder_without_a_split_is_parted_by_names(make):
    root = make({'ant': 10, 'bee': 5, 'cat': 2, 'dog': 1})
    data = load(root)
    assert data.class_counts == [8, 4, 1, 1] and data.test.class_counts == [2, 1, 1, 0]
    assert data.shot_counts == [10, 5, 2, 1] and data.holdout == 0.2
    assert any("'dog'" in note or 'dog' in note for note in data.test.notes)
    assert not set(names_of(data.train)) & set(names_of(data.test))
    make({'eel': 7})
    make('bee/new.png')
    after = load(root)
    held, now = set(names_of(data.test)), set(names_of(after.test))
    assert {name for name in now if name[:3] in ('ant', 'cat')} == {name for name in held if name[:3] in ('ant', 'cat')}
    assert len(held - now) <= 1  # of the class that got an image


def test_sources_agree(make, tmp_path):
    root = make({'wolf': 9, 'bear': 5, 'fox': 3})
    plain = load(root)
    names = sorted(names_of(plain.train) + names_of(plain.test))
    with tarfile.open(tmp_path / 'all.tar', 'w') as tar:
        tar.add(root, 'wrapped')
    with tarfile.open(tmp_path / 'inner.tar', 'w') as tar:
        tar.add(root / 'fox', 'fox')
    with tarfile.open(tmp_path / 'nested.tar', 'w') as tar:
        tar.add(root / 'wolf', 'wolf')
        tar.add(root / 'bear', 'bear')
        tar.add(tmp_path / 'inner.tar', 'part.tar')
    (tmp_path / 'list.txt').write_text(''.join(f"{name} {name.split('/')[0]}\n" for name in reversed(names)))
    for suffix, mark in (('csv', ','), ('tsv', '\t')):
        with (tmp_path / f'list.{suffix}').open('w', newline='') as file:
            rows = csv.writer(file, delimiter=mark)
            rows.writerows([('kind', 'image', 'size'), *((name.split('/')[0], name, 3) for name in names)])
    classes = ['wolf', 'fox', 'bear']
    (tmp_path / 'coco.json').write_text(json.dumps(dict(
        images=[dict(id=i, file_name=name) for i, name in enumerate(names)],
        annotations=[
            dict(image_id=i, category_id=7 + classes.index(name.split('/')[0])) for i, name in enumerate(names)],
        categories=[dict(id=7 + i, name=name) for i, name in enumerate(classes)])))
    others = [
        load(tmp_path / 'all.tar'),
        load(root, train_list=str(tmp_path / 'list.txt')),
        load(root, train_list=str(tmp_path / 'list.csv'), target_key='kind'),
        load(root, train_list=str(tmp_path / 'list.tsv'), target_key='kind'),
        load_training_data('torch/image_folder', str(root)),
    ]
    for other in others:
        assert other.class_names == ['bear', 'fox', 'wolf'] and other.class_counts == plain.class_counts == [4, 2, 7]
        for one, same in zip((plain.train, plain.test), (other.train, other.test)):
            assert [name.removeprefix('wrapped/') for name in names_of(same)] == names_of(one)
            assert all(np.array_equal(one.dataset[i][0], same.dataset[i][0]) for i in range(len(one.dataset)))
    coco = load(root, train_list=str(tmp_path / 'coco.json'))
    assert coco.class_names == classes and sorted(names_of(coco.test)) == sorted(names_of(plain.test))
    assert labels_of(coco.train) == labels_of(plain.train)
    nested = load(tmp_path / 'nested.tar', class_depth=2)
    assert nested.class_counts == [4, 2, 7] and nested.train.dataset[5][0].size == (5, 6)


@pytest.mark.parametrize('folders', [('train', 'val'), ('train', 'test'), ('training', 'valid')])
def test_names_of_splits(make, folders):
    train, test = folders
    data = load(make({f'{train}/ant': 3, f'{train}/bee': 2, f'{test}/bee': 2}, f'{test}/loose.png'))
    assert data.class_counts == [3, 2] and labels_of(data.test) == {f'{test}/bee/{i}.png': 'bee' for i in range(2)}
    assert test in data.describe()


def test_what_only_looks_like_a_split(make):
    vehicles = load(make({'train': 4, 'car': 4}))  # train is a class
    assert vehicles.class_names == ['car', 'train']
    shutil.rmtree(make())
    root = make({'train/ant': 4, 'train/bee': 4, 'test': 3})
    unlabelled = load(root)
    assert unlabelled.test.class_counts == [1, 1]
    (root / 'train').rename(root / 'val')
    with pytest.raises(InputError, match='no train split'):
        load(root)


@pytest.mark.parametrize('folders, options, expected', [
    (['wolf/1', 'wolf/a/2', 'bear/a/3'], {}, ['wolf', 'wolf', 'bear']),
    (['wolf/a/1', 'bear/b/c/2'], {}, ['wolf', 'bear']),
    (['a/airfield/1', 'b/bazaar/indoor/2', 'b/bazaar/outdoor/3', 'c/church/outdoor/4'], {},
     ['a/airfield', 'b/bazaar/indoor', 'b/bazaar/outdoor', 'c/church/outdoor']),
    (['a/airfield/1', 'a/alley/2', 'b/bar/3'], {}, ['airfield', 'alley', 'bar']),
    (['Aves/12/1', 'Aves/3/2', 'Fungi/4/3'], dict(class_depth=2), ['12', '3', '4']),
    (['apple/healthy/1', 'corn/healthy/2', 'corn/rust/3'], dict(class_depth=2),
     ['apple/healthy', 'corn/healthy', 'corn/rust']),
    (['wolf/a/1', 'wolf/b/2', 'bear/a/3'], dict(class_depth=1), ['wolf', 'wolf', 'bear']),
])
def test_what_a_label_is(make, folders, options, expected):
    root = make(*(f'train/{path}{twin}.png' for path in folders for twin in 'xy'))
    data = load(root, **options)
    labels = {**labels_of(data.train), **labels_of(data.test)}
    assert [labels[f'train/{path}x.png'] for path in folders] == expected


def test_two_readings_are_refused_and_a_model_decides(make):
    root = make({'wolf/site1': 2, 'wolf/site2': 2, 'bear/site1': 2})
    with pytest.raises(InputError, match="may be of class '.*', one of 2, .* one of 3: .*depth 1 or .*depth 2"):
        load(root)
    one = create_eval_dataset('', str(root), class_names=['wolf', 'bear'])
    assert Counter(labels_of(one).values()) == {'wolf': 4, 'bear': 2}
    two = create_eval_dataset('', str(root), class_names=['bear/site1', 'wolf/site1', 'wolf/site2'])
    assert Counter(two.dataset.targets.tolist()) == {0: 2, 1: 2, 2: 2}


def test_defects_are_named_once(make, caplog):
    hidden = {'.ipynb_checkpoints': 2, '__MACOSX/ant': 2, 'ant/.thumbs': 1}
    root = make({'ant': 5, 'bee': 5, **hidden}, 'loose.png', 'ant/._0.png')
    for path in ('ant/Thumbs.db', 'ant/.DS_Store', 'ant/notes.txt', 'bee/clip.mp4', 'readme.md'):
        (root / path).write_text('x')
    (root / 'dog').mkdir()
    bad = {'empty.png': b'', 'page.jpg': b'<html>', 'cut.png': (root / 'ant' / '0.png').read_bytes()[:60]}
    for name, content in bad.items():
        (root / 'bee' / name).write_bytes(content)
    for suffix in ('webp', 'bmp', 'tif', 'GIF'):
        Image.new('RGB', (4, 4)).save(root / 'ant' / f'other.{suffix}')
    data = load(root)
    assert data.class_names == ['ant', 'bee'] and data.shot_counts == [9, 5]
    line = data.describe()
    for words in (
            '1 image beside the class folders (loose.png)', '1 folder without images (dog)',
            '3 files of other types (.md, .mp4, .txt)', 'hidden name', '.ipynb_checkpoints',
            '3 unreadable (bee/cut.png, bee/empty.png, bee/page.jpg)'):
        assert line.count(words) == 1, line
    assert all(f"'bee/{name}' cannot be read" in caplog.text for name in bad)


def test_order_of_names_is_that_of_timm_and_total():
    names = ['10', '2', '1', '02', 'b', 'B', 'é', 'a1b', 'a10']
    assert sorted(names, key=natural_order) == ['1', '02', '2', '10', 'a1b', 'a10', 'B', 'b', 'é']
    assert sorted(reversed(names), key=natural_order) == sorted(names, key=natural_order)


def test_classes_with_odd_names(make, tmp_path):
    names = [*map(str, range(1, 13)), 'a, b', 'it\'s "it"', 'naïve', 'nai\u0308f']
    data = load(make({f'train/{name}': 2 for name in names}))
    assert data.class_names[:12] == [str(i) for i in range(1, 13)] and 'naïf' in data.class_names
    data.write_sides(tmp_path)
    with (tmp_path / 'validation.csv').open(newline='') as file:
        assert {row['label'] for row in csv.DictReader(file)} == set(data.class_names)
    again = load(make(), val_list=str(tmp_path / 'validation.csv'))
    assert names_of(again.train) == names_of(data.train) and names_of(again.test) == names_of(data.test)
    assert again.class_names == data.class_names


def test_groups_stay_together(make, tmp_path):
    paths = [f'{kind}/p{patient}_{i}.png' for kind in ('ill', 'well') for patient in range(10) for i in range(3)]
    root = make(*paths)
    for options in (dict(group_key=r'p(\d+)_'), dict(group_key=r'p\d+')):
        data = load(root, holdout=0.3, **options)
        patients = [{name.split('/')[1].split('_')[0] for name in names_of(part)} for part in (data.train, data.test)]
        assert not patients[0] & patients[1] and data.test.class_counts == [9, 9]
    with (tmp_path / 'list.csv').open('w') as file:
        file.write('path,label,patient\n' + ''.join(f"{path},{path.split('/')[0]},{path[-7:-6]}\n" for path in paths))
    listed = load(root, holdout=0.3, train_list=str(tmp_path / 'list.csv'), group_key='patient')
    held = {name[-7:-6] for name in names_of(listed.test)}
    assert len(held) == 3 and not held & {name[-7:-6] for name in names_of(listed.train)}
    with pytest.raises(InputError, match="group-key 'visit' is no column, and is found in no path"):
        load(root, group_key='visit')
    with pytest.raises(InputError, match='neither a column nor a regular expression'):
        load(root, group_key='(')


@pytest.mark.parametrize('name, text, message', [
    ('l.txt', 'ant/0.png\n', "Line 1 of .* is 'ant/0.png', expected a path and a label"),
    ('l.csv', 'file,kind\nant/0.png,ant\n', "no column 'label' among file, kind"),
    ('l.csv', 'path,label\nant/0.png\n', 'Line 2 of'),
    ('l.json', '{"images": []}', "has no 'categories'"),
    ('l.json', '[]', 'cannot be read'),
    ('l.txt', '', 'names no labelled image'),
    ('l.txt', 'ant/0.png ant\nant/0.png bee\n', "labels 'ant/0.png' both 'ant' and 'bee'"),
    ('l.txt', 'ant/0.png sea star\n', "Line 1 of .* label of several words"),
    ('l.txt', 'elsewhere/0.png ant\n', 'elsewhere/0.png. does not exist'),
    ('l.txt', 'ant/0.png ant\nant/1.png ant\n', "single class, 'ant'"),
])
def test_bad_lists(make, tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        load(make({'ant': 2, 'bee': 2}), train_list=str(tmp_path / name))


def test_lists(make, tmp_path):
    root = make({'a': 6})
    train, test = tmp_path / 'train.txt', tmp_path / 'val.txt'
    train.write_text('a/0.png 3\r\na/1.png 10\na/2.png 3\na/2.png 3\n\n', newline='')
    test.write_text('a/3.png 10\n')
    data = load(root, train_list=str(train), val_list=str(test))
    assert data.class_names == ['3', '10'] and data.class_counts == [2, 1]
    assert [target for _, target in data.test.dataset] == [1] and '1 repeated entries' in data.describe()
    (tmp_path / 'spelled.txt').write_text(f'./a/0.png a\n{root}/a//1.png a\na/1.png a\n')
    with pytest.raises(InputError, match='single class'):
        load(root, val_list=str(tmp_path / 'spelled.txt'))
    make({'b': 2})
    rest = load(root, val_list=str(tmp_path / 'spelled.txt'))
    assert rest.class_counts == [4, 2] and rest.test.class_counts == [2, 0]  # none of them is trained on
    test.write_text('a/0.png 10\n')
    with pytest.raises(InputError, match='share images'):
        load(root, train_list=str(train), val_list=str(test))
    test.write_text('a/3.png 4\n')
    with pytest.raises(InputError, match="Class '4' of the validation split"):
        load(root, train_list=str(train), val_list=str(test))
    with pytest.raises(InputError, match='contradict'):
        load(root, train_list=str(train), val_list=str(test), holdout=0.1)
    with pytest.raises(InputError, match='class-depth 2 is for folders'):
        load(root, train_list=str(train), class_depth=2)
    with pytest.raises(InputError, match='imb-factor 50.0 is for the .*_lt data sets'):
        load(root, imb_factor=50.)
    with pytest.raises(InputError, match="group-key 'a' is not for 'digits_lt'"):
        load_training_data('digits_lt', group_key='a')
    with pytest.raises(InputError, match="dataset 'digits_lt' is none"):
        load_training_data('digits_lt', train_list=str(train))


def test_a_class_map_names_and_orders(make, tmp_path):
    root = make({'ant': 4, 'bee': 4, 'cat': 4})
    (tmp_path / 'map.txt').write_text('cat\nant\n')
    data = load(root, class_map=str(tmp_path / 'map.txt'))
    assert data.class_names == ['cat', 'ant'] and '4 images of 1 classes' in data.describe()
    (tmp_path / 'list.txt').write_text(
        ''.join(f'{kind}/{i}.png {label}\n' for label, kind in enumerate(('cat', 'ant')) for i in range(4)))
    listed = load(root, class_map=str(tmp_path / 'map.txt'), train_list=str(tmp_path / 'list.txt'))
    assert labels_of(listed.train) == labels_of(data.train)
    make({'näher': 4})
    (tmp_path / 'map.txt').write_text(unicodedata.normalize('NFD', 'cat\nnäher\n'), encoding='utf-8')
    assert load(root, class_map=str(tmp_path / 'map.txt')).class_counts == [4 - 1, 4 - 1]
    (tmp_path / 'numbers.txt').write_text('3\n1\n')
    numbered = load(make({'0': 4, '1': 4, '3': 4}), class_map=str(tmp_path / 'numbers.txt'))
    assert numbered.class_counts == [4 - 1, 4 - 1] and {
        numbered.train.dataset.filename(i)[0] for i in range(6)} == {'1', '3'}  # and no 0 as the first class
    (tmp_path / 'map.txt').write_text('cat\nant\ncat\n')
    with pytest.raises(InputError, match='repetitions'):
        load(root, class_map=str(tmp_path / 'map.txt'))


@pytest.mark.parametrize('values, kind, options, expected', [
    ([0, 256, 65535], np.uint16, {}, [0, 1, 255]),
    ([0, 2 ** 30, 2 ** 31 - 1], np.int32, {}, [0, 128, 255]),
    ([0, 0.5, 1], np.float32, {}, [0, 128, 255]),
    ([100, 2148, 9999], np.uint16, dict(pixel_range=(100, 4196)), [0, 128, 255]),
    ([0, 7, 255], np.uint8, dict(pixel_range=(100, 4196)), [0, 7, 255]),
])
def test_deep_images_are_scaled_alike(values, kind, options, expected):
    file = io.BytesIO()
    Image.fromarray(np.array([values], dtype=kind)).save(file, 'tiff')
    for channels in (1, 3):
        image = np.asarray(ImageDecoder(channels, **options)(Image.open(file)))
        assert image.reshape(3, -1)[:, 0].tolist() == expected and image.shape == (1, 3, 3)[:3 if channels == 3 else 2]


@pytest.mark.parametrize('mode, colour, kind', [
    ('CMYK', (0, 255, 255, 0), 'jpeg'), ('P', None, 'png'), ('RGBA', (255, 0, 0, 128), 'png'),
])
def test_modes_become_three_right_channels(mode, colour, kind):
    file = io.BytesIO()
    image = Image.new('RGB', (8, 8), (255, 0, 0)).convert('P') if mode == 'P' else Image.new(mode, (8, 8), colour)
    image.save(file, kind)
    assert np.abs(np.asarray(ImageDecoder()(Image.open(file)))[4, 4] - np.array([255, 0, 0])).max() <= 2
    for mode in ('L', '1', 'LA'):
        assert np.asarray(ImageDecoder()(Image.new(mode, (2, 2), 1 if mode == '1' else 0))).shape == (2, 2, 3)


def test_exif_on_demand():
    file = io.BytesIO()
    exif = Image.Exif()
    exif[274] = 6
    Image.new('RGB', (4, 2)).save(file, 'jpeg', exif=exif)
    assert ImageDecoder()(Image.open(file)).size == (4, 2) and ImageDecoder(exif=True)(Image.open(file)).size == (2, 4)
    deep = io.BytesIO(b'P5 2 1 65535\n' + np.array([0, 65535], dtype='>u2').tobytes())
    assert ImageDecoder(exif=True)(Image.open(deep)).getextrema() == ((0, 255),) * 3


def test_a_range_that_is_hardly_used_is_named(make, caplog):
    root = make({'ant': 2, 'bee': 2})
    Image.fromarray(np.array([[5, 4000]], dtype=np.uint16)).save(root / 'ant' / 'deep.png')
    load(root)
    assert '--pixel-range 5 4000' in caplog.text


def loader_config():
    return dict(resolve_data_config(dict(img_size=8)), mean=(0.,) * 3, std=(1.,) * 3)


def test_images_that_break_later(make, caplog):
    root = make({'train/ant': 120, 'train/bee': 120, 'val/ant': 130, 'val/bee': 130})
    data = load(root)
    for path in ('train/ant/7.png', 'val/bee/1.png'):
        (root / path).write_bytes(b'')
    loader = create_eval_loader(data.test, loader_config(), 64, CPU, 0)
    targets = torch.cat([target for _, target in loader])
    assert torch.bincount(targets).tolist() == [130, 129] and caplog.text.count('is skipped') == 1
    loader = create_train_loader(data.train, loader_config(), 240, CPU, Augmentation(), 2)
    assert torch.bincount(next(iter(loader))[1]).tolist() == [120, 120]  # another ant in its place
    assert data.train.dataset.unreadable.sum() == 1
    for i in range(20, 23):
        (root / f'train/ant/{i}.png').write_bytes(b'')
    with pytest.raises(OSError, match='of 240 images cannot be read any more'):
        list(loader)
    one = list(create_eval_loader(data.test, loader_config(), 1, CPU, 0))
    assert sum(len(target) for _, target in one) == 259


def test_checked_images_are_remembered(make, monkeypatch):
    root = make({'ant': 3, 'bee': 3})
    (root / 'ant' / 'bad.png').write_bytes(b'nothing')
    opened = []
    plain = Image.open
    monkeypatch.setattr(Image, 'open', lambda file, *more: opened.append(str(file)) or plain(file, *more))
    assert load(root).shot_counts == [3, 3] and len(opened) == 7
    assert load(root).shot_counts == [3, 3] and len(opened) == 8  # the disk may have been at fault
    os.utime(root / 'ant' / '0.png', ns=(1, 1))
    assert load(root).shot_counts == [3, 3] and len(opened) == 10
    assert load(root, check_images=False).shot_counts == [4, 3] and len(opened) == 10
    for i in range(3):
        (root / 'bee' / f'{i}.png').write_bytes(b'')
    with pytest.raises(InputError, match="None of the 3 images of class 'bee' can be read"):
        load(root)


def test_small_sets(make):
    with pytest.raises(InputError, match="single class, 'ant'"):
        load(make({'ant': 4}))
    make({'bee': 1})
    data = load(make(), holdout=0.5)
    assert data.class_counts == [2, 1] and data.test.class_counts == [2, 0]
    with pytest.raises(InputError, match='each class has a single image'):
        load(make({'x/ant': 1, 'x/bee': 1}) / 'x')


def test_names_are_bytes():
    names = ['a', '', 'naïve', os.fsdecode(b'\xff\xfe.png')]
    kept = Names(names)
    assert list(kept) == names and len(kept) == 4 and kept.bytes.nbytes == 13


def test_the_list_of_a_run_is_kept_to(make, tmp_path):
    root = make({'ant': 10, 'bee': 10})
    data = load(root)
    data.write_sides(tmp_path)
    held = names_of(data.test)
    make(*(f'ant/new{i}.png' for i in range(5)))
    again = load(root, sides=str(tmp_path))
    assert names_of(again.test) == held and names_of(again.train) == names_of(data.train)
    assert '5 images that the run does not list' in again.describe()
    alone = create_eval_dataset('', str(root), class_names=data.class_names, sides=str(tmp_path))
    assert names_of(alone) == held
    other = make().parent / 'other'
    shutil.copytree(root / 'bee', other / 'bee')
    assert len(create_eval_dataset('', str(other), class_names=data.class_names, sides=str(tmp_path)).dataset) == 10


def by_class(data):
    return sorted((data.class_names[target], image.tobytes()) for image, target in data.dataset)


def test_hugging_face_data_sets(make, tmp_path, monkeypatch):
    pytest.importorskip('datasets')
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    root = make({'wolf': 9, 'bear': 5, 'fox': 3})
    plain = load(root)
    paths = sorted(root.glob('*/*.png'), reverse=True)
    images = pa.array(
        [dict(bytes=path.read_bytes(), path=path.name) for path in paths],
        pa.struct([('bytes', pa.binary()), ('path', pa.string())]))
    names = ['wolf', 'fox', 'bear']
    text = [path.parent.name for path in paths]
    columns = {'text': text, 'index': [names.index(label) for label in text], 'burst': [path.stem for path in paths]}
    features = dict(
        photo=dict(_type='Image'), text=dict(dtype='string', _type='Value'), burst=dict(dtype='string', _type='Value'),
        index=dict(names=names, _type='ClassLabel'))
    table = pa.table(dict(columns, photo=images))
    table = table.replace_schema_metadata({'huggingface': json.dumps(dict(info=dict(features=features)))})
    for split in ('train', 'test'):
        (tmp_path / split).mkdir()
        pq.write_table(table, tmp_path / split / 'train-0.parquet')
    pq.write_table(table.slice(0, 4), tmp_path / 'test' / 'test-0.parquet')

    def load_hub(folder, **options):
        return load_training_data(f'hfds/{tmp_path / folder}', str(tmp_path / 'cache'), input_key='photo', **options)

    for key, order in (('text', ['bear', 'fox', 'wolf']), ('index', names)):
        data = load_hub('train', target_key=key)
        assert data.class_names == order and by_class(data.test) == by_class(plain.test)
        assert by_class(data.train) == by_class(plain.train)
    data = load_hub('train', target_key='text', holdout=0.2)
    data.write_sides(tmp_path)  # a run's lists are kept to where there is one split alone
    held = create_eval_dataset(
        f'hfds/{tmp_path / "train"}', str(tmp_path / 'cache'), input_key='photo', target_key='text',
        class_names=data.class_names, sides=str(tmp_path))
    assert names_of(held) == names_of(data.test)
    assert load_hub('test', target_key='text').test.class_counts == [0, 0, 4]  # which has a split to evaluate on
    grouped = load_hub('train', target_key='text', group_key='burst', holdout=0.3)
    assert not {name.split('/')[-1] for name in names_of(grouped.train)} & {
        name.split('/')[-1] for name in names_of(grouped.test)}
    with pytest.raises(InputError, match='label'):
        load_hub('train')


def test_web_data_sets(make, tmp_path, run_script, monkeypatch):
    pytest.importorskip('webdataset')
    root = make({'wolf': 9, 'bear': 5, 'fox': 3})
    names = ['wolf', 'fox', 'bear']
    for split in ('train', 'val'):
        with tarfile.open(tmp_path / f'{split}-0.tar', 'w') as tar:
            for i, path in enumerate(sorted(root.glob('*/*.png'))):
                label = str(names.index(path.parent.name))
                for suffix, content in (('png', path.read_bytes()), ('cls', label.encode())):
                    member = tarfile.TarInfo(f'{i:04d}.{suffix}')
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    stats = tmp_path / 'stats.json'
    stats.write_text(json.dumps(dict(pos_counts=[9, 3, 5], num_samples=17, class_names=names)))

    def stream(split):  # what is no file here is read as it comes
        return dict(root='', train_split=f'pipe:cat {tmp_path}/train-0.tar', val_split=f'pipe:cat {tmp_path}/{split}')

    data = load_training_data(
        'wds/x', train_num_samples=17, batch_size=4, in_chans=1, class_stats=str(stats), **stream('val-0.tar|17'))
    assert data.class_counts == [9, 3, 5] and data.class_names == names
    image, target = next(iter(data.test.dataset))
    assert image.mode == 'L' and target == 2
    split = f'pipe:cat {tmp_path}/val-0.tar|17'
    alone = create_eval_dataset('wds/x', '', split, class_names=sorted(names), class_stats=str(stats))
    assert [target for _, target in alone.dataset] == [0] * 5 + [1] * 3 + [2] * 9
    (tmp_path / 'map.txt').write_text('W\nF\nB\n')
    named = create_eval_dataset('wds/x', '', split, class_map=str(tmp_path / 'map.txt'))
    assert named.class_names == ['W', 'F', 'B'] and next(iter(named.dataset))[1] == 2
    told, set_epoch = [], timm.data.IterableImageDataset.set_epoch
    monkeypatch.setattr(
        timm.data.IterableImageDataset, 'set_epoch', lambda self, count: told.append(count) or set_epoch(self, count))
    argv = [
        *RUN, '--dataset', 'wds/x', '--train-split', stream('')['train_split'], '--val-split', split,
        '--train-num-samples', '17', '--class-stats', stats, '--output', tmp_path / 'out']
    status, _, error = run_script('train.py', *argv, '--grad-accum-steps', '3')
    assert status == 0 and told == [0, 1, 2], error  # or else each epoch would have the order of the first
    status, _, error = run_script('train.py', *argv, '--recovery-interval', '1')
    assert status == 2 and '--recovery-interval saves the middle of an epoch' in error
    with pytest.raises(InputError, match='is a stream'):
        load_training_data('wds/x', train_num_samples=17, holdout=0.1, class_stats=str(stats), **stream('val-0.tar|17'))


def test_shards_that_are_files_are_as_good_as_a_folder(make, tmp_path, caplog):
    pytest.importorskip('webdataset')
    root = make({'wolf': 9, 'bear': 5, 'fox': 3})
    plain = load(root)
    names = plain.class_names
    for shard in range(2):
        with tarfile.open(tmp_path / f'part-{shard}.tar', 'w') as tar:
            for path in sorted(root.glob('*/*.png'))[shard::2]:
                key, label = path.relative_to(root).with_suffix(''), path.parent.name
                fields = json.dumps(dict(kind=label)).encode()
                number = b'%d' % names.index(label)
                for suffix, content in (
                        ('png', path.read_bytes()), ('cls', number), ('json', fields), ('txt', b'x')):
                    member = tarfile.TarInfo(f'{key}.{suffix}')
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    stats = tmp_path / 'stats.json'
    stats.write_text(json.dumps(dict(pos_counts=plain.shot_counts, num_samples=17, class_names=names)))
    shards = dict(train_split='part-{0..1}.tar', holdout=0.2)
    for options in (dict(class_stats=str(stats)), dict(target_key='kind')):
        data = load_training_data('wds/x', str(tmp_path), **shards, **options)
        assert data.class_names == names and names_of(data.test) == names_of(plain.test)
        assert 'class-stats' not in caplog.text
        assert names_of(data.train) == names_of(plain.train)
        assert all(np.array_equal(data.train.dataset[i][0], plain.train.dataset[i][0]) for i in range(13))
    bare = load_training_data('wds/x', str(tmp_path), **shards)
    assert bare.class_names == ['0', '1', '2'] and bare.class_counts == data.class_counts
    stats.write_text(json.dumps(dict(pos_counts=[1, 2, 3], num_samples=6)))
    assert load_training_data('wds/x', str(tmp_path), **shards, class_stats=str(stats)).shot_counts == [1, 2, 3]
    assert 'counts 6 images, but' in caplog.text
    with pytest.raises(InputError, match='hold no images'):
        load_training_data('wds/x', str(tmp_path), **shards, input_key='jpg')
    with pytest.raises(InputError, match="part-0.tar' cannot be read: 'species'"):
        load_training_data('wds/x', str(tmp_path), **shards, target_key='species')


def test_torchvision_sets_of_one_channel(tmp_path):
    folder = tmp_path / 'MNIST' / 'raw'
    folder.mkdir(parents=True)
    for split, count in (('train', 40), ('t10k', 20)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = np.zeros((count, 28, 28), np.uint8) + labels[:, None, None]
        for kind, array in (('images-idx3', images), ('labels-idx1', labels)):
            head = np.array([0x0800 + array.ndim, *array.shape], dtype='>u4').tobytes()
            (folder / f'{split}-{kind}-ubyte').write_bytes(head + array.tobytes())
    data = load_training_data('torch/mnist', str(tmp_path))
    assert data.class_counts == [4] * 10 and data.test.class_counts == [2] * 10
    assert all(np.asarray(image).shape == (28, 28, 3) and np.all(np.asarray(image) == target)
               for image, target in data.test.dataset)
    assert load_training_data('torch/mnist', str(tmp_path), holdout=0.25).test.class_counts == [1] * 10
    images, _ = next(iter(create_train_loader(data.train, loader_config(), 8, CPU, Augmentation(), 0)))
    assert images.shape == (8, 3, 8, 8)


RUN = [
    '--model', 'resnet32_shike', '--img-size', '8', '--workers', '0', '--batch-size', '4', '--epochs', '2',
    '--warmup-epochs', '0', '--crt-epochs', '1', '--device', 'cpu', '--lr', '0.05', '--experiment', 'run',
    '--no-aug',
]


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
    options = dict(class_names=[str(c) for c in range(1, 13)], sides=str(run))
    assert len(create_eval_dataset('', str(tmp_path / 'parent'), **options).dataset) == 38
    assert f"22 images of '{tmp_path / 'parent'}' have the folder and the name" in caplog.text
    again = next((tmp_path / 'again').iterdir())
    assert {row['path'] for row in csv.DictReader((again / 'validation.csv').open())} == held


@pytest.mark.parametrize('options, message', [
    (['--batch-size', '1'], 'BatchNorm'),
    (['--batch-size', '30'], 'exceeds the 24 training images'),
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


def test_a_species_folder_less_its_validation_list(make, tmp_path):
    root = make({'all/Aves/3': 3, 'all/Aves/12': 3, 'all/Fungi/4': 3})
    (tmp_path / 'val.txt').write_text('all/Aves/12/0.png 12\nall/Fungi/4/2.png 4\n')
    data = load(root, val_list=str(tmp_path / 'val.txt'), class_depth=2)
    assert data.class_names == ['3', '4', '12'] and data.class_counts == [3, 2, 2]
    assert data.test.dataset.targets.tolist() == [1, 2]


def test_an_image_of_two_categories_is_refused(make, tmp_path):
    (tmp_path / 'coco.json').write_text(json.dumps(dict(
        images=[dict(id=1, file_name='ant/0.png')], categories=[dict(id=i, name=str(i)) for i in range(2)],
        annotations=[dict(image_id=1, category_id=i) for i in range(2)])))
    with pytest.raises(InputError, match="Image 1 of .* annotated as '0' and as '1'"):
        load(make({'ant': 1}), train_list=str(tmp_path / 'coco.json'))


def test_a_teacher_of_another_order_is_heard_right(make, tmp_path):
    data = load(make({'ant': 5, 'bee': 5, 'cat': 5}))
    model = timm.create_model('resnet32_shike', num_classes=3)
    for i, order in enumerate((['ant', 'bee', 'cat'], ['cat', 'ant', 'bee'])):
        config = timm.data.resolve_model_data_config(model)
        export_model(model, tmp_path / f'{i}', config, order, pixel_range=[0, 9], exif=True)
    images = torch.rand(2, 3, 32, 32)
    own, other = (load_teacher(f'local-dir:{tmp_path}/{i}', data, (3, 32, 32), CPU)(images) for i in range(2))
    assert torch.equal(other, own[:, [1, 2, 0]]) and not torch.equal(other, own)
    trained = load_trained_model(f'local-dir:{tmp_path}/0')
    assert trained.data_args == dict(exif=True, pixel_range=[0, 9])


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
    status, _, error = run_script('train.py', *argv, '--class-depth', '2', '--exif')
    assert status == 0, error
    config = metrics(out / 'run' / 'model' / 'config.json')
    assert dict(zip(config['label_names'], config['shot_counts'])) == {
        'ant': ants, 'naïve, "b"': 6, 'one': 1, 'market/indoor': 4, 'market/outdoor': 4, 'church/outdoor': 4}
    assert 'balanced is the mean over 5 of 6 classes' in error
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
    assert status == 0 and len(told['train']['unreadable']) == 5 and told['train']['classes'] == 6
    assert {'CMYK', 'P', 'LA', 'L', 'F'} < set(told['train']['modes'])
    assert [len(told['duplicates'][kind]) for kind in ('within_class', 'across_classes')] == [1, 1]
    assert len(told['train']['left_out']) == 4
