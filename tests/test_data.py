import math
import os
import pickle
import shutil
import tarfile
from collections import Counter

import numpy as np
import pytest
import timm.data
import torch
from image_data import load_evaluation, load_named
from PIL import Image
from timm.data import IterableImageDataset, resolve_data_config
from torchvision import transforms

from shike_timm.data import (
    AugmentationConfig,
    DataSource,
    LoaderConfig,
    StreamSet,
    create_eval_loader,
    create_train_loader,
    in_memory_set,
    register_dataset,
    set_stream_epoch,
)
from shike_timm.data.augment.transforms import Cutout, create_train_transform
from shike_timm.data.registry import DATASETS
from shike_timm.data.sources.long_tailed import long_tailed_counts, long_tailed_indices
from shike_timm.errors import InputError
from shike_timm.metrics import ShotConfig, shot_divisions

CPU = torch.device('cpu')


@pytest.mark.parametrize('imb_factor, total, smallest', [(100, 10_847, 5), (50, 12_608, 10)])
def test_cifar100_lt_is_the_published_subset(cifar_root, imb_factor, total, smallest):
    data = load_named('cifar100_lt', str(cifar_root), imb_factor=imb_factor)
    assert len(data.train) == sum(data.class_counts) == total
    assert data.class_counts[0] == 500 and data.class_counts[-1] == smallest
    assert len(data.test) == 10_000
    assert data.class_names[0] == 'apple'
    if imb_factor == 100:
        sizes = [int(mask.sum()) for mask in shot_divisions(data.class_counts).values()]
        assert sizes == [35, 35, 30]
    # The first images of each class in file order.
    raw = pickle.loads((cifar_root / 'cifar-100-python' / 'train').read_bytes(), encoding='latin1')
    labels = np.array(raw['fine_labels'])
    first = np.flatnonzero(labels == 99)[:smallest]
    kept = np.flatnonzero(data.train.targets == 99)
    assert np.array_equal(data.train.images[kept], raw['data'][first].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def test_a_share_of_each_class_is_held_out(cifar_root):
    whole = load_named('digits_lt', imb_factor=20)
    data = load_named('digits_lt', imb_factor=20, holdout=0.1)
    held = np.array(data.test.class_counts)
    assert held.tolist() == [math.ceil(count / 10) for count in whole.class_counts]
    assert (held + data.class_counts).tolist() == whole.class_counts
    for c in (0, 9):  # the last images of each class
        images = [part.images[part.targets == c] for part in (whole.train, data.train, data.test)]
        assert np.array_equal(images[0], np.concatenate(images[1:]))
    with pytest.raises(InputError, match='holdout 0.9 leaves class 8 with no training image of 8'):
        load_named('digits_lt', imb_factor=20, holdout=0.9)
    assert data.shot_counts == whole.class_counts
    torch_set = load_named('torch/cifar100', str(cifar_root), holdout=0.1)
    assert torch_set.class_counts == [450] * 100 and torch_set.test.class_counts == [50] * 100


def test_a_balanced_set_is_held_out_before_the_cut(cifar_root):
    whole = load_named('torch/cifar100', str(cifar_root)).train
    data = load_named('cifar100_lt', str(cifar_root), val_per_class=50)
    assert data.class_counts[0] == 450 and data.class_counts[-1] == 4 and data.test.class_counts == [50] * 100
    for c in (0, 99):
        images = whole.images[whole.targets == c]
        assert np.array_equal(data.test.images[data.test.targets == c], images[-50:])
        assert np.array_equal(data.train.images[data.train.targets == c], images[:data.class_counts[c]])
    with pytest.raises(InputError, match='val-per-class 124 leaves class 8 with no training image of 124'):
        load_named('digits_lt', val_per_class=124)
    with pytest.raises(InputError, match='val-per-class 5 contradicts holdout 0.1'):
        load_named('digits_lt', val_per_class=5, holdout=0.1)
    with pytest.raises(InputError, match="val-per-class 5 is for the .*_lt data sets, and 'torch/cifar100'"):
        load_named('torch/cifar100', val_per_class=5)


def test_cifar10_lt_counts():
    assert sum(long_tailed_counts(5000, 10, 100)) == 12_406
    assert sum(long_tailed_counts(5000, 10, 50)) == 13_996


def test_step_profile():
    assert long_tailed_counts(100, 4, 10, 'step') == [100, 100, 10, 10]


def test_a_seeded_subset_is_that_of_ldam_drw():
    targets = np.random.default_rng(0).permutation(np.repeat(np.arange(3), 50))
    np.random.seed(7)  # as that code does
    kept = []
    for c, count in enumerate((50, 20, 5)):
        positions = np.where(targets == c)[0]
        np.random.shuffle(positions)
        kept += positions[:count].tolist()
    assert long_tailed_indices(targets, (50, 20, 5), seed=7).tolist() == sorted(kept)
    first, seeded = (load_named('digits_lt', imb_factor=20, imb_seed=seed) for seed in (None, 0))
    assert first.class_counts == seeded.class_counts
    assert not np.array_equal(first.train.images, seeded.train.images)


def test_shot_thresholds():
    masks = shot_divisions([5, 10, 20, 40], ShotConfig(20, 10))
    assert [mask.tolist() for mask in masks.values()] == [
        [False, False, False, True], [False, True, True, False], [True, False, False, False]]


def test_indices_keep_file_order():
    assert long_tailed_indices([1, 0, 1, 0, 1, 0], [2, 1]).tolist() == [0, 1, 3]


def test_a_profile_that_leaves_a_class_empty():
    with pytest.raises(InputError, match='imb-factor 600 leaves class 97 with no training image'):
        long_tailed_counts(500, 100, 600)


def test_digits_test_split_is_fixed_and_balanced():
    one, other = (load_named('digits_lt', imb_factor=factor) for factor in (10, 60))
    assert one.test.class_counts == [50] * 10
    assert np.array_equal(one.test.images, other.test.images)
    assert other.class_counts == [124, 78, 49, 31, 20, 12, 8, 5, 3, 2]
    train = {image.tobytes() for image in one.train.images}
    # scikit-learn's digits hold no two equal scans across these splits.
    assert not train & {image.tobytes() for image in one.test.images}


def test_folder(image_folder):
    data = load_named('', str(image_folder))
    assert data.class_counts == [24, 12, 6] and data.class_names == ['ant', 'bee', 'cat']
    assert len(data.test) == 12


def test_folder_classes_of_the_evaluation_split_follow_training(image_folder):
    shutil.rmtree(image_folder / 'validation' / 'ant')
    data = load_named('', str(image_folder))
    assert [target for _, target in data.test] == [1] * 4 + [2] * 4
    assert data.test.class_names == data.class_names
    alone = load_evaluation('', str(image_folder), class_names=['cat', 'dog', 'bee'])
    assert [target for _, target in alone] == [2] * 4 + [0] * 4


def test_folders_are_scanned_once(image_folder, monkeypatch):
    listed = Counter()

    def scandir(path):
        listed[str(path)] += 1
        return plain(path)

    plain = os.scandir
    monkeypatch.setattr(os, 'scandir', scandir)
    load_named('', str(image_folder))
    leaves = [folder for folder in map(str, image_folder.glob('*/*'))]
    assert len(leaves) == 6 and all(listed[folder] == 1 for folder in leaves)


def test_an_archive_can_be_evaluated_on_alone(image_folder, tmp_path):
    path = str(tmp_path / 'images.tar')
    with tarfile.open(path, 'w') as tar:
        tar.add(image_folder / 'validation', '')
    alone = load_evaluation('', path, class_names=['cat', 'bee', 'ant'])
    assert [alone[i][1] for i in (0, 11)] == [2, 0]
    data = load_named('', path)  # parted by the rule, as a folder is
    assert data.class_counts == [3, 3, 3] and data.test.class_counts == [1, 1, 1]


class Stream:
    """What a reader of a stream shows of itself, as that of web data sets."""

    class_to_idx = {}

    def __iter__(self):
        yield from ((Image.new('RGB', (8, 8)), i % 3) for i in range(20))

    def __len__(self):
        return 20


def test_what_a_library_raises_is_one_sentence(monkeypatch):
    class Broken(Exception):
        pass

    def broken(name, **kwargs):
        raise Broken('the shards have other columns')

    monkeypatch.setattr(timm.data, 'create_dataset', broken)
    with pytest.raises(InputError, match="The train split of 'hfds/x' cannot be read: the shards have other columns"):
        load_named('hfds/x')


class Noise(Stream):
    """Images that a worker draws as it augments: by its own random numbers."""

    def __iter__(self):
        yield from ((Image.fromarray(torch.randint(256, (8, 8, 3), dtype=torch.uint8).numpy()), 0) for _ in range(20))


def test_workers_of_a_stream_draw_from_its_seed():
    def epoch(loader, seed):
        set_stream_epoch(loader, 1, seed)
        return next(iter(loader))[0]

    def make():
        config = resolve_data_config({'input_size': (3, 8, 8)})
        return create_train_loader(
            StreamSet(Noise()), config, LoaderConfig(batch_size=8), AugmentationConfig(no_aug=True), CPU, 1)

    one = make()
    first, second = epoch(one, 5), epoch(one, 6)
    assert not torch.equal(first, second) and torch.equal(epoch(make(), 6), second)  # as a run that is resumed has it


def test_counts_come_from_a_file_where_labels_are_not_listed(image_folder, tmp_path, monkeypatch):
    stats = tmp_path / 'stats.json'
    stats.write_text('{"pos_counts": [10, 6, 4], "num_samples": 20}')
    assert load_named('', str(image_folder), class_stats=str(stats)).class_counts == [10, 6, 4]
    monkeypatch.setattr(
        timm.data, 'create_dataset', lambda name, **kwargs: IterableImageDataset(None, reader=Stream()))
    with pytest.raises(InputError, match="dataset 'wds/x' does not list its labels"):
        load_named('wds/x')
    data = load_named('wds/x', class_stats=str(stats))
    assert data.class_counts == [10, 6, 4] and data.class_names == ['0', '1', '2']
    config = dict(resolve_data_config(dict(img_size=8)), mean=(0.,) * 3, std=(1.,) * 3)
    batches = list(create_train_loader(
        data.train, config, LoaderConfig(batch_size=8), AugmentationConfig(), CPU, 0))
    assert [target.tolist() for _, target in batches] == [[0, 1, 2, 0, 1, 2, 0, 1], [2, 0, 1, 2, 0, 1, 2, 0]]
    assert sum(len(images) for images, _ in create_eval_loader(data.test, config, 8, CPU, 0)) == 20
    for text, message in (
            ('{}', 'stats.json.* cannot be read'),
            ('{"pos_counts": [10, 0, 4], "num_samples": 20}', "Class '1' has no training image")):
        stats.write_text(text)
        with pytest.raises(InputError, match=message):
            load_named('wds/x', class_stats=str(stats))
    with pytest.raises(InputError, match="not for 'digits_lt'"):
        load_named('digits_lt', class_stats=str(stats))
    stats.write_text('{"pos_counts": [10, 10], "num_samples": 20}')
    monkeypatch.undo()
    with pytest.raises(InputError, match='counts 2 classes, but 3 have names'):
        load_named('', str(image_folder), class_stats=str(stats))


def test_a_data_set_is_an_entry(monkeypatch):
    monkeypatch.setattr('shike_timm.data.registry.DATASETS', dict(DATASETS))

    @register_dataset('mine')
    class Mine(DataSource):
        def train(self, class_names=None):
            return in_memory_set(np.zeros((3, 4, 4, 3), np.uint8), [0, 1, 1], ['a', 'b'])

        evaluation = train

    data = load_named('mine')
    assert data.class_counts == [1, 2] and data.class_names == ['a', 'b']
    assert data.test[2][1] == 1 and data.test[0][0].size == (4, 4)
    with pytest.raises(ValueError, match='mine'):
        register_dataset('mine')(Mine)


def test_torchvision_dataset(cifar_root):
    data = load_named('torch/cifar100', str(cifar_root))
    assert data.class_counts == [500] * 100 and len(data.class_names) == 100


@pytest.mark.parametrize('change, message', [
    (lambda root: (root / 'train' / 'cat').rename(root / 'cats'), "Class 'cat' of the validation split"),
    (lambda root: shutil.rmtree(root / 'train'), 'has no train split'),
    (shutil.rmtree, 'does not exist'),
])
def test_bad_folders(image_folder, change, message):
    change(image_folder)
    with pytest.raises(InputError, match=message):
        load_named('', str(image_folder))


def test_empty_folder(tmp_path):
    (tmp_path / 'train').mkdir()
    with pytest.raises(InputError, match='holds no images'):
        load_named('', str(tmp_path))


def test_unknown_names(image_folder):
    with pytest.raises(InputError, match="dataset 'cifar_lt' is unknown"):
        load_named('cifar_lt')
    with pytest.raises(InputError, match="dataset 'foo/bar' is unknown"):
        load_named('foo/bar', str(image_folder))
    with pytest.raises(InputError, match="named for dataset 'torch/cifar100'"):
        load_named('torch/cifar100')
    with pytest.raises(InputError, match='No folder of data was named'):
        load_named('')
    with pytest.raises(InputError, match="Class 'ant' .* not among the 2 of training"):
        load_evaluation('', str(image_folder), class_names=['bee', 'cat'])


def test_cifar_errors_name_the_file(cifar_root, tmp_path):
    with pytest.raises(InputError, match="has no folder 'cifar-100-python'"):
        load_named('cifar100_lt', str(tmp_path))
    folder = tmp_path / 'cifar-100-python'
    shutil.copytree(cifar_root / 'cifar-100-python', folder)
    with (folder / 'test').open('r+b') as file:
        file.seek(1000)
        file.write(b'x')
    with pytest.raises(InputError, match="cifar-100-python/test' is damaged"):
        load_named('cifar100_lt', str(tmp_path))
    (folder / 'meta').unlink()
    (folder / 'test').unlink()
    with pytest.raises(InputError, match="lacks the file '.*test'"):
        load_named('cifar100_lt', str(tmp_path))


def test_cutout():
    torch.manual_seed(0)
    sizes, covered = Counter(), torch.zeros(32, 32)
    for _ in range(2000):
        hole = (Cutout(16)(torch.ones(3, 32, 32, dtype=torch.uint8)) == 0)
        assert hole.any() and torch.equal(hole[0], hole[2])
        rows, columns = int(hole[0].any(1).sum()), int(hole[0].any(0).sum())
        assert int(hole[0].sum()) == rows * columns
        sizes[rows] += 1
        covered += hole[0]
    assert min(sizes) == 8 and max(sizes) == 16
    # 17 of the 32 centres leave the square whole.
    assert sizes[16] / 2000 == pytest.approx(17 / 32, abs=0.04)
    assert float(covered[16, 16]) / 2000 == pytest.approx(0.25, abs=0.04)


def test_cifar_recipe():
    transform = create_train_transform(
        (3, 32, 32), AugmentationConfig(train_crop_mode='pad', aa='cifar10', cutout=16))
    kinds = [type(step).__name__ for step in transform.transforms]
    assert kinds == ['Resize', 'RandomCrop', 'RandomHorizontalFlip', 'AutoAugment', 'MaybePILToTensor', 'Cutout']
    crop, policy = transform.transforms[1], transform.transforms[3]
    assert crop.padding == [4, 4] and crop.fill == 0
    assert policy.policy == transforms.AutoAugmentPolicy.CIFAR10 and policy.fill == [128] * 3
    image = transform(Image.new('RGB', (32, 32), (200, 100, 50)))
    assert image.shape == (3, 32, 32) and image.dtype == torch.uint8


@pytest.mark.parametrize('options', [
    dict(aa='original'),
    dict(aa='rand-m9-mstd0.5-inc1'),
    dict(aa='rand-m9-mstd0.5-inc1', train_crop_mode='pad', cutout=4),
    dict(train_crop_mode='rkrc', vflip=0.5, color_jitter=0.4),
    dict(no_aug=True, aa='cifar10'),
])
def test_timm_augmentation(options):
    transform = create_train_transform((3, 24, 24), AugmentationConfig(**options))
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (32, 40, 3), dtype=np.uint8))
    for _ in range(100):
        assert torch.as_tensor(transform(image)).shape == (3, 24, 24)


