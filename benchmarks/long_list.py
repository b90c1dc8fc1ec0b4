"""Seconds to the first batch of a long list of made-up paths, and the memory of the main process and of each worker.

`python benchmarks/long_list.py` prints a row for a short list and one for iNaturalist 2018's number of images; the
memory that grows with the list is the difference of their sums.
"""
import argparse
import io
import os
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

from shike_timm.data import AugmentationConfig, LoaderConfig, SourceConfig, create_train_loader, load_training_data
from shike_timm.data.sources.tar import FolderImages

CONFIG = dict(input_size=(3, 64, 64), mean=(0.5,) * 3, std=(0.5,) * 3)


def megabytes(pid: int) -> float:
    """Memory of a process, with its share of what several processes use."""
    lines = Path(f'/proc/{pid}/smaps_rollup').read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith('Pss:')) / 1024


def measure(entries: int, workers: int) -> None:
    content = io.BytesIO()
    Image.new('RGB', (80, 60), 'gray').save(content, 'JPEG')
    FolderImages.open = lambda self, row: Image.open(io.BytesIO(content.getvalue()))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, 'list.txt')
        with path.open('w') as file:
            for i in range(entries):
                label = i * i % 8142 if entries > 8142 else i % 100
                file.write(f'train_val2018/Aves/{label}/{i * 2654435761 % 2 ** 64:032x}.jpg {label}\n')
        first = Path(folder, path.read_text().split()[0])  # the loader checks that it exists
        first.parent.mkdir(parents=True)
        first.touch()
        start = time.perf_counter()
        data = load_training_data(SourceConfig(data_dir=folder, train_list=str(path), check_images=False))
        read = time.perf_counter() - start
        loader = create_train_loader(
            data.train, CONFIG, LoaderConfig(batch_size=64), AugmentationConfig(), torch.device('cpu'), workers)
        batches = iter(loader)
        next(batches)
        begun = time.perf_counter() - start
        for _ in range(2 * workers):  # each worker has then returned some
            next(batches)
        pids = [worker.pid for worker in loader.loader._iterator._workers]
        own, theirs = megabytes(os.getpid()), [megabytes(pid) for pid in pids]
        print(
            f'{entries} entries: {read:.1f} s to the data, {begun:.1f} s to the first batch; main {own:.0f} MB, '
            f"workers {' '.join(f'{one:.0f}' for one in theirs)} MB, together {own + sum(theirs):.0f} MB", flush=True)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--entries', type=int, default=437513)
    parser.add_argument('--workers', type=int, default=8)
    args = parser.parse_args()
    for number in (2000, args.entries):
        measure(number, args.workers)
