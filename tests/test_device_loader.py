"""Data on the device: the same images, and the same distribution of augmented ones, as one image at a time."""
from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
from image_data import load_named
from PIL import Image
from scipy.stats import chisquare
from timm.data import resolve_data_config
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, InterpolationMode
from torchvision.transforms import functional as tvf
from torchvision.transforms.autoaugment import _apply_op

from shike_timm.data import (
    AugmentationConfig,
    LoaderConfig,
    create_eval_loader,
    create_train_loader,
    in_memory_set,
)
from shike_timm.data.augment.batch import augment_batch, auto_augment, crop, cutout, why_not_batched
from shike_timm.data.augment.transforms import Cutout
from shike_timm.data.device_loader import AUGMENTED_AT_ONCE, DeviceLoader
from shike_timm.errors import InputError

CPU = torch.device('cpu')
CIFAR = resolve_data_config(dict(input_size=(3, 32, 32), crop_pct=1., mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3)))
RECIPE = dict(train_crop_mode='pad', aa='cifar10', cutout=16)
UNLIKELY = 1e-6


@pytest.fixture(scope='module')
def cifar(cifar_root):
    return load_named('cifar100_lt', str(cifar_root))


@pytest.fixture
def photo(cifar):
    return cifar.test.images[6]


def batch_of(image, num_images):
    return torch.from_numpy(image).permute(2, 0, 1).expand(num_images, -1, -1, -1)


def outcomes(images):
    return Counter(image.tobytes() for image in images.permute(0, 2, 3, 1).contiguous().numpy())


def assert_follows(counts, probabilities):
    """Counts of outcomes are a sample of a distribution, by a chi-square test; rare outcomes are pooled."""
    assert set(counts) <= set(probabilities)
    num = sum(counts.values())
    common = [key for key, p in probabilities.items() if p * num >= 5]
    observed = [counts[key] for key in common]
    expected = [probabilities[key] * num for key in common]
    rest = num - sum(expected)
    if rest > 1:
        observed.append(num - sum(observed))
        expected.append(rest)
    assert len(observed) > 1 and chisquare(observed, expected).pvalue > UNLIKELY


def test_auto_augment_has_the_distribution_of_torchvisions(photo):
    """Every outcome of torchvision's policy on one real image is enumerated with its probability."""
    transform = AutoAugment(AutoAugmentPolicy.CIFAR10)
    space = transform._augmentation_space(10, (32, 32))
    probabilities = Counter()
    for steps in transform.policies:
        for applied, signs in product(product((True, False), repeat=2), product((1, -1), repeat=2)):
            image, p = Image.fromarray(photo), 1 / len(transform.policies) / 4
            for (name, probability, index), used, sign in zip(steps, applied, signs):
                p *= probability if used else 1 - probability
                if used and p:
                    magnitudes, signed = space[name]
                    magnitude = 0. if index is None else float(magnitudes[index]) * (sign if signed else 1)
                    image = _apply_op(image, name, magnitude, InterpolationMode.NEAREST, [128] * 3)
            if p:
                probabilities[np.asarray(image).tobytes()] += p
    assert sum(probabilities.values()) == pytest.approx(1) and len(probabilities) > 60
    torch.manual_seed(0)
    assert_follows(outcomes(auto_augment(batch_of(photo, 30_000))), probabilities)


def test_crops_and_flips_have_the_distribution_of_torchvisions(photo):
    probabilities = Counter()
    padded = tvf.pad(Image.fromarray(photo), [4] * 4)
    for top, left, flip in product(range(9), range(9), (False, True)):
        image = tvf.crop(padded, top, left, 32, 32)
        probabilities[np.asarray(tvf.hflip(image) if flip else image).tobytes()] += 1 / 162
    torch.manual_seed(0)
    augmented = augment_batch(batch_of(photo, 10_000), AugmentationConfig(train_crop_mode='pad'))
    assert_follows(outcomes(augmented), probabilities)
    vertical = {photo[::-1].tobytes(): 0.2, photo.tobytes(): 0.8}
    assert_follows(outcomes(augment_batch(batch_of(photo, 5_000), AugmentationConfig(hflip=0., vflip=0.2))), vertical)


@pytest.mark.parametrize('size', [16, 3])
def test_cutout_has_the_distribution_of_the_transforms(photo, size):
    torch.manual_seed(0)
    one = [Cutout(size)(torch.from_numpy(photo).permute(2, 0, 1).clone()) for _ in range(10_000)]
    single = outcomes(torch.stack(one))
    probabilities = Counter()
    for row, column in product(range(32), range(32)):
        image = cutout(batch_of(photo, 1), torch.tensor([row]), torch.tensor([column]), size)
        probabilities[image.permute(0, 2, 3, 1).contiguous().numpy().tobytes()] += 1 / 1024
    assert_follows(single, probabilities)
    config = AugmentationConfig(hflip=0., cutout=size)
    assert_follows(outcomes(augment_batch(batch_of(photo, 20_000), config)), probabilities)


def test_each_image_is_cropped_at_its_own_place(cifar):
    images = torch.from_numpy(cifar.test.images[:20]).permute(0, 3, 1, 2)
    top, left = torch.randint(9, (2, 20))
    done = crop(images, top, left, [4, 4])
    for image, out, y, x in zip(images, done, top, left):
        assert torch.equal(out, tvf.crop(tvf.pad(image, [4] * 4), y, x, 32, 32))