def test_colours_are_jittered_before_a_policy_where_that_is_asked_for():
    for force, expected in ((False, []), (True, [(0.6, 1.4)] * 3)):
        options = dict(aa='rand-n2-m10-mstd0.5', force_color_jitter=force)
        steps = create_train_transform((3, 24, 24), AugmentationConfig(**options)).transforms
        names = [type(step).__name__ for step in steps]
        jitter = [step for step in steps if isinstance(step, transforms.ColorJitter)]
        assert [pair for step in jitter for pair in (step.brightness, step.contrast, step.saturation)] == expected
        assert not force or names.index('ColorJitter') == names.index('RandAugment') - 1


def test_loaders(image_folder):
    data = load_named('', str(image_folder))
    config = dict(resolve_data_config(dict(img_size=16)), mean=(0., 0., 0.), std=(1., 1., 1.))
    erasing = AugmentationConfig(reprob=1., remode='const', color_jitter=0.)
    batches_of_16 = LoaderConfig(batch_size=16)
    loader = create_train_loader(data.train, config, batches_of_16, erasing, CPU, 0)
    batches = list(loader)
    assert len(batches) == 2
    assert batches[0][0].shape == (16, 3, 16, 16) and batches[0][1].dtype == torch.int64
    assert (batches[0][0] == 0).flatten(1).any(1).all()  # erased
    total = sum(len(images) for images, _ in create_eval_loader(data.test, config, 5, CPU, 0))
    assert total == 12
    mixed = create_train_loader(
        data.train, config, batches_of_16, AugmentationConfig(mixup=1.), CPU, 0, num_classes=3)
    _, target = next(iter(mixed))
    assert target.shape == (16, 3) and torch.allclose(target.sum(1), torch.ones(16))
    with pytest.raises(InputError, match='batch-size 64 exceeds the 42'):
        create_train_loader(data.train, config, LoaderConfig(batch_size=64), AugmentationConfig(), CPU, 0)
    with pytest.raises(InputError, match="aa 'nonsense' is not a policy"):
        create_train_loader(data.train, config, batches_of_16, AugmentationConfig(aa='nonsense'), CPU, 0)
