#!/usr/bin/env python3
"""Draw the pictures of README.md and docs from results/runs.csv and the modules: `python docs/figures.py`."""
import ast
import math
import statistics
import sys
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence, Set, Tuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / 'results'))
from run import read_rows  # noqa: E402
from tables import FROZEN, READS, TABLES  # noqa: E402

FOLDER = Path(__file__).parent / 'figures'
Theme = Dict[str, str]
THEMES = {
    'light': dict(
        text='#1f2328', line='#656d76', trunk='#ddf4ff', expert='#dafbe1', classifier='#fff8c5', grid='#d1d9e0',
        plain='#8250df', plain_pale='#d8c8f5', shike='#1a7f37', shike_pale='#a8dfb5'),
    'dark': dict(
        text='#e6edf3', line='#8b949e', trunk='#0c2d4a', expert='#12351f', classifier='#3d2e00', grid='#30363d',
        plain='#a371f7', plain_pale='#4c3680', shike='#3fb950', shike_pale='#1d5a2c'),
}
# Multiply-accumulates of an image, in those of one network: ResNet-32 at 32 px, EfficientNet-Lite0 at 64 px.
OPERATIONS = {'resnet32': 0.120 / 0.069, 'lite0': 62 / 31}
FEATURES = 2 / 3  # Operations of a frozen run, in epochs: two views of each image go forward.
IMAGES = 10_000  # of the test split of CIFAR-100
GROUND = 'ground floor'
FLOORS = {
    'cli': 'the commands: parse, call, print',
    'report': 'evaluation and its page',
    'publishing': 'exports, the card, the Hub',
    'training': 'phases, methods, the loop, run folders',
    'pretrained': 'trained models, read and written',
    'models': 'the network and the backbones that it is made of',
    'data': 'from files to batches',
    GROUND: 'errors, options, files, devices, losses, metrics',
}


