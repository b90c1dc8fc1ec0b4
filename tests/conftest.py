import logging
import runpy
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

ROOT = Path(__file__).parents[1]
CIFAR_ROOT = ROOT.parent / 'shared' / 'data'

# The smallest run that still has two stages: eight steps on 8x8 digits.
TINY = [
    '--model', 'resnet32_shike', '--dataset', 'digits_lt', '--imb-factor', '20', '--img-size', '8', '--workers', '0',
    '--batch-size', '64', '--epochs', '2', '--warmup-epochs', '1', '--crt-epochs', '2', '--train-crop-mode', 'pad',
    '--color-jitter', '0', '--device', 'cpu', '--lr', '0.05', '--experiment', 'run',
]


@pytest.fixture(autouse=True, scope='session')
def one_thread():
    torch.set_num_threads(min(torch.get_num_threads(), 2))


@pytest.fixture
def run_script(monkeypatch, capsys):
    """Run a script of the repository in this process; gives its exit status and what it printed."""

    def run(script, *argv):
        monkeypatch.setattr(sys, 'argv', [str(ROOT / script), *map(str, argv)])
        handlers = list(logging.root.handlers)
        try:
            runpy.run_path(str(ROOT / script), run_name='__main__')
        except SystemExit as stop:
            status = stop.code
        finally:
            logging.root.handlers = handlers
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture(scope='session')
def tiny_run(tmp_path_factory):
    """Run folder of an undisturbed tiny run, not to be written to."""
    from shike_timm.commands.train import parse_train_args
    from shike_timm.runs import train

    output = tmp_path_factory.mktemp('tiny')
    train(parse_train_args([*TINY, '--output', str(output)]))
    return output / 'run'


@pytest.fixture
def image_folder(tmp_path):
    """A folder of images with classes of 24, 12 and 6 training images and 4 for validation each."""
    rng = np.random.default_rng(0)
    for split, counts in (('train', (24, 12, 6)), ('validation', (4, 4, 4))):
        for name, count in zip(('ant', 'bee', 'cat'), counts):
            folder = tmp_path / 'data' / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (12, 10, 3), dtype=np.uint8)).save(folder / f'{i}.png')
    return tmp_path / 'data'


@pytest.fixture
def cifar_root():
    if not CIFAR_ROOT.is_dir():
        pytest.fail(f'CIFAR-100 is expected in {CIFAR_ROOT}')
    return CIFAR_ROOT


def read_yaml(path):
    return yaml.safe_load(Path(path).read_text())


@pytest.fixture
def unused_port():
    with socket.socket() as server:
        server.bind(('127.0.0.1', 0))
        return server.getsockname()[1]
