"""The learning curves of a run."""
import csv
from pathlib import Path
from typing import Any, Dict

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..errors import one_line
from ..metrics import SHOTS
from ..plotting import COLORS, NEUTRAL, STYLE, Missing, add_legend, draw, log_scale, new_figure
from .folder import read_args
from .progress import read_summary
from .tasks import TERMS


def draw_curves(run: Path) -> Figure:
    """Draw the loss, the terms of the loss and the accuracies of a run."""
    try:
        rows = read_summary(run / 'summary.csv')
        names = rows[0] if rows else ()
        curves: Any = {key: [float(row[key]) if row[key] else None for row in rows] for key in names}
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise Missing(f'The summary.csv of the run cannot be read: {one_line(error)}.') from error
    if not curves:
        raise Missing('The summary.csv of the run has no epoch yet.')
    border = read_args(run).get('epochs', 0) + 0.5  # between the stages of training
    terms = [f'train_{term}' for term in TERMS if any(curves.get(f'train_{term}', ()))]
    figure, axes = new_figure(6 if terms else 4.6, 3 if terms else 2, sharex=True)

    def lines(ax: Any, keys: Dict[str, str], ylabel: str) -> None:
        for k, (key, label) in enumerate(keys.items()):
            found = [(row + 1, value) for row, value in zip(curves['epoch'], curves.get(key, ())) if value is not None]
            if found:
                ax.plot(
                    *zip(*found), color=COLORS[k % len(COLORS)], label=label,
                    marker='.' if len(found) < 40 else None)
        ax.set_ylabel(ylabel)
        add_legend(ax, 5)
        if curves['epoch'][0] < border - 0.5 < curves['epoch'][-1] + 1:
            ax.axvline(border, color=NEUTRAL, linestyle=':', zorder=0)
            if ax is axes[0]:
                ax.text(border, 0.98, ' stage two', transform=ax.get_xaxis_transform(), va='top')

    lines(axes[0], {'train_loss': 'training', 'eval_loss': 'evaluation'}, 'loss')
    if terms:
        lines(axes[1], {term: TERMS[term.removeprefix('train_')] for term in terms}, 'terms of the loss')
        log_scale(axes[1])
    lines(axes[-1], {'eval_top1': 'top-1', **{f'eval_{shot}': f'{shot}-shot' for shot in SHOTS}}, 'accuracy in %')
    axes[-1].set_xlabel('epoch')
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def write_curves(run: Path) -> None:
    """Draw the learning curves of a run folder as its `curves.png`."""
    figure, _ = draw(draw_curves, run)
    with matplotlib.rc_context(STYLE):
        figure.savefig(run / 'curves.png')