class Drawing:
    """Boxes, arrows and charts as SVG."""

    def __init__(self, theme: Theme, width: int, height: int):
        self.theme = theme
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
            f'font-size="14" fill="{theme["text"]}" stroke-linecap="round">',
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M0 0L8 4L0 8z" fill="{theme["line"]}"/></marker></defs>']

    def box(self, x: int, y: int, width: int, text: str, fill: str) -> None:
        self.bar(x, y, width, 40, fill, f' rx="6" stroke="{self.theme["line"]}"')
        self.text(x + width // 2, y + 26, text, 16)

    def bar(self, x: float, y: float, width: float, height: float, fill: str, more: str = '') -> None:
        self.parts.append(
            f'<rect x="{x:.5g}" y="{y:.5g}" width="{width:.5g}" height="{height:.5g}" '
            f'fill="{self.theme[fill]}"{more}/>')

    def text(self, x: float, y: float, text: str, size: int = 14, anchor: str = 'middle', more: str = '') -> None:
        self.parts.append(
            f'<text x="{x:.5g}" y="{y:.5g}" text-anchor="{anchor}" font-size="{size}"{more}>{text}</text>')

    def arrow(self, *points: int, dashed: bool = False) -> None:
        path = 'M' + ' L'.join(f'{x} {y}' for x, y in zip(points[::2], points[1::2]))
        self.parts.append(
            f'<path d="{path}" fill="none" stroke="{self.theme["line"]}" stroke-width="1.5" marker-end="url(#tip)"'
            + (' stroke-dasharray="4 4"' if dashed else '') + '/>')

    def line(self, points: Sequence[Tuple[float, float]], colour: str, width: float = 1) -> None:
        path = ' '.join(f'{x:.5g},{y:.5g}' for x, y in points)
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke="{self.theme[colour]}" stroke-width="{width}"/>')

    def dot(self, x: float, y: float, colour: str, hollow: bool = False) -> None:
        fill = 'none' if hollow else self.theme[colour]
        self.parts.append(
            f'<circle cx="{x:.5g}" cy="{y:.5g}" r="5" fill="{fill}" stroke="{self.theme[colour]}" stroke-width="2"/>')

    def legend(self, x: float, y: float, entries: Sequence[Tuple[str, str, bool]]) -> None:
        """A line of dots with their labels: label, colour, and whether the dot is hollow."""
        for label, colour, hollow in entries:
            self.dot(x, y - 5, colour, hollow)
            self.text(x + 12, y, label, anchor='start')
            x += 40 + 7.2 * len(label)

    def svg(self) -> str:
        return '\n'.join([*self.parts, '</svg>\n'])


def architecture(theme: Theme) -> str:
    """The shared trunk, three experts that each fuse features of another depth, and their classifiers."""
    drawing = Drawing(theme, 700, 310)
    for i, text in enumerate(('stem', 'stage 1', 'stage 2', 'stage 3')):
        drawing.box(10 + 88 * i, 135, 70, text, 'trunk')
        if i:
            drawing.arrow(88 * i - 8, 155, 88 * i + 8, 155)
    drawing.text(175, 205, 'one shared trunk', 16)
    for m in range(3):
        y = 25 + 110 * m
        drawing.arrow(344, 155, 364, 155, 364, y + 20, 380, y + 20)
        drawing.box(382, y, 108, 'own stage 4', 'expert')
        drawing.arrow(490, y + 20, 506, y + 20)
        drawing.box(508, y, 60, 'fuse', 'expert')
        drawing.arrow(568, y + 20, 584, y + 20)
        drawing.box(586, y, 106, f'classifier {m + 1}', 'classifier')
    drawing.arrow(133, 135, 133, 10, 538, 10, 538, 23, dashed=True)
    drawing.arrow(221, 135, 221, 105, 538, 105, 538, 133, dashed=True)
    drawing.arrow(309, 175, 309, 228, 538, 228, 538, 243, dashed=True)
    drawing.text(160, 258, 'dashed: features of another', 15)
    drawing.text(160, 278, 'depth for each expert', 15)
    drawing.text(622, 100, 'logits averaged', 15)
    drawing.text(622, 210, 'retrained', 15)
    drawing.text(622, 228, 'for the tail', 15)
    return drawing.svg()


def _imports() -> Dict[str, Set[str]]:
    """The parts of the package that each part imports. Modules beside the packages are the ground floor."""
    package = ROOT / 'shike_timm'
    found: Dict[str, Set[str]] = {floor: set() for floor in FLOORS}
    for path in sorted(package.rglob('*.py')):
        folders = path.relative_to(package).parts[:-1]
        if path.name in ('__init__.py', '__main__.py') and not folders:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, ast.ImportFrom) and node.level:
                parts = [*folders[:len(folders) - node.level + 1], *(node.module or '').split('.')]
                names = [parts[0]] if parts[0] else [alias.name for alias in node.names]
                part = folders[0] if folders else GROUND
                found[part] |= {name if name in FLOORS else GROUND for name in names} - {part}
    return found


def house(theme: Theme) -> str:
    """The parts of the package: each imports from the floors below it alone."""
    imports, level = _imports(), {GROUND: 0}
    while len(level) < len(imports):
        ready = [part for part in imports if part not in level and imports[part] <= set(level)]
        if not ready:
            raise ValueError(f'These parts import one another: {sorted(set(imports) - set(level))}.')
        level.update({part: 1 + max(level[below] for below in imports[part]) for part in ready})
    top = max(level.values())
    drawing = Drawing(theme, 680, 90 + 64 * (top + 1))
    drawing.line([(10, 60), (340, 10), (670, 60)], 'line', 1.5)
    drawing.text(340, 48, 'shike', 15, more=' font-weight="bold"')
    for floor in range(top + 1):
        parts, y = [part for part in FLOORS if level[part] == floor], 60 + 64 * (top - floor)
        for i, part in enumerate(parts):
            width = 620 // len(parts)
            drawing.bar(30 + width * i, y, width, 64, 'trunk' if floor else 'classifier', f' stroke="{theme["line"]}"')
            x = 30 + width * i + width // 2
            drawing.text(x, y + 27, part, 15, more=' font-weight="bold"')
            drawing.text(x, y + 48, FLOORS[part], 13)
    return drawing.svg()


def _values() -> Dict[str, Dict[str, float]]:
    """The figures of each recorded run by the names of their columns."""
    words = ('name', 'options', 'seed', 'commit', 'device', 'experts', 'log')
    return {
        row['name']: {key: float(value) for key, value in row.items() if key not in words and value}
        for row in read_rows()}


