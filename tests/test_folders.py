"""Folders of images as users keep them: which are data, of which class, on which side."""
import csv
import os
import shutil
import tarfile
from collections import Counter

import pytest
from image_data import labels_of, load, load_evaluation, names_of
from PIL import Image

from shike_timm.data.class_names import natural_order
from shike_timm.data.dataset import Names
from shike_timm.data.image_files import find_images
from shike_timm.errors import InputError


def test_a_folder_without_a_split_is_parted_by_names(make_images):
    root = make_images({'ant': 10, 'bee': 5, 'cat': 2, 'dog': 1})
    data = load(root)
    assert data.class_counts == [8, 4, 1, 1] and data.test.class_counts == [2, 1, 1, 0]
    assert data.shot_counts == [10, 5, 2, 1] and data.holdout == 0.2
    assert any("'dog'" in note or 'dog' in note for note in data.test.notes)
    assert not set(names_of(data.train)) & set(names_of(data.test))
    make_images({'eel': 7})
    make_images('bee/new.png')
    after = load(root)
    held, now = set(names_of(data.test)), set(names_of(after.test))
    assert {name for name in now if name[:3] in ('ant', 'cat')} == {name for name in held if name[:3] in ('ant', 'cat')}
    assert len(held - now) <= 1  # of the class that got an image


@pytest.mark.parametrize('folders', [('train', 'val'), ('train', 'test'), ('training', 'valid')])
def test_names_of_splits(make_images, folders):
    train, test = folders
    data = load(make_images({f'{train}/ant': 3, f'{train}/bee': 2, f'{test}/bee': 2}, f'{test}/loose.png'))
    assert data.class_counts == [3, 2] and labels_of(data.test) == {f'{test}/bee/{i}.png': 'bee' for i in range(2)}
    assert test in data.describe()


def test_what_only_looks_like_a_split(make_images):
    vehicles = load(make_images({'train': 4, 'car': 4}))  # train is a class
    assert vehicles.class_names == ['car', 'train']
    shutil.rmtree(make_images())
    root = make_images({'train/ant': 4, 'train/bee': 4, 'test': 3})
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
def test_what_a_label_is(make_images, folders, options, expected):
    root = make_images(*(f'train/{path}{twin}.png' for path in folders for twin in 'xy'))
    data = load(root, **options)
    labels = {**labels_of(data.train), **labels_of(data.test)}
    assert [labels[f'train/{path}x.png'] for path in folders] == expected


def test_a_split_with_fewer_classes_has_the_names_of_training(make_images):
    paths = ('train/a/red', 'train/b/red', 'train/b/ble\u0301', 'val/a/red', 'val/b/ble\u0301')  # decomposed
    data = load(make_images(dict.fromkeys(paths, 1)), class_depth=2)
    assert data.class_names == ['a/red', 'b/bl\u00e9', 'b/red'] and data.test.class_counts == [1, 1, 0]


def test_a_split_that_alone_is_there(make_images):
    root = make_images({'train2017/ant': 5, 'train2017/bee': 5})
    assert load(root, train_split='train2017').class_counts == [4, 4]


def test_two_readings_are_refused_and_a_model_decides(make_images):
    root = make_images({'wolf/site1': 2, 'wolf/site2': 2, 'bear/site1': 2})
    with pytest.raises(InputError, match="may be of class '.*', one of 2, .* one of 3: .*depth 1 or .*depth 2"):
        load(root)
    one = load_evaluation('', str(root), class_names=['wolf', 'bear'])
    assert Counter(labels_of(one).values()) == {'wolf': 4, 'bear': 2}
    two = load_evaluation('', str(root), class_names=['bear/site1', 'wolf/site1', 'wolf/site2'])
    assert Counter(two.targets.tolist()) == {0: 2, 1: 2, 2: 2}


def test_defects_are_named_once(make_images, caplog):
    hidden = {'.ipynb_checkpoints': 2, '__MACOSX/ant': 2, 'ant/.thumbs': 1}
    root = make_images({'ant': 5, 'bee': 5, **hidden}, 'loose.png', 'ant/._0.png')
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


def test_classes_with_odd_names(make_images, tmp_path):
    names = [*map(str, range(1, 13)), 'a, b', 'it\'s "it"', 'naïve', 'nai\u0308f']
    data = load(make_images({f'train/{name}': 2 for name in names}))
    assert data.class_names[:12] == [str(i) for i in range(1, 13)] and 'naïf' in data.class_names
    data.write_split_lists(tmp_path)
    with (tmp_path / 'validation.csv').open(newline='') as file:
        assert {row['label'] for row in csv.DictReader(file)} == set(data.class_names)
    again = load(make_images(), val_list=str(tmp_path / 'validation.csv'))
    assert names_of(again.train) == names_of(data.train) and names_of(again.test) == names_of(data.test)
    assert again.class_names == data.class_names


