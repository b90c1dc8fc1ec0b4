"""The style of all figures, and how they are drawn and saved with matplotlib."""
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Tuple

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

INK, PAPER = '#1f2329', '#ffffff'  # A page replaces these, since it may be dark.
COLORS = ('#3987d6', '#e0861a', '#23a079', '#c766a0', '#8b78d9', '#b09b1f', '#d4563f', '#5fa8b8')
NEUTRAL = '#8c929b'
WIDTH = 5.0
STYLE: Dict[Any, Any] = {
    'axes.axisbelow': True, 'axes.edgecolor': INK, 'axes.facecolor': 'none', 'axes.grid': True, 'axes.labelcolor': INK,
    'axes.spines.right': False, 'axes.spines.top': False, 'axes.titlelocation': 'left', 'axes.titlesize': 10,
    'figure.facecolor': PAPER, 'figure.constrained_layout.use': True, 'font.size': 10, 'grid.alpha': 0.18,
    'grid.color': INK, 'grid.linewidth': 0.6, 'legend.fontsize': 9, 'legend.frameon': False, 'savefig.dpi': 160,
    'svg.fonttype': 'none', 'text.color': INK, 'text.parse_math': False, 'xtick.color': INK, 'ytick.color': INK,
}


class Missing(Exception):
    """There is nothing to draw. The message says why."""


def new_figure(height: float, rows: int = 1, **kwargs: Any) -> Tuple[Figure, Any]:
    figure = Figure(figsize=(WIDTH, height))
    return figure, figure.subplots(rows, 1, **kwargs)


def log_scale(axes: Any, scale: str = 'log') -> None:
    """A log scale with plain numbers. An axis of less than a decade also gets minor numbers."""
    axes.set_yscale(scale)
    axes.yaxis.set_major_formatter('{x:g}')
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))


def add_legend(axes: Any, columns: int = 3, **kwargs: Any) -> None:
    axes.legend(loc='lower left', bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2, handlelength=1.2,
                columnspacing=1.2, **kwargs)


def draw(function: Callable[..., Figure], *args: Any) -> Tuple[Figure, Optional[str]]:
    """Draw a figure in the style of the report. If it has nothing to draw, it shows the reason. Returns both."""
    with matplotlib.rc_context(STYLE):
        try:
            return function(*args), None
        except Missing as missing:
            figure = Figure(figsize=(WIDTH, 1))
            figure.text(0.5, 0.5, str(missing), ha='center', va='center', wrap=True)
            return figure, str(missing)


def save(figure: Figure, stem: Path) -> str:
    """Write a figure as STEM.svg and STEM.png. Returns the SVG in the colours of the page."""
    with matplotlib.rc_context({**STYLE, 'svg.hashsalt': stem.name}), warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Glyph .* missing')  # matplotlib's font lacks some scripts, in PNG alone.
        figure.savefig(f'{stem}.png')
        figure.set_layout_engine('none')  # The layout is done already.
        figure.savefig(f'{stem}.svg', metadata={'Date': None})
    text = Path(f'{stem}.svg').read_text(encoding='utf-8')
    return text[text.index('<svg'):].replace(INK, 'currentColor').replace(PAPER, 'none')
