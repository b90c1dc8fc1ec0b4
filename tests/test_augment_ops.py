"""The batched image operations against torchvision's on Pillow images."""
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR100
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, InterpolationMode
from torchvision.transforms.autoaugment import _apply_op

from shike_timm.data.augment.ops import OPS

NUM_BINS = 10


@pytest.fixture(scope='module')
def photos(cifar_root):
    """300 test images, and made ones with the histograms that real ones seldom have."""
    rng = np.random.default_rng(0)
    flat = np.broadcast_to(np.arange(0, 256, 51, dtype=np.uint8)[:, None, None, None], (6, 32, 32, 3))
    spots = np.where(rng.random((20, 32, 32, 1)) < np.linspace(0.001, 0.5, 20)[:, None, None, None], 255, 3)
    spots = np.broadcast_to(spots, (20, 32, 32, 3)).astype(np.uint8)
    noise = rng.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    return np.concatenate([CIFAR100(cifar_root, train=False).data[:300], flat, spots, noise])


def to_tensor(images):
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)


def torchvision_op(images, name, magnitude):
    done = [_apply_op(Image.fromarray(i), name, magnitude, InterpolationMode.NEAREST, [128] * 3) for i in images]
    return to_tensor(np.stack([np.asarray(i) for i in done]))


@pytest.mark.parametrize('name', OPS)
@pytest.mark.parametrize('size', [(32, 32), (20, 28)])
def test_every_magnitude_equals_pillows(photos, name, size):
    height, width = size
    images = photos[:, :height, :width]
    magnitudes, signed = AutoAugment()._augmentation_space(NUM_BINS, (height, width))[name]
    magnitudes = magnitudes.expand(NUM_BINS) if magnitudes.ndim else magnitudes[None]
    for magnitude in torch.cat([magnitudes, -magnitudes]) if signed else magnitudes:
        done = OPS[name](to_tensor(images), magnitude.double().expand(len(images)))
        assert done.dtype == torch.uint8
        assert torch.equal(done, torchvision_op(images, name, float(magnitude))), float(magnitude)


def test_each_image_has_its_own_magnitude(photos):
    images = to_tensor(photos[:40])
    for name, op in OPS.items():
        magnitudes, _ = AutoAugment()._augmentation_space(NUM_BINS, (32, 32))[name]
        magnitudes = magnitudes.expand(NUM_BINS).double().repeat(4)
        together = op(images, magnitudes)
        alone = torch.cat([op(images[i:i + 1], magnitudes[i:i + 1]) for i in range(40)])
        assert torch.equal(together, alone), name


def test_the_operations_of_the_cifar_policy_are_all_there():
    policies = AutoAugment(AutoAugmentPolicy.CIFAR10).policies
    assert {name for policy in policies for name, _, _ in policy} <= set(OPS)
