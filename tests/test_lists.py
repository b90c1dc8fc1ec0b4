"""Lists, tables and archives of images: what they name, how they are read, and what is refused."""
import csv
import json
import shutil
import tarfile
import unicodedata

import numpy as np
import pytest
from image_data import labels_of, load, load_evaluation, load_named, names_of

from shike_timm.data import SourceConfig
from shike_timm.data.sources.lists import load_list
from shike_timm.errors import InputError


def test_sources_agree(make_images, tmp_path):
    root = make_images({'wolf': 9, 'bear': 5, 'fox': 3})
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
        load_named('torch/image_folder', str(root)),
    ]
    for other in others:
        assert other.class_names == ['bear', 'fox', 'wolf'] and other.class_counts == plain.class_counts == [4, 2, 7]
        for one, same in zip((plain.train, plain.test), (other.train, other.test)):
            assert [name.removeprefix('wrapped/') for name in names_of(same)] == names_of(one)
            assert all(np.array_equal(one[i][0], same[i][0]) for i in range(len(one)))
    coco = load(root, train_list=str(tmp_path / 'coco.json'))
    assert coco.class_names == classes and sorted(names_of(coco.test)) == sorted(names_of(plain.test))
    assert labels_of(coco.train) == labels_of(plain.train)
    nested = load(tmp_path / 'nested.tar', class_depth=2)
    assert nested.class_counts == [4, 2, 7] and nested.train[5][0].size == (5, 6)


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
def test_bad_lists(make_images, tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        load(make_images({'ant': 2, 'bee': 2}), train_list=str(tmp_path / name))


@pytest.mark.parametrize('text', [
    'path,label\nant/0.png,ant \nant/1.png,ant\nbee/0.png, bee\nbee/1.png,bee\n',
    '\ufeffpath;label\nant/0.png;ant\nant/1.png;ant\nbee/0.png;bee\nbee/1.png;bee\n',
    'path\tlabel\nant/0.png\tant\nant/1.png\tant\nbee/0.png\tbee\nbee/1.png\tbee\n',
    'ant/0.png,ant\nant/1.png,ant\nbee/0.png,bee\nbee/1.png,bee\n',
    ' path , label \nant/0,ant\nant/1,ant\nbee/0,bee\nbee/1,bee\n',
])
def test_tables_as_people_write_them(make_images, tmp_path, text):
    (tmp_path / 'l.csv').write_text(text, encoding='utf-8')
    root = make_images({'ant': 2, 'bee': 2})
    if '.png' not in text:
        for path in list(root.rglob('*.png')):
            path.rename(path.with_suffix('.jpg'))
    data = load(root, train_list=str(tmp_path / 'l.csv'), holdout=0.5)
    assert data.class_names == ['ant', 'bee'] and data.class_counts == data.test.class_counts == [1, 1]


def test_numbers_of_classes_with_and_without_zeros(make_images, tmp_path):
    root = make_images({'00003': 3, '00010': 3, '00011': 3})
    (tmp_path / 'l.csv').write_text('path,label\n00010/0.png,10\n00003/1.png,3\n')
    data = load(root, val_list=str(tmp_path / 'l.csv'))
    assert data.class_names == ['00003', '00010', '00011'] and data.test.class_counts == [1, 1, 0]
    assert data.class_counts == [2, 2, 3] and labels_of(data.test)['00010/0.png'] == '00010'


def test_lists(make_images, tmp_path):
    root = make_images({'a': 6})
    train, test = tmp_path / 'train.txt', tmp_path / 'val.txt'
    train.write_text('a/0.png 3\r\na/1.png 10\na/2.png 3\na/2.png 3\n\n', newline='')
    test.write_text('a/3.png 10\n')
    data = load(root, train_list=str(train), val_list=str(test))
    assert data.class_names == ['3', '10'] and data.class_counts == [2, 1]
    assert [target for _, target in data.test] == [1] and '1 repeated entries' in data.describe()
    (tmp_path / 'spelled.txt').write_text(f'./a/0.png a\n{root}/a//1.png a\na/1.png a\n')
    with pytest.raises(InputError, match='single class'):
        load(root, val_list=str(tmp_path / 'spelled.txt'))
    make_images({'b': 2})
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
        load_named('digits_lt', group_key='a')
    for ask in (load_named, load_evaluation):
        with pytest.raises(InputError, match="dataset 'digits_lt' is not in one"):
            ask('digits_lt', val_list=str(train))
    with pytest.raises(InputError, match='imb-seed 0 is for the .*_lt data sets'):
        load(root, imb_seed=0)
    with pytest.raises(InputError, match="val-split 'other' is not for 'digits_lt', whose splits are fixed"):
        load_named('digits_lt', val_split='other')
    # What a model carries to other data is no fault, nor is a split by the name it has.
    assert load_named('digits_lt', exif=True, val_split='test').class_counts
    with pytest.raises(InputError, match="target-key 'kind' is for lists"):
        load(root, target_key='kind')
    with pytest.raises(InputError, match='train-num-samples 5 is for streams'):
        load(root, train_num_samples=5)


def test_a_class_map_names_and_orders(make_images, tmp_path):
    root = make_images({'ant': 4, 'bee': 4, 'cat': 4})
    (tmp_path / 'map.txt').write_text('cat\nant\n', encoding='utf-8-sig')
    data = load(root, class_map=str(tmp_path / 'map.txt'))
    assert data.class_names == ['cat', 'ant'] and '4 images of 1 classes' in data.describe()
    (tmp_path / 'list.txt').write_text(
        ''.join(f'{kind}/{i}.png {label}\n' for label, kind in enumerate(('cat', 'ant')) for i in range(4)))
    listed = load(root, class_map=str(tmp_path / 'map.txt'), train_list=str(tmp_path / 'list.txt'))
    assert labels_of(listed.train) == labels_of(data.train)
    make_images({'näher': 4})
    (tmp_path / 'map.txt').write_text(unicodedata.normalize('NFD', 'cat\nnäher\n'), encoding='utf-8')
    assert load(root, class_map=str(tmp_path / 'map.txt')).class_counts == [4 - 1, 4 - 1]
    (tmp_path / 'numbers.txt').write_text('3\n1\n')
    numbered = load(make_images({'0': 4, '1': 4, '3': 4}), class_map=str(tmp_path / 'numbers.txt'))
    assert numbered.class_counts == [4 - 1, 4 - 1] and {
        numbered.train.filename(i)[0] for i in range(6)} == {'1', '3'}  # and no 0 as the first class
    (tmp_path / 'map.txt').write_text('cat\nant\ncat\n')
    with pytest.raises(InputError, match='repetitions'):
        load(root, class_map=str(tmp_path / 'map.txt'))


def test_the_list_of_a_run_is_kept_to(make_images, tmp_path):
    root = make_images({'ant': 10, 'bee': 10})
    data = load(root)
    data.write_split_lists(tmp_path)
    held = names_of(data.test)
    make_images(*(f'ant/new{i}.png' for i in range(5)))
    again = load(root, run_folder=str(tmp_path))
    assert names_of(again.test) == held and names_of(again.train) == names_of(data.train)
    assert '5 images that the run does not list' in again.describe()
    alone = load_evaluation('', str(root), class_names=data.class_names, run_folder=str(tmp_path))
    assert names_of(alone) == held
    other = make_images().parent / 'other'
    shutil.copytree(root / 'bee', other / 'bee')
    assert len(load_evaluation('', str(other), class_names=data.class_names, run_folder=str(tmp_path))) == 10


def test_a_run_of_lists_is_not_evaluated_on_what_it_was_trained_on(make_images, tmp_path, caplog):
    root = make_images({'ant': 12, 'bee': 12})
    (tmp_path / 'val.csv').write_text('path,label\nant/0.png,ant\nbee/1.png,bee\n')
    data = load(root, val_list=str(tmp_path / 'val.csv'))
    data.write_split_lists(tmp_path)
    alone = load_evaluation('', str(root), class_names=data.class_names, run_folder=str(tmp_path))
    assert labels_of(alone) == {'ant/0.png': 'ant', 'bee/1.png': 'bee'}
    (tmp_path / 'other.txt').write_text('bee/2.png bee\nbee/1.png bee\n')
    options = dict(class_names=data.class_names, run_folder=str(tmp_path))
    for ask in (load_named, load_evaluation):
        caplog.clear()
        ask('', str(root), val_list=str(tmp_path / 'val.csv'), **options)
        assert not caplog.text
        ask('', str(root), val_list=str(tmp_path / 'other.txt'), **options)
        assert '1 images of' in caplog.text and 'of a training image of' in caplog.text
    for name in labels_of(alone):
        (root / name).unlink()
    with pytest.raises(InputError, match='None of the images .* validation.csv is in the data'):
        load_evaluation('', str(root), **options)


def test_labels_of_a_run_are_not_taken_from_folders(make_images, tmp_path):
    root = make_images({'ant': 4, 'bee': 4})
    names = [f'{kind}/{i}.png' for kind in ('ant', 'bee') for i in range(4)]
    corrected = {name: ('bee', 'ant')[i % 2] for i, name in enumerate(names)}
    (tmp_path / 'all.txt').write_text(''.join(f'{name} {label}\n' for name, label in corrected.items()))
    data = load(root, train_list=str(tmp_path / 'all.txt'), holdout=0.5)
    data.write_split_lists(tmp_path)
    options = dict(class_names=data.class_names, run_folder=str(tmp_path))
    with pytest.raises(InputError, match='is of class .* here and of .* --val-list .*validation.csv'):
        load_evaluation('', str(root), **options)
    listed = load_evaluation('', str(root), val_list=str(tmp_path / 'validation.csv'), **options)
    assert labels_of(listed) == labels_of(data.test)


def test_groups_on_both_sides_are_told(make_images, caplog):
    root = make_images('train/ant/a1.png', 'train/ant/b1.png', 'train/bee/c1.png', 'val/ant/a2.png', 'val/bee/d2.png')
    load(root, group_key='([a-z])[0-9]')
    assert "1 groups of --group-key '([a-z])[0-9]' are in training and in evaluation" in caplog.text


def test_a_species_folder_less_its_validation_list(make_images, tmp_path):
    root = make_images({'all/Aves/3': 3, 'all/Aves/12': 3, 'all/Fungi/4': 3})
    (tmp_path / 'val.txt').write_text('all/Aves/12/0.png 12\nall/Fungi/4/2.png 4\n')
    data = load(root, val_list=str(tmp_path / 'val.txt'), class_depth=2)
    assert data.class_names == ['3', '4', '12'] and data.class_counts == [3, 2, 2]
    assert data.test.targets.tolist() == [1, 2]


def test_an_image_of_two_categories_is_refused(make_images, tmp_path):
    (tmp_path / 'coco.json').write_text(json.dumps(dict(
        images=[dict(id=1, file_name='ant/0.png')], categories=[dict(id=i, name=str(i)) for i in range(2)],
        annotations=[dict(image_id=1, category_id=i) for i in range(2)])))
    with pytest.raises(InputError, match="Image 1 of .* annotated as '0' and as '1'"):
        load(make_images({'ant': 1}), train_list=str(tmp_path / 'coco.json'))


def test_names_without_extensions_are_found_in_an_archive_too(make_images, tmp_path):
    root = make_images({'a': 3, 'b': 2})
    with tarfile.open(tmp_path / 'all.tar', 'w') as tar:
        for folder in ('a', 'b'):
            tar.add(root / folder, folder)
    rows = [f'{folder}/{path.stem},{folder}' for folder in ('a', 'b') for path in sorted((root / folder).iterdir())]
    (tmp_path / 'ids.csv').write_text('\n'.join(['id,label', *rows]))
    for data in (root, tmp_path / 'all.tar'):
        config = SourceConfig(data_dir=str(data), train_list=str(tmp_path / 'ids.csv'), input_key='id')
        assert load_list(config, config.train_list).class_counts == [3, 2]
