"""Data sets of other libraries' formats: Hugging Face's, WebDataset's, torchvision's."""
import io
import json
import tarfile

import numpy as np
import pytest
import timm
import torch
from image_data import CPU, RUN, labels_of, load, load_evaluation, load_named, loader_config, names_of
from torchvision.datasets import QMNIST, ImageNet, INaturalist

from shike_timm.data import AugmentationConfig, LoaderConfig, SourceConfig, create_train_loader, find_dataset
from shike_timm.errors import InputError


def by_class(data):
    return sorted((data.class_names[target], image.tobytes()) for image, target in data)


def test_hugging_face_data_sets(make_images, tmp_path, monkeypatch):
    pytest.importorskip('datasets')
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    root = make_images({'wolf': 9, 'bear': 5, 'fox': 3})
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
        return load_named(f'hfds/{tmp_path / folder}', str(tmp_path / 'cache'), input_key='photo', **options)

    for key, order in (('text', ['bear', 'fox', 'wolf']), ('index', names)):
        data = load_hub('train', target_key=key)
        assert data.class_names == order and by_class(data.test) == by_class(plain.test)
        assert by_class(data.train) == by_class(plain.train)
    data = load_hub('train', target_key='text', holdout=0.2)
    data.write_split_lists(tmp_path)  # a run's lists are kept to where there is one split alone
    held = load_evaluation(
        f'hfds/{tmp_path / "train"}', str(tmp_path / 'cache'), input_key='photo', target_key='text',
        class_names=data.class_names, run_folder=str(tmp_path))
    assert names_of(held) == names_of(data.test)
    assert load_hub('test', target_key='text').test.class_counts == [0, 0, 4]  # which has a split to evaluate on
    grouped = load_hub('train', target_key='text', group_key='burst', holdout=0.3)
    assert not {name.split('/')[-1] for name in names_of(grouped.train)} & {
        name.split('/')[-1] for name in names_of(grouped.test)}
    with pytest.raises(InputError, match='label'):
        load_hub('train')


def test_web_data_sets(make_images, tmp_path, run_script, monkeypatch):
    pytest.importorskip('webdataset')
    root = make_images({'wolf': 9, 'bear': 5, 'fox': 3})
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
        return dict(train_split=f'pipe:cat {tmp_path}/train-0.tar', val_split=f'pipe:cat {tmp_path}/{split}')

    data = load_named(
        'wds/x', train_num_samples=17, batch_size=4, in_chans=1, class_stats=str(stats), **stream('val-0.tar|17'))
    assert data.class_counts == [9, 3, 5] and data.class_names == names
    image, target = next(iter(data.test))
    assert image.mode == 'L' and target == 2
    split = f'pipe:cat {tmp_path}/val-0.tar|17'
    alone = load_evaluation('wds/x', '', val_split=split, class_names=sorted(names), class_stats=str(stats))
    assert [target for _, target in alone] == [0] * 5 + [1] * 3 + [2] * 9
    (tmp_path / 'map.txt').write_text('W\nF\nB\n')
    named = load_evaluation('wds/x', '', val_split=split, class_map=str(tmp_path / 'map.txt'))
    assert named.class_names == ['W', 'F', 'B'] and next(iter(named))[1] == 2
    told, set_epoch = [], timm.data.IterableImageDataset.set_epoch
    monkeypatch.setattr(
        timm.data.IterableImageDataset, 'set_epoch', lambda self, count: told.append(count) or set_epoch(self, count))
    argv = [
        *RUN, '--dataset', 'wds/x', '--train-split', stream('')['train_split'], '--val-split', split,
        '--train-num-samples', '17', '--class-stats', stats, '--output', tmp_path / 'out']
    status, _, error = run_script('train.py', *argv, '--grad-accum-steps', '3', '--crt-init', 'means')
    assert status == 0 and told == [0, 1, 2, 2], error  # or else each epoch would have the order of the first
    status, _, error = run_script('train.py', *argv, '--recovery-interval', '1')
    assert status == 2 and '--recovery-interval saves the middle of an epoch' in error
    with pytest.raises(InputError, match='is a stream'):
        load_named('wds/x', train_num_samples=17, holdout=0.1, class_stats=str(stats), **stream('val-0.tar|17'))


