#!/usr/bin/env python3
"""Draw a long-tailed folder of pictures to try the commands on: `python docs/photographs.py FOLDER`.

Eight kinds of shapes on blurred backgrounds, 400 pictures of the most frequent class and 10 of the rarest.
"""
import argparse
import math
from pathlib import Path
from typing import Any, List, Tuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE, LARGEST, SMALLEST = 96, 400, 10
CORNERS = {'triangle': 3, 'square': 4, 'pentagon': 5, 'hexagon': 6}
CLASSES = ('disc', 'square', 'ring', 'triangle', 'star', 'cross', 'hexagon', 'pentagon')  # From the most frequent one.


def _polygon(corners: int, turn: float, centre: Any, radii: Tuple[float, ...]) -> List[Tuple[float, float]]:
    return [
        (centre[0] + radii[k % len(radii)] * math.cos(turn + 2 * math.pi * k / corners),
         centre[1] + radii[k % len(radii)] * math.sin(turn + 2 * math.pi * k / corners)) for k in range(corners)]


def draw(kind: str, rng: np.random.Generator) -> Image.Image:
    """A picture of a shape in a random place, size, turn and colour."""
    background = Image.fromarray(rng.integers(80, 176, (6, 6, 3), dtype=np.uint8)).resize((SIZE, SIZE), Image.BICUBIC)
    picture, colour = ImageDraw.Draw(background), tuple(int(c) for c in rng.integers(0, 256, 3))
    radius, turn = rng.uniform(15, 30), rng.uniform(0, 2 * math.pi)
    centre = rng.uniform(radius, SIZE - radius, 2)
    box = [*(centre - radius), *(centre + radius)]
    if kind == 'disc':
        picture.ellipse(box, fill=colour)
    elif kind == 'ring':
        picture.ellipse(box, outline=colour, width=int(radius / 3))
    elif kind == 'star':
        picture.polygon(_polygon(10, turn, centre, (radius, radius / 2)), fill=colour)
    elif kind == 'cross':
        for more in (0, math.pi / 2):
            ends = _polygon(2, turn + more, centre, (radius,))
            picture.line(ends, fill=colour, width=int(radius / 2))
    else:
        picture.polygon(_polygon(CORNERS[kind], turn, centre, (radius,)), fill=colour)
    blurred = np.asarray(background.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.5))), dtype=float)
    return Image.fromarray(np.clip(blurred + rng.normal(0, 12, blurred.shape), 0, 255).astype(np.uint8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('folder', type=Path)
    folder, rng = parser.parse_args().folder, np.random.default_rng(0)
    for i, kind in enumerate(CLASSES):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        count = round(LARGEST * (SMALLEST / LARGEST) ** (i / (len(CLASSES) - 1)))
        for k in range(count):
            draw(kind, rng).save(folder / kind / f'{k:04}.jpg', quality=90)


if __name__ == '__main__':
    main()
