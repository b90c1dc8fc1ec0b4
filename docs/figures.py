#!/usr/bin/env python3
"""Draw the pictures of README.md and docs: `python docs/figures.py`."""
from pathlib import Path
from typing import Dict, List

FOLDER = Path(__file__).parent / 'figures'
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


def main() -> List[Path]:
    """Write all pictures, and give their paths."""
    written = []
    for name, theme in THEMES.items():
        written.append(FOLDER / f'architecture-{name}.svg')
        written[-1].write_text(architecture(theme), encoding='utf-8')
    return written


if __name__ == '__main__':
    main()
