"""Seconds of `shike describe` on made images, reading and comparing them all.

`python benchmarks/describe.py 10000 40000 160000` prints a row for each number of images. A twentieth of the images is
a copy with a few changed pixels, and all have one of a hundred backgrounds, so that many hashes share many bits.
"""
import io
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

import shike_timm
from shike_timm.data import inspect


def write_images(path: Path, number: int) -> None:
    """Write a tar archive of images of 32x32 pixels in ten folders."""
    rng = np.random.default_rng(0)
    backgrounds = rng.normal(128, 40, (100, 4, 4)).repeat(8, axis=1).repeat(8, axis=2)
    with tarfile.open(path, 'w') as tar:
        for i in range(number):
            if i % 20 or not i:
                image = backgrounds[rng.integers(100)] + rng.normal(0, 20, (8, 8)).repeat(4, axis=0).repeat(4, axis=1)
            else:
                image = image + (rng.random((32, 32)) < 0.005) * 8.
            content = io.BytesIO()
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(content, 'PNG')
            info = tarfile.TarInfo(f'{i % 10}/{i:06d}.png')
            info.size = content.tell()
            content.seek(0)
            tar.addfile(info, content)


def main(numbers: list) -> None:
    compare, seconds = inspect.find_similar, []

    def timed(looks: list) -> list:
        start = time.perf_counter()
        groups = compare(looks)
        seconds.append(time.perf_counter() - start)
        return groups

    shike_timm.cli.describe.find_similar = timed
    for number in numbers:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, 'images.tar')
            write_images(path, number)
            start = time.perf_counter()
            told = shike_timm.describe(data_dir=str(path), perceptual=True)
            whole = time.perf_counter() - start
            groups = sum(map(len, told['similar'].values()))
            print(f'{number} images: {whole:.1f} s, {seconds[-1]:.1f} s of them for {groups} groups', flush=True)


if __name__ == '__main__':
    import shike_timm.cli.describe
    main(list(map(int, sys.argv[1:])) or [10_000, 40_000])
