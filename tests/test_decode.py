"""Files of images: depth, colour, orientation, and what is broken."""
import io
import os
import struct

import numpy as np
import pytest
import torch
from image_data import CPU, load, loader_config
from PIL import Image, ImageOps

from shike_timm.data import AugmentationConfig, LoaderConfig, create_eval_loader, create_train_loader
from shike_timm.data.decode import ImageDecoder


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
    for orientation in range(1, 9):
        exif[274] = orientation
        values = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
        Image.fromarray(values).save(file := io.BytesIO(), 'png', exif=exif)
        image = Image.open(file)
        assert ImageDecoder(exif=True)(image).tobytes() == ImageOps.exif_transpose(image).tobytes()
    deep = io.BytesIO(b'P5 2 1 65535\n' + np.array([0, 65535], dtype='>u2').tobytes())
    assert ImageDecoder(exif=True)(Image.open(deep)).getextrema() == ((0, 255),) * 3


@pytest.mark.parametrize('name, size', [('tobytes', (2, 4)), ('load', (4, 2))])
def test_damaged_exif_data_is_no_fault_of_the_pixels(make_images, monkeypatch, name, size):
    """Photographs whose data cannot be written again are turned. Those whose data cannot be read are left as they are.
    """
    root = make_images({'ant': 4, 'bee': 4})
    exif = Image.Exif()
    exif[274] = 6
    Image.new('RGB', (4, 2)).save(root / 'ant' / 'phone.jpg', exif=exif)

    def fail(*args):
        raise struct.error('short format requires')

    monkeypatch.setattr(Image.Exif, name, fail)
    data = load(root, exif=True, holdout=0.4)
    images = [
        one.read(i).size for one in (data.train, data.test) for i in range(len(one)) if 'phone' in one.filename(i)]
    assert images == [size] and not data.train.notes


def test_the_memory_of_the_check_holds_all_that_decides(make_images, caplog):
    root = make_images({'ant': 4, 'bee': 4})
    path, cut = root / 'ant' / '0.png', b'no image'
    load(root)
    status = path.stat()
    path.write_bytes(cut + bytes(status.st_size - len(cut)))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # The disk spoils a file in silence.
    assert not load(root).train.notes
    for options in (dict(check_images=True), dict(exif=True), dict(in_chans=1)):
        caplog.clear()
        load(root, **options)
        assert caplog.text.count("'ant/0.png' cannot be read and is left out") == 1


def test_a_range_that_is_hardly_used_is_named(make_images, caplog):
    root = make_images({'ant': 2, 'bee': 2})
    Image.fromarray(np.array([[5, 4000]], dtype=np.uint16)).save(root / 'ant' / 'deep.png')
    for _ in range(2):  # as those that were read before
        load(root)
    assert caplog.text.count('--pixel-range 5 4000') == 2


def test_images_that_break_later(make_images, caplog):
    root = make_images({'train/ant': 120, 'train/bee': 120, 'val/ant': 130, 'val/bee': 130})
    data = load(root)
    for path in ('train/ant/7.png', 'val/bee/1.png'):
        (root / path).write_bytes(b'')
    loader = create_eval_loader(data.test, loader_config(), 64, CPU, 0)
    targets = torch.cat([target for _, target in loader])
    assert torch.bincount(targets).tolist() == [130, 129] and caplog.text.count('is skipped') == 1
    loader = create_train_loader(
        data.train, loader_config(), LoaderConfig(batch_size=240), AugmentationConfig(), CPU, 2)
    assert torch.bincount(next(iter(loader))[1]).tolist() == [120, 120]  # another ant in its place
    assert data.train.unreadable.sum() == 1
    for i in range(20, 23):
        (root / f'train/ant/{i}.png').write_bytes(b'')
    with pytest.raises(OSError, match='of 240 images cannot be read any more'):
        list(loader)
    one = list(create_eval_loader(data.test, loader_config(), 1, CPU, 0))
    assert sum(len(target) for _, target in one) == 259
