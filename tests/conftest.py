import hashlib
import json
import logging
import os
import pickle
import runpy
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torchvision.datasets import CIFAR100

ROOT = Path(__file__).parents[1]
# Folder of real data, to be named by who has it: with `cifar-100-python` in it.
REAL_DATA = Path(os.environ['SHIKE_DATA']).absolute() if os.environ.get('SHIKE_DATA') else None

# The smallest run that still has two stages: eight steps on 8x8 digits.
TINY = [
    '--model', 'resnet32_shike', '--dataset', 'digits_lt', '--imb-factor', '20', '--img-size', '8', '--workers', '0',
    '--batch-size', '64', '--epochs', '2', '--warmup-epochs', '1', '--crt-epochs', '2', '--train-crop-mode', 'pad',
    '--color-jitter', '0', '--device', 'cpu', '--lr', '0.05', '--experiment', 'run',
]


@pytest.fixture(autouse=True, scope='session')
def few_threads():
    cores = 1 if 'PYTEST_XDIST_WORKER' in os.environ else 2
    torch.set_num_threads(min(torch.get_num_threads(), cores))


@pytest.fixture(autouse=True, scope='session')
def own_cache(tmp_path_factory):
    """Keep the cache of checked images out of the user's folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('XDG_CACHE_HOME', str(tmp_path_factory.mktemp('cache')))
        yield


@pytest.fixture
def run_script(monkeypatch, capsys):
    """Run a command of `shike`, or a script of the repository, in this process.

    Takes `'predict'` or `'predict.py'` for `shike predict`. A file of the repository, such as `'train.py'`, runs as a
    script. Gives the exit status and what was printed to standard output and standard error.
    """

    def run(name, *argv):
        script, argv = ROOT / name, [*map(str, argv)]
        if not script.is_file():
            script, argv = ROOT / 'shike_timm_cli.py', [name.removesuffix('.py').replace('_', '-'), *argv]
        monkeypatch.setattr(sys, 'argv', [str(script), *argv])
        handlers = list(logging.root.handlers)
        try:
            runpy.run_path(str(script), run_name='__main__')
        except SystemExit as stop:
            status = stop.code
        finally:
            logging.root.handlers = handlers
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture(scope='session')
def tiny_run(tmp_path_factory):
    """Run folder of a tiny run. Tests must not write to it."""
    from shike_timm.cli.train import parse_train_args
    from shike_timm.training.runs import train

    output = tmp_path_factory.mktemp('tiny')
    train(parse_train_args([*TINY, '--output', str(output)]))
    return output / 'run'


@pytest.fixture
def image_folder(tmp_path):
    """A folder of images: classes of 24, 12 and 6 training images, with 4 validation images each."""
    rng = np.random.default_rng(0)
    for split, counts in (('train', (24, 12, 6)), ('validation', (4, 4, 4))):
        for name, count in zip(('ant', 'bee', 'cat'), counts):
            folder = tmp_path / 'data' / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (12, 10, 3), dtype=np.uint8)).save(folder / f'{i}.png')
    return tmp_path / 'data'


@pytest.fixture
def make_images(tmp_path):
    """Write images of different colours by folder, `{'cat': 3, 'dog/left': 2}`, or by path. Returns their root."""
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


class Repeated:
    """Pickles as an array that repeats `images` over and over: a file of full size that is small and quick to make."""

    def __init__(self, images, count):
        self.arguments = images, (count, images.shape[1])

    def __reduce__(self):
        return np.resize, self.arguments


def generate_cifar100(root):
    """Write what torchvision reads as CIFAR-100, with its sizes and class names and 2,000 made images; gives the MD5s.

    The images are coarse patches under noise, of many contrasts, so that no operation on them does nothing.
    """
    rng = np.random.default_rng(0)
    patches = rng.random((2000, 3, 4, 4)).repeat(8, axis=2).repeat(8, axis=3)
    contrast, brightness = rng.uniform(40, 160, (2000, 1, 1, 1)), rng.uniform(0, 80, (2000, 1, 1, 1))
    images = patches * contrast + brightness + rng.normal(0, 4, patches.shape)
    images = images.clip(0, 255).astype(np.uint8).reshape(2000, -1)
    config = ROOT / 'shike_timm' / 'weights' / 'resnet32_shike.cifar100_lt_if100' / 'config.json'
    names = json.loads(config.read_text())['label_names']
    folder = root / CIFAR100.base_folder
    folder.mkdir()
    for split, count in (('train', 50_000), ('test', 10_000)):
        labels = rng.permutation(count) % len(names)
        content = dict(data=Repeated(images, count), fine_labels=labels.tolist())
        (folder / split).write_bytes(pickle.dumps(content))
    (folder / 'meta').write_bytes(pickle.dumps(dict(fine_label_names=names)))
    return {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture(scope='session')
def cifar_root(tmp_path_factory):
    """Folder of CIFAR-100: the real one in SHIKE_DATA, or a made one that torchvision reads."""
    if REAL_DATA:
        if not (REAL_DATA / CIFAR100.base_folder).is_dir():
            pytest.fail(f"SHIKE_DATA names '{REAL_DATA}', which has no folder '{CIFAR100.base_folder}'")
        yield REAL_DATA
        return
    root = tmp_path_factory.mktemp('generated')
    md5 = generate_cifar100(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CIFAR100, 'train_list', [['train', md5['train']]])
        patch.setattr(CIFAR100, 'test_list', [['test', md5['test']]])
        patch.setattr(CIFAR100, 'meta', dict(CIFAR100.meta, md5=md5['meta']))
        yield root


@pytest.fixture(scope='session')
def real_cifar_root(cifar_root):
    """The real CIFAR-100, for tests whose figures need the real images."""
    if not REAL_DATA:
        pytest.skip('needs the real CIFAR-100: name the folder that holds cifar-100-python as SHIKE_DATA')
    return cifar_root


def read_yaml(path):
    return yaml.safe_load(Path(path).read_text())


@pytest.fixture
def unused_port():
    with socket.socket() as server:
        server.bind(('127.0.0.1', 0))
        return server.getsockname()[1]
