"""Processes that load images: what fails or stops ends with a sentence, and soon."""
import time

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image

from shike_timm.data import workers
from shike_timm.data.workers import create_loader, explain_failure


class _Numbers(torch.utils.data.Dataset):
    def __init__(self, seconds=0.):
        self.seconds = seconds

    def __len__(self):
        return 4

    def __getitem__(self, index):
        time.sleep(self.seconds)
        return torch.full((3, 8, 8), index, dtype=torch.uint8)


def _stack(items):
    return torch.stack(items), [None] * len(items)


def _no_shared_memory(tensor):
    raise RuntimeError('unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)')


def _too_many_files(tensor):
    raise RuntimeError('unable to open shared memory object </torch_1>: Too many open files (24)')


@pytest.mark.parametrize('num_workers', [0, 1])
def test_batches_are_the_same_with_workers(num_workers):
    loader = create_loader(_Numbers(), 2, num_workers, _stack)
    assert [batch[:, 0, 0, 0].tolist() for batch, _ in loader] == [[0, 1], [2, 3]]


@pytest.mark.parametrize('fails, status, words', [
    (_no_shared_memory, 2, ('/dev/shm', '--shm-size', '--workers')), (_too_many_files, 1, ('ulimit', '--workers'))])
def test_a_worker_that_cannot_hand_its_batch_over_ends_the_wait(monkeypatch, fails, status, words):
    monkeypatch.setattr(torch.Tensor, 'share_memory_', fails)
    with pytest.raises(RuntimeError) as raised:
        list(create_loader(_Numbers(), 2, 1, _stack))
    found, message = explain_failure(raised.value)
    assert found == status and all(word in message for word in words) and '\n' not in message


def test_workers_that_stop_end_the_wait(monkeypatch):
    monkeypatch.setattr(workers, 'LONGEST_WAIT', 1)
    start = time.monotonic()
    with pytest.raises(RuntimeError) as raised:
        list(create_loader(_Numbers(seconds=4), 2, 1, _stack))
    assert time.monotonic() - start < 15
    assert '--workers 0' in explain_failure(raised.value)[1]


def test_shared_memory_is_one_sentence_in_train_and_predict(tmp_path, tiny_run, monkeypatch, run_script):
    monkeypatch.setattr(torch.Tensor, 'share_memory_', _no_shared_memory)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / 'a.png')
    monkeypatch.setattr(workers, 'LONGEST_WAIT', 60)
    for command in (
            ('predict', tmp_path / 'a.png', '--model', tiny_run, '--workers', '1', '--device', 'cpu'),
            ('train', *TINY, '--no-device-data', '--workers', '1', '--output', tmp_path / 'out')):
        status, _, error = run_script(*command)
        assert status == 2 and error.count('docker run --shm-size') == 1 and 'Traceback' not in error


def test_errors_that_are_not_of_workers_stay():
    assert explain_failure(RuntimeError('a bug')) is None
    assert explain_failure(OSError(28, 'No space left on device', 'out')) == (
        1, "error: [Errno 28] No space left on device: 'out'")
    text = 'Caught OSError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\nOSError: no'
    assert explain_failure(OSError(text)) == (1, 'error: no')