def test_shards_that_are_files_are_as_good_as_a_folder(make_images, tmp_path, caplog):
    pytest.importorskip('webdataset')
    root = make_images({'wolf': 9, 'bear': 5, 'fox': 3})
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
        data = load_named('wds/x', str(tmp_path), **shards, **options)
        assert data.class_names == names and names_of(data.test) == names_of(plain.test)
        assert 'class-stats' not in caplog.text
        assert names_of(data.train) == names_of(plain.train)
        assert all(np.array_equal(data.train[i][0], plain.train[i][0]) for i in range(13))
    bare = load_named('wds/x', str(tmp_path), **shards)
    assert bare.class_names == ['0', '1', '2'] and bare.class_counts == data.class_counts
    stats.write_text(json.dumps(dict(pos_counts=[1, 2, 3], num_samples=6)))
    assert load_named('wds/x', str(tmp_path), **shards, class_stats=str(stats)).shot_counts == [1, 2, 3]
    assert 'counts 6 images, but' in caplog.text
    with pytest.raises(InputError, match='hold no images'):
        load_named('wds/x', str(tmp_path), **shards, input_key='jpg')
    with pytest.raises(InputError, match="part-0.tar' cannot be read: 'species'"):
        load_named('wds/x', str(tmp_path), **shards, target_key='species')


def test_torchvision_sets_of_one_channel(tmp_path, caplog):
    folder = tmp_path / 'MNIST' / 'raw'
    folder.mkdir(parents=True)
    for split, count in (('train', 40), ('t10k', 20)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = np.zeros((count, 28, 28), np.uint8) + labels[:, None, None]
        for kind, array in (('images-idx3', images), ('labels-idx1', labels)):
            head = np.array([0x0800 + array.ndim, *array.shape], dtype='>u4').tobytes()
            (folder / f'{split}-{kind}-ubyte').write_bytes(head + array.tobytes())
    data = load_named('torch/mnist', str(tmp_path))
    assert data.class_counts == [4] * 10 and data.test.class_counts == [2] * 10
    assert all(np.asarray(image).shape == (28, 28, 3) and np.all(np.asarray(image) == target)
               for image, target in data.test)
    assert load_named('torch/mnist', str(tmp_path), holdout=0.25).test.class_counts == [1] * 10
    images, _ = next(iter(create_train_loader(
        data.train, loader_config(), LoaderConfig(batch_size=8), AugmentationConfig(), CPU, 0)))
    assert images.shape == (8, 3, 8, 8)
    load_named('torch/mnist', str(tmp_path), holdout=0.25).write_split_lists(tmp_path)
    load_evaluation('torch/mnist', str(tmp_path), run_folder=str(tmp_path))
    assert 'of a training image of' not in caplog.text  # where both splits number their images


@pytest.mark.parametrize('kind, of_kind, expected', [
    (INaturalist, dict(index=[(1, 'a.jpg'), (0, 'b.jpg'), (1, 'c.jpg')], all_categories=['ant', 'bee']),
     ['bee', 'ant', 'bee']),
    (ImageNet, dict(targets=[2, 0, 1], classes=[('crane',), ('maillot',), ('crane',)], wnids=['n02', 'n03', 'n01']),
     ['n01', 'n02', 'n03']),
    (ImageNet, dict(targets=[1, 0, 1], classes=[('tench', 'Tinca tinca'), ('goldfish',)], wnids=['n1', 'n2']),
     ['goldfish', 'tench', 'goldfish']),
    (QMNIST, dict(targets=torch.tensor([[5, 0, 9], [3, 1, 9], [5, 2, 9]])), ['5 - five', '3 - three', '5 - five']),
])
def test_labels_of_other_torchvision_sets(kind, of_kind, expected, monkeypatch):
    dataset = object.__new__(kind)
    vars(dataset).update(of_kind)
    monkeypatch.setattr('timm.data.create_dataset', lambda *args, **options: dataset)
    data = find_dataset('torch/x')(SourceConfig(dataset='torch/x', data_dir='.')).evaluation()
    assert labels_of(data) == {f'{i:08d}': label for i, label in enumerate(expected)}
