#!/usr/bin/env python3
"""Draw the pictures of README.md and docs: `python docs/figures.py`, after a change of results/runs.csv too."""
import csv
from pathlib import Path
from typing import Dict, List

import matplotlib

matplotlib.use('svg')
import matplotlib.pyplot as plt  # noqa: E402

FOLDER = Path(__file__).parent / 'figures'
RUNS = Path(__file__).parents[1] / 'results' / 'runs.csv'
THEMES = {  # Text, lines, and the fill of trunk, experts and classifiers.
    'light': dict(text='#1f2328', line='#656d76', trunk='#ddf4ff', expert='#dafbe1', classifier='#fff8c5'),
    'dark': dict(text='#e6edf3', line='#8b949e', trunk='#0c2d4a', expert='#12351f', classifier='#3d2e00'),
}


class Drawing:
    """Boxes and arrows as SVG."""

    def __init__(self, theme: Dict[str, str], width: int, height: int):
        self.theme = theme
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
            f'font-size="14" fill="{theme["text"]}" stroke-linecap="round">',
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M0 0L8 4L0 8z" fill="{theme["line"]}"/></marker></defs>']

    def box(self, x: int, y: int, width: int, text: str, fill: str, height: int = 40) -> None:
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{self.theme[fill]}" '
            f'stroke="{self.theme["line"]}"/>')
        self.text(x + width // 2, y + height // 2 + 5, text)

    def text(self, x: int, y: int, text: str, size: int = 14) -> None:
        self.parts.append(f'<text x="{x}" y="{y}" text-anchor="middle" font-size="{size}">{text}</text>')

    def arrow(self, *points: int, dashed: bool = False) -> None:
        path = 'M' + ' L'.join(f'{x} {y}' for x, y in zip(points[::2], points[1::2]))
        self.parts.append(
            f'<path d="{path}" fill="none" stroke="{self.theme["line"]}" stroke-width="1.5" marker-end="url(#tip)"'
            + (' stroke-dasharray="4 4"' if dashed else '') + '/>')

    def svg(self) -> str:
        return '\n'.join([*self.parts, '</svg>\n'])


def architecture(theme: Dict[str, str]) -> str:
    """The shared trunk, three experts that each fuse features of another depth, and their classifiers."""
    drawing = Drawing(theme, 860, 300)
    for i, text in enumerate(('stem', 'stage 1', 'stage 2', 'stage 3')):
        drawing.box(20 + 100 * i, 130, 80, text, 'trunk')
        if i:
            drawing.arrow(100 * i, 150, 100 * i + 18, 150)
    drawing.text(210, 200, 'one shared trunk')
    for m in range(3):
        y = 20 + 110 * m
        drawing.arrow(400, 150, 428, 150, 428, y + 20, 448, y + 20)
        drawing.box(450, y, 110, 'own stage 4', 'expert')
        drawing.arrow(560, y + 20, 588, y + 20)
        drawing.box(590, y, 80, 'fuse', 'expert')
        drawing.arrow(670, y + 20, 698, y + 20)
        drawing.box(700, y, 130, f'classifier {m + 1}', 'classifier')
    drawing.arrow(160, 130, 160, 8, 630, 8, 630, 18, dashed=True)
    drawing.arrow(260, 130, 260, 100, 630, 100, 630, 128, dashed=True)
    drawing.arrow(360, 170, 360, 228, 630, 228, 630, 238, dashed=True)
    drawing.text(210, 240, 'dashed: features of another depth for each expert', 12)
    drawing.text(765, 112, 'logits are averaged', 12)
    drawing.text(765, 222, 'retrained for the tail', 12)
    return drawing.svg()


def _rows() -> Dict[str, Dict[str, str]]:
    with RUNS.open(newline='') as file:
        return {row['name']: row for row in csv.DictReader(file)}


def operations(theme: Dict[str, str], path: Path) -> None:
    """Accuracy of fine-tuning against training operations, in epochs of the plain network."""
    rows = _rows()
    sides = {  # Of a name: the operations of an epoch in those of the plain network, and the epochs.
        'one network': ('ops_plain', 1, (5, 10, 20)),
        'SHIKE, three experts': ('ops_shike', 2, (5, 10)),
    }
    figure, axes = plt.subplots(figsize=(6, 3.4))
    colours = iter(('#0969da', '#1a7f37'))
    for label, (name, cost, epochs) in sides.items():
        points = [(cost * n, float(rows[f'{name}_{n:02}']['balanced'])) for n in epochs if f'{name}_{n:02}' in rows]
        if points:
            axes.plot(*zip(*points), marker='o', label=label, color=next(colours))
    axes.set_xlabel('operations of stage one, in epochs of one network')
    axes.set_ylabel('balanced accuracy, %')
    axes.legend(frameon=False, labelcolor=theme['text'])
    for part in (axes.xaxis, axes.yaxis):
        part.label.set_color(theme['text'])
    axes.tick_params(colors=theme['text'])
    for name, spine in axes.spines.items():
        spine.set_color(theme['line'])
        spine.set_visible(name in ('left', 'bottom'))
    figure.tight_layout()
    figure.savefig(path, transparent=True, metadata={'Date': None})
    plt.close(figure)


def main() -> List[Path]:
    """Write all pictures, and give their paths."""
    plt.rcParams['svg.hashsalt'] = 'shike'
    FOLDER.mkdir(exist_ok=True)
    written = []
    for name, theme in THEMES.items():
        path = FOLDER / f'architecture-{name}.svg'
        path.write_text(architecture(theme))
        operations(theme, FOLDER / f'operations-{name}.svg')
        written += [path, FOLDER / f'operations-{name}.svg']
    return written


if __name__ == '__main__':
    main()