def operations(theme: Theme) -> str:
    """Accuracy against training operations, in epochs of one network. Two phases count those of stage one."""
    scratch, lite0 = OPERATIONS['resnet32'], OPERATIONS['lite0']
    part = 'plankton_part_lite0'
    panels = [  # Title, column, and of each side the runs with their operations.
        ('From scratch, CIFAR-100-LT', 'top1', {'one_network_short': 40, 'one_network': 180},
         {'short_seed0': 40 * scratch, 'if100_seed0': 180 * scratch}),
        ('Two phases, CIFAR-100-LT', 'top1', {'lite0_plain': 5, 'lite0_plain_long': 10},
         {'lite0_shike': 5 * lite0, 'lite0_shike_long': 10 * lite0}),
        ('One phase, CIFAR-100-LT', 'top1',
         {'ops_plain_balanced_01_lr02': 1, 'ops_plain_balanced_05': 5, 'ops_plain_balanced_10': 10},
         {'ops_frozen_heads': FEATURES, 'ops_frozen_tuned_04': FEATURES + 4,
          'ops_frozen_tuned_10_lr05': FEATURES + 10}),
        ('One phase, plankton (balanced)', 'balanced',
         {f'{part}_balanced_one_lr02': 1, f'{part}_balanced_short_lr05': 3, f'{part}_balanced_lr05': 5},
         {f'{part}_heads': FEATURES, f'{part}_tuned_short_lr02': FEATURES + 2, f'{part}_tuned_lr05': FEATURES + 5}),
    ]
    values = _values()
    drawing = Drawing(theme, 680, 40 + 270 * math.ceil(len(panels) / 2))
    drawing.legend(60, 24, [('one network', 'plain', False), ('three experts', 'shike', False)])
    for number, (title, column, *sides) in enumerate(panels):
        points = [[(x, values[run][column]) for run, x in side.items() if run in values] for side in sides]
        _panel(drawing, 55 + 340 * (number % 2), 75 + 270 * (number // 2), title, points)
    return drawing.svg()


def _panel(drawing: Drawing, left: int, top: int, title: str, sides: Sequence[Sequence[Tuple[float, float]]]) -> None:
    """One chart of lines, for one network and for SHIKE."""
    width, height = 260, 160
    xs, ys = zip(*(point for side in sides for point in side))
    low, high, end = 5 * math.floor((min(ys) - 1) / 5), 5 * math.ceil((max(ys) + 1) / 5), 1.1 * max(xs)

    def place(x: float, y: float) -> Tuple[float, float]:
        return left + width * x / end, top + height * (high - y) / (high - low)

    drawing.text(left, top - 15, title, 15, 'start', ' font-weight="bold"')
    for y in range(low, high + 1, 5):
        drawing.line([place(0, y), place(end, y)], 'grid')
        drawing.text(left - 8, place(0, y)[1] + 5, f'{y} %' if y == high else str(y), 13, 'end')
    for x, _ in sides[0]:
        drawing.text(place(x, 0)[0], top + height + 20, str(x), 13)
    drawing.text(left + width / 2, top + height + 40, 'operations, in epochs of one network', 13)
    for side, colour, x_off, y_off, anchor in zip(sides, ('plain', 'shike'), (7, -7), (17, -7), ('start', 'end')):
        drawing.line([place(*point) for point in side], colour, 2)
        for point in side:
            x, y = place(*point)
            drawing.dot(x, y, colour)
            drawing.text(
                max(x + x_off, left + 38), y + y_off, f'{point[1]:.2f}', 13, anchor,
                f' fill="{drawing.theme[colour]}"')


def _dots(
        drawing: Drawing, left: int, top: int, width: int, ticks: Sequence[int], column: Sequence[Optional[tuple]],
        ends: Tuple[float, float] = (48.5, 58.),
) -> None:
    """A column of dots with their errors, and hollow ones for the paper's values. `ends` are those of the axis."""
    def place(value: float) -> float:
        return left + width * (value - ends[0]) / (ends[1] - ends[0])

    bottom = top + 32 * len(column)
    for value in ticks:
        drawing.line([(place(value), top), (place(value), bottom)], 'grid')
        drawing.text(place(value), bottom + 18, str(value), 13)
    for i, found in enumerate(column):
        y = top + 16 + 32 * i
        if found is None:
            continue
        value, error, paper = found
        if paper is not None:
            drawing.dot(place(paper), y, 'line', hollow=True)
        drawing.line([(place(value - error), y), (place(value + error), y)], 'shike', 2)
        drawing.dot(place(value), y, 'shike')


def ablation(theme: Theme) -> str:
    """Top-1 of SHIKE with and without its parts, beside the paper's."""
    values, rows = _values(), [(what, runs[0], float(paper)) for what, runs, paper in TABLES['ablation'][1] if paper]
    rows = [row for row in rows if row[1] in values]
    drawing = Drawing(theme, 680, 100 + 32 * len(rows))
    drawing.legend(180, 24, [('here, with standard error', 'shike', False), ('paper', 'line', True)])
    column = []
    for _, run, paper in rows:
        top1 = values[run]['top1']
        column.append((top1, 100 * math.sqrt(top1 / 100 * (1 - top1 / 100) / IMAGES), paper))
    drawing.text(582, 52, 'here', 13, 'end')
    drawing.text(642, 52, 'paper', 13, 'end')
    _dots(drawing, 175, 60, 350, range(49, 59), column)
    for i, (label, run, paper) in enumerate(rows):
        drawing.text(160, 81 + 32 * i, label, 14, 'end')
        drawing.text(582, 81 + 32 * i, f'{values[run]["top1"]:.2f}', 14, 'end')
        drawing.text(642, 81 + 32 * i, f'{paper:.2f}', 14, 'end')
    return drawing.svg()


def tail(theme: Theme) -> str:
    """Accuracy on many-, medium- and few-shot classes after each stage."""
    values, drawing = _values(), Drawing(theme, 680, 320)
    bars = (
        ('one network, stage one', 'one_network', 'stage_one_', 'plain_pale'),
        ('one network, stage two', 'one_network', '', 'plain'),
        ('SHIKE, stage one', 'if100_seed0', 'stage_one_', 'shike_pale'),
        ('SHIKE, stage two', 'if100_seed0', '', 'shike'),
    )
    drawing.legend(70, 22, [(label, colour, False) for label, _, _, colour in bars[::2]])
    drawing.legend(70, 46, [(label, colour, False) for label, _, _, colour in bars[1::2]])
    for y in range(0, 81, 20):
        drawing.line([(50, 280 - 2.6 * y), (660, 280 - 2.6 * y)], 'grid')
        drawing.text(42, 285 - 2.6 * y, str(y), 13, 'end')
    for i, (shot, classes) in enumerate(dict(many='over 100', medium='20 to 100', few='under 20').items()):
        for j, (_, run, stage, colour) in enumerate(bars):
            x, y = 65 + 205 * i + 44 * j, values[run][stage + shot]
            drawing.bar(x, 280 - 2.6 * y, 40, 2.6 * y, colour)
            drawing.text(x + 20, 274 - 2.6 * y, f'{y:.0f}', 13)
        drawing.text(151 + 205 * i, 302, f'{shot}: {classes} images', 14)
    return drawing.svg()


def frozen(theme: Theme) -> str:
    """Balanced accuracy by what classifiers read of a frozen network, mean and standard deviation of three draws."""
    values, drawing = _values(), Drawing(theme, 680, 270)
    for i, (_, label) in enumerate(READS):
        drawing.text(215, 71 + 32 * i, label.replace('`--search`', 'the search'), 13, 'end')
    for n, (net, title) in enumerate(FROZEN):
        column = []
        for read, _ in READS:
            found = [values[run]['top1'] for seed in range(3) if (run := f'frozen_{net}_{read}_seed{seed}') in values]
            column.append((statistics.mean(found), statistics.stdev(found), None) if len(found) > 1 else None)
        drawing.text(297 + 155 * n, 32, title, 14)
        _dots(drawing, 232 + 155 * n, 50, 130, (50, 53, 56), column)
    drawing.text(452, 255, 'top-1, %', 13)
    return drawing.svg()


PICTURES: Dict[str, Callable[[Theme], str]] = {
    function.__name__: function for function in (architecture, house, operations, ablation, tail, frozen)}


def main() -> List[Path]:
    """Write all pictures, and give their paths."""
    written = []
    for picture, draw in PICTURES.items():
        for name, theme in THEMES.items():
            written.append(FOLDER / f'{picture}-{name}.svg')
            written[-1].write_text(draw(theme), encoding='utf-8')
    return written


if __name__ == '__main__':
    main()
