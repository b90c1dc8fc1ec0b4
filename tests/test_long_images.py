"""Very long images, and formats that need another package."""
import io
import tarfile

import numpy as np
import pytest
import timm.data
from PIL import Image

from shike_timm.data import SourceConfig
from shike_timm.data.augment.transforms import create_eval_transform
from shike_timm.data.decode import HEIF, image_extensions, open_image
from shike_timm.data.load import load_training_data
from shike_timm.errors import InputError

CONFIG = dict(input_size=(3, 64, 64), crop_pct=0.875, interpolation='bicubic', mean=(.5,) * 3, std=(.5,) * 3)


@pytest.mark.parametrize('size, most', [
    ((64, 64), 0), ((500, 70), 0), ((40, 300), 0), ((2000, 3), 3), ((3, 2003), 3), ((1999, 100), 3), ((151, 3001), 3)])
def test_long_images_give_what_timm_gives(size, most):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    expected = np.asarray(timm.data.create_transform(**CONFIG, use_prefetcher=True)(image)).astype(int)
    found = np.asarray(create_eval_transform(dict(CONFIG, crop_mode='center'))(image)).astype(int)
    assert np.abs(found - expected).max() <= most and found.shape == (3, 64, 64)


@pytest.mark.parametrize('size', [(20000, 1), (1, 20000)])
def test_a_panorama_needs_little_memory(size, monkeypatch):
    seen = []
    original = Image.Image.resize
    monkeypatch.setattr(
        Image.Image, 'resize', lambda image, size, *args, **more: seen.append(size) or original(
            image, size, *args, **more))
    create_eval_transform(dict(CONFIG, crop_mode='center'))(Image.new('RGB', size))
    assert max(max(one) for one in seen) <= 12 * 73


def test_crop_modes_that_show_the_whole_image_still_do():
    image = Image.new('RGB', (400, 4))
    image.paste((255, 255, 255), (0, 0, 20, 4))
    squashed = np.asarray(create_eval_transform(dict(CONFIG, crop_pct=1., crop_mode='squash'))(image))
    assert squashed[0, 32, 0] > 200 and squashed[0, 32, 63] < 50


def test_mpo_is_an_image():
    assert '.mpo' in image_extensions()


def test_heic_is_read_with_its_plugin_and_named_without(make_images, monkeypatch, caplog):
    root = make_images({'ant': 6, 'bee': 6})
    file = io.BytesIO()
    Image.new('RGB', (4, 4)).save(file, 'png')
    heic = b'\0\0\0\x18ftypheic\0\0\0\0mif1heic'
    (root / 'ant' / 'phone.HEIC').write_bytes(heic)
    with monkeypatch.context() as patch:
        patch.setattr(Image, 'OPEN', {name: one for name, one in Image.OPEN.items() if name != 'HEIF'})
        patch.setattr(Image, 'ID', [name for name in Image.ID if name != 'HEIF'])
        with tarfile.open(root.with_suffix('.tar'), 'w') as tar:
            tar.add(root, '')
        for place in (root, root.with_suffix('.tar')):
            line = load_training_data(SourceConfig(data_dir=str(place))).describe()
            assert '1 unreadable (ant/phone.HEIC)' in line and 'pip install pillow-heif' in caplog.text
            caplog.clear()
        (root / 'cat').mkdir()
        (root / 'cat' / 'a.heic').write_bytes(heic)
        with pytest.raises(InputError, match="class 'cat' can be read.*pip install pillow-heif"):
            load_training_data(SourceConfig(data_dir=str(root)))

    def opens(content, name):  # as a plugin does
        return Image.open(file)

    monkeypatch.setitem(Image.OPEN, 'HEIF', (opens, lambda prefix: prefix[4:12] == b'ftypheic'))
    monkeypatch.setattr(Image, 'ID', ['HEIF', *(name for name in Image.ID if name != 'HEIF')])
    assert open_image(str(root / 'cat' / 'a.heic')).size == (4, 4)
    assert set(HEIF) <= image_extensions()


def test_a_class_of_other_files_is_named_as_such(make_images):
    root = make_images({'ant': 6, 'bee': 6})
    for name in ('cat', 'dog'):
        (root / name).mkdir()
    (root / 'cat' / 'drawing.svg').write_text('<svg/>')
    line = load_training_data(SourceConfig(data_dir=str(root))).describe()
    assert '1 folder whose files are all of other types (cat)' in line and '1 folder without images (dog)' in line