def test_groups_stay_together(make_images, tmp_path):
    paths = [f'{kind}/p{patient}_{i}.png' for kind in ('ill', 'well') for patient in range(10) for i in range(3)]
    root = make_images(*paths)
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


def test_checked_images_are_remembered(make_images, monkeypatch):
    root = make_images({'ant': 3, 'bee': 3})
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


def test_small_sets(make_images):
    with pytest.raises(InputError, match="single class, 'ant'"):
        load(make_images({'ant': 4}))
    make_images({'bee': 1})
    data = load(make_images(), holdout=0.5)
    assert data.class_counts == [2, 1] and data.test.class_counts == [2, 0]
    with pytest.raises(InputError, match='each class has a single image'):
        load(make_images({'x/ant': 1, 'x/bee': 1}) / 'x')


def test_names_are_bytes():
    names = ['a', '', 'naïve', os.fsdecode(b'\xff\xfe.png')]
    kept = Names(names)
    assert list(kept) == names and len(kept) == 4 and kept.bytes.nbytes == 13


@pytest.fixture
def linked(tmp_path):
    """A folder whose images and classes are partly links, and a tar archive of it."""
    root = tmp_path / 'linked'
    for name, color in (('ant', 'red'), ('bee', 'blue')):
        (root / 'real' / name).mkdir(parents=True)
        for number in range(3):
            Image.new('RGB', (8, 8), color).save(root / 'real' / name / f'{number}.png')
    (root / 'real' / 'ant' / 'up').symlink_to('.')
    (root / 'real' / 'bee' / 'round').symlink_to('round')
    (root / 'real' / 'bee' / 'gone.png').symlink_to('nowhere.png')
    os.mkfifo(root / 'real' / 'bee' / 'pipe.png')
    os.link(root / 'real' / 'ant' / '0.png', root / 'real' / 'ant' / 'hard.png')
    for name in ('.cache', '.cache/deep'):
        (root / 'real' / name).mkdir()
        (root / 'real' / name / 'x.png').write_bytes(b'')
    (root / 'train').symlink_to('real')
    (root / 'val').mkdir()
    (root / 'val' / 'ant').symlink_to('../real/ant')
    (root / 'val' / 'bee').mkdir()
    (root / 'val' / 'bee' / 'same.png').symlink_to('../../train/bee/1.png')
    with tarfile.open(tmp_path / 'linked.tar', 'w') as tar:
        tar.add(root, '.')
    return root


def test_links_are_read_in_a_folder_as_in_an_archive(linked):
    for root in (linked, linked.with_suffix('.tar')):
        data = load(root)
        assert sorted(labels_of(data.train).items()) == [
            *((f'train/ant/{name}.png', 'ant') for name in (0, 1, 2, 'hard')),
            *((f'train/bee/{number}.png', 'bee') for number in range(3))]
        assert sorted(labels_of(data.test)) == [
            *(f'val/ant/{name}.png' for name in (0, 1, 2, 'hard')), 'val/bee/same.png']
        assert data.test.read(4).getpixel((0, 0)) == (0, 0, 255)
        notes = data.train.notes
        assert '2 unreadable (train/bee/gone.png, train/bee/pipe.png)' in notes
        assert '1 file of other types (round)' in notes
        assert '2 hidden names (.cache)' in notes


def test_splits_that_link_to_one_folder(linked):
    (linked / 'train').unlink()
    shutil.rmtree(linked / 'val')
    (linked / 'training').symlink_to('real')
    (linked / 'valid').symlink_to('training')
    data = load(linked)
    assert len(data.train) == len(data.test) == 7


def test_a_folder_that_cannot_be_read_is_named(linked, monkeypatch):
    scan = os.scandir

    def scandir(path):
        if str(path).endswith('train/bee'):
            raise PermissionError(13, 'Permission denied', path)
        return scan(path)

    (linked / 'train').unlink()
    shutil.copytree(linked / 'real' / 'bee', linked / 'train' / 'bee', symlinks=True, ignore=lambda *_: ['pipe.png'])
    shutil.copytree(linked / 'real' / 'bee', linked / 'train' / 'cat', symlinks=True, ignore=lambda *_: ['pipe.png'])
    shutil.copytree(linked / 'real' / 'bee', linked / 'train' / 'ant', symlinks=True, ignore=lambda *_: ['pipe.png'])
    shutil.rmtree(linked / 'val')
    monkeypatch.setattr(os, 'scandir', scandir)
    assert '1 folders that cannot be read (train/bee)' in load(linked).describe()
    assert str(linked / 'train' / 'bee') in find_images([str(linked / 'train')])