def test_evaluation_batches_equal_the_workers(cifar):
    test = in_memory_set(cifar.test.images[:300], cifar.test.targets[:300], cifar.class_names)
    here = create_eval_loader(test, CIFAR, 128, CPU, 0)
    workers = create_eval_loader(test, CIFAR, 128, CPU, 0, device_data=False)
    assert isinstance(here, DeviceLoader) and not isinstance(workers, DeviceLoader)
    assert len(here) == len(workers) == 3
    for (images, target), (others, other_target) in zip(here, workers):
        assert torch.equal(images, others) and torch.equal(target, other_target)


def test_digits_equal_the_workers():
    data = load_named('digits_lt')
    config = dict(CIFAR, input_size=(3, 8, 8))
    here, workers = (create_eval_loader(data.test, config, 500, CPU, 0, device_data=wish) for wish in (True, False))
    assert torch.equal(next(iter(here))[0], next(iter(workers))[0])


def test_training_batches_hold_every_image_once(cifar):
    loader = create_train_loader(cifar.train, CIFAR, LoaderConfig(), AugmentationConfig(no_aug=True), CPU, 0)
    assert isinstance(loader, DeviceLoader) and len(loader) == 84
    torch.manual_seed(0)
    first, second = ([(images, target) for images, target in loader] for _ in range(2))
    for batches in (first, second):
        assert all(images.shape == (128, 3, 32, 32) and images.dtype == torch.float32 for images, _ in batches)
        counts = Counter(torch.cat([target for _, target in batches]).tolist())
        assert sum(counts.values()) == 84 * 128
        assert all(count <= cifar.class_counts[c] for c, count in counts.items())
    assert not torch.equal(first[0][1], second[0][1])
    mean, std = (torch.tensor(CIFAR[key]).view(3, 1, 1) * 255 for key in ('mean', 'std'))
    pixels = {(image * std + mean).round().byte().permute(1, 2, 0).contiguous().numpy().tobytes()
              for image in first[3][0]}
    assert pixels <= {image.tobytes() for image in cifar.train.images}


def test_augmentation_depends_on_the_seed_alone_and_rounds_join(cifar, monkeypatch):
    loader = create_train_loader(
        cifar.train, CIFAR, LoaderConfig(batch_size=100), AugmentationConfig(**RECIPE), CPU, 0)
    torch.manual_seed(5)
    first = torch.cat([images for images, _ in loader])
    torch.manual_seed(5)
    assert torch.equal(first, torch.cat([images for images, _ in loader]))
    assert len(first) == 10_800 < AUGMENTED_AT_ONCE
    monkeypatch.setattr('shike_timm.data.device_loader.AUGMENTED_AT_ONCE', 950)
    assert [len(images) for images, _ in loader] == [100] * 108

    plain = create_train_loader(
        cifar.train, CIFAR, LoaderConfig(batch_size=100), AugmentationConfig(no_aug=True), CPU, 0)
    epochs = []
    for at_once in (950, 16384):
        monkeypatch.setattr('shike_timm.data.device_loader.AUGMENTED_AT_ONCE', at_once)
        torch.manual_seed(5)
        epochs.append(torch.cat([images for images, _ in plain]))
    assert torch.equal(*epochs)


def test_workers_take_what_has_no_batched_form(cifar, image_folder):
    folder = load_named('', str(image_folder))
    assert not isinstance(create_eval_loader(folder.test, CIFAR, 4, CPU, 0), DeviceLoader)
    batches, on_device = (LoaderConfig(batch_size=16, device_data=wish) for wish in (None, True))
    for options, reason in (
            (dict(), '--train-crop-mode rrc works on one image'),
            (dict(train_crop_mode='pad', color_jitter=0.4), '--color-jitter 0.4'),
            (dict(RECIPE, aa='rand-m9-mstd0.5'), '--aa rand-m9-mstd0.5'),
            (dict(RECIPE, reprob=0.5), '--reprob 0.5'),
            (dict(RECIPE, mixup=1.), '--mixup or --cutmix')):
        more = AugmentationConfig(**options), CPU, 0, 100
        assert not isinstance(create_train_loader(cifar.train, CIFAR, batches, *more), DeviceLoader)
        with pytest.raises(InputError, match=f'--device-data does not work with this data set: {reason}'):
            create_train_loader(cifar.train, CIFAR, on_device, *more)
    assert why_not_batched(AugmentationConfig(**RECIPE), torch.device('mps')) == '--aa cifar10'  # for want of float64
    with pytest.raises(InputError, match='its images are 32x32, not 64x64'):
        create_train_loader(
            cifar.train, dict(CIFAR, input_size=(3, 64, 64)), on_device, AugmentationConfig(no_aug=True), CPU, 0)
    with pytest.raises(InputError, match='its images are not in memory'):
        create_eval_loader(folder.test, CIFAR, 4, CPU, 0, device_data=True)
    with pytest.raises(InputError, match='--crop-pct is 0.9, not 1'):
        create_eval_loader(cifar.test, dict(CIFAR, crop_pct=0.9), 4, CPU, 0, device_data=True)
