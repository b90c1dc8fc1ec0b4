"""The figures of a report, drawn with matplotlib.

Each function takes the `Analysis` of a model and of a second one or None. If it has nothing to draw, it raises
`Missing`.
"""
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..metrics import MOST_LISTED, SHOTS, all_subsets, shown_divisions
from ..plotting import COLORS, INK, NEUTRAL, Missing, add_legend, log_scale, new_figure
from ..training.curves import draw_curves
from .analysis import TILTS, Analysis, best_expert_shares, costly_confusions, trend, wilson

MANY_POINTS = 1000  # More points than this are drawn as pixels, which keeps files small.


def shorten(name: str, length: int = 24) -> str:
    """A class name that fits into a line of a figure. It is cut in the middle, because names often begin alike."""
    name = ' '.join(''.join(char if char.isprintable() else ' ' for char in name).split())
    return name if len(name) <= length else f'{name[:length // 2]}…{name[len(name) - (length - 1) // 2:]}'


def _shade_shots(axes: Any, analysis: Analysis) -> None:
    """Shade and name the shot divisions along the ordered classes. Few classes are named too."""
    shots = analysis.saved.shots
    start = -0.5
    for shot, size, alpha in zip(SHOTS, np.bincount(shots, minlength=3), (0.12, 0.07, 0.03)):
        if 0 < size < len(shots):
            axes.axvspan(start, start + size, color=INK, alpha=alpha, linewidth=0)
            axes.text(
                start + size / 2, 0.98, shot, transform=axes.get_xaxis_transform(), ha='center', va='top', fontsize=9,
                rotation=0 if size > 0.12 * len(shots) else 90)
        start += size
    axes.set_xlim(-0.5, len(shots) - 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    if len(shots) <= MOST_LISTED:
        axes.set_xticks(range(len(shots)), _names(analysis, analysis.order), rotation=90, fontsize=8)


def _names(analysis: Analysis, classes: Any) -> List[str]:
    return [shorten(analysis.saved.class_names[c], 16) for c in classes]


def class_counts(analysis: Analysis, other: Optional[Analysis]) -> Figure:
    counts = analysis.saved.class_counts[analysis.order]
    figure, axes = new_figure(3.6)
    _shade_shots(axes, analysis)
    axes.step(np.arange(len(counts)), counts, where='mid', color=COLORS[0])
    log_scale(axes, 'symlog' if counts.min() < 1 else 'log')
    axes.set_ylim(top=counts.max() * 2.2)
    axes.set(xlabel='classes, most training images first', ylabel='training images')
    return figure


def _draw_trend(axes: Any, values: np.ndarray) -> None:
    if np.sum(~np.isnan(values)) >= 20:
        points, mean, half = trend(values)
        axes.fill_between(points, mean - half, mean + half, color=INK, alpha=0.2, linewidth=0)
        axes.plot(points, mean, color=INK)


def class_accuracy(analysis: Analysis, other: Optional[Analysis]) -> Figure:
    accuracy = 100 * analysis.accuracy[analysis.order]
    many = len(accuracy) > MANY_POINTS
    size = dict(s=3 if many else 16, linewidth=0, rasterized=many, alpha=0.5 if many else 0.9)
    figure, (top, bottom) = new_figure(6, 2, sharex=True, sharey=True)
    ranks = np.arange(len(accuracy))
    for axes in (top, bottom):
        _shade_shots(axes, analysis)
        axes.set(ylabel='accuracy in %', ylim=(-2, 112), yticks=range(0, 101, 20))
    top.scatter(ranks, accuracy[:, 0], color=NEUTRAL, label='ensemble', **size)
    _draw_trend(top, accuracy[:, 0])
    add_legend(top)
    highest = accuracy[:, 1:].max(1)
    counts = analysis.right_by_class[analysis.order, 1:]
    best = counts == counts.max(1, keepdims=True)
    alone = best.sum(1) == 1
    experts = [(f'expert {m}', COLORS[m % len(COLORS)], alone & one) for m, one in enumerate(best.T)]
    for label, color, mask in [('several', NEUTRAL, ~alone), *experts]:
        if mask.any():
            bottom.scatter(ranks[mask], highest[mask], color=color, label=label, **size)
    _draw_trend(bottom, highest)
    add_legend(bottom, 4, title='best single expert', title_fontsize=9, alignment='left')
    bottom.set_xlabel('classes, most training images first')
    return figure


def _bar_places(number: int, num_bars: int, num_groups: int) -> Tuple[np.ndarray, float]:
    """Positions and width of the bars of one kind. Each group has one bar of each kind, side by side."""
    width = 0.8 / num_bars
    return np.arange(num_groups) + (number - (num_bars - 1) / 2) * width, 0.9 * width


def best_experts(analysis: Analysis, other: Optional[Analysis]) -> Figure:
    num_experts = analysis.saved.num_experts
    if num_experts == 1:
        raise Missing('This model has one expert, which is the best at every class.')
    shares, chance = best_expert_shares(analysis)
    low, high = 100 * np.array(list(chance.values())).T
    figure, axes = new_figure(3)
    for m in range(num_experts):
        x, width = _bar_places(m, num_experts, len(shares))
        heights = [100 * share[m] for share in shares.values()]
        axes.bar(x, heights, width, color=COLORS[m % len(COLORS)], label=f'expert {m}')
        axes.errorbar(
            x, (low + high) / 2, (high - low) / 2, color=INK, linewidth=1.2, capsize=5, fmt='none',
            label='chance' if m == num_experts - 1 else None)
    axes.set_xticks(range(len(shares)), [f'{shot} ({analysis.shots[shot].sum()})' for shot in shares])
    axes.set(ylabel='share of classes in %')
    axes.grid(axis='x', visible=False)
    add_legend(axes, 4)
    return figure


def hardest_negatives(analysis: Analysis, other: Optional[Analysis]) -> Figure:
    shots = [shot for shot in SHOTS if analysis.shots[shot].any()]
    figure, axes = new_figure(1.1 + 1.5 * len(shots), len(shots), sharex=True, sharey=True, squeeze=False)
    edges = np.linspace(0, 1, 21)
    for ax, shot in zip(axes[:, 0], shots):
        for one, fill in ((analysis, True), (other, False)):
            if one is not None and (mask := one.shots[shot][one.saved.targets]).any():
                values = one.hardest_negative[mask]
                heights = 100 * np.histogram(values, edges)[0] / len(values)
                color = COLORS[0] if fill else COLORS[1]
                ax.stairs(
                    heights, edges, fill=fill, color=color, alpha=0.6 if fill else 1, linewidth=1.6,
                    label=f'{shorten(one.saved.name)}, mean {values.mean():.3f}')
        log_scale(ax)
        ax.set_ylabel('images in %')
        ax.set_title(f'{shot}-shot')
        ax.legend(loc='upper right')
    axes[0, 0].set_ylim(top=600)  # This leaves room for legends.
    axes[-1, 0].set_xlabel('probability of the hardest negative class')
    return figure


def _shot_bars(axes: Any, models: Sequence[Tuple[str, Analysis]]) -> None:
    """Accuracy by shot division with 95 % intervals, a bar for each model."""
    names = {'balanced': 'all', **{shot: shot for shot in shown_divisions(one.metrics for _, one in models)}}
    for k, (label, one) in enumerate(models):
        x, width = _bar_places(k, len(models), len(names))
        value = np.array([one.metrics[name] for name in names], dtype=float)
        low, high = np.array([one.intervals[name] or (np.nan, np.nan) for name in names]).T
        axes.bar(
            x, value, width, yerr=np.maximum([value - low, high - value], 0), ecolor=INK,
            error_kw=dict(elinewidth=1), color=COLORS[k % len(COLORS)], label=label)
    axes.set_xticks(range(len(names)), names.values())
    axes.set_ylabel('accuracy in %')
    axes.grid(axis='x', visible=False)
    add_legend(axes, 1)


def compare_models(models: Sequence[Analysis]) -> Figure:
    """Accuracy of several models, overall and by shot division, with 95 % intervals."""
    figure, axes = new_figure(3 + 0.15 * len(models))
    _shot_bars(axes, [(shorten(one.saved.name, 48), one) for one in models])
    return figure


def stages_and_experts(analysis: Analysis, other: Optional[Analysis]) -> Figure:
    figure, (top, bottom) = new_figure(6, 2)
    alone = f'{shorten(analysis.saved.name)}, without stage one or a second model'
    _shot_bars(top, [(shorten(one.saved.name, 32), one) for one in (other, analysis)] if other else [(alone, analysis)])
    subsets = all_subsets(analysis.saved.num_experts)
    costs = {tuple(one['experts']): one['gmacs'] for one in analysis.saved.costs}
    known = all(subset in costs for subset in subsets)
    if analysis.subset_top1:
        best = {len(subset): subset for _, subset in sorted(zip(analysis.subset_top1, subsets))}
        for subset, top1 in zip(subsets, analysis.subset_top1):
            x = costs[subset] if known else len(subset)
            bottom.plot(x, top1, 'o', color=COLORS[len(subset) - 1])
            if best[len(subset)] == subset:  # Other labels would overlap.
                bottom.annotate(
                    ' '.join(map(str, subset)), (x, top1), xytext=(0, 6), textcoords='offset points', ha='center')
        bottom.margins(x=0.15, y=0.15)
    else:
        bottom.set_title('too many experts to try every subset')
    bottom.set(xlabel='GMACs an image' if known else 'experts kept (costs were not measured)', ylabel='top-1 in %')
    bottom.xaxis.set_major_locator(MaxNLocator(4, integer=not known))  # More labels would overlap.
    return figure


def reliability(analysis: Analysis, other: Optional[Analysis]) -> Figure:
    count, right, confidence = analysis.reliability()
    seen = count > 0
    count, right, confidence, edges = count[seen], right[seen], confidence[seen], np.linspace(0, 1, len(count) + 1)
    low, high = wilson(right, count)
    figure, (top, bars, bottom) = new_figure(6.6, 3, height_ratios=(3, 1, 3))
    top.plot([0, 1], [0, 100], color=NEUTRAL, linestyle=':', label='calibrated')
    top.plot(confidence, 100 * right / count, 'o-', color=COLORS[0], markersize=4, label='ensemble')
    top.fill_between(confidence, 100 * low, 100 * high, color=COLORS[0], alpha=0.2, linewidth=0)
    top.set(ylabel='accuracy in %', xlim=(0, 1), ylim=(0, 100))
    top.set_title(f"calibration error {analysis.metrics['ece']:.2f} %", loc='right')
    top.legend(loc='upper left')
    bars.bar(edges[:-1][seen], count, edges[1], align='edge', color=COLORS[0], alpha=0.6)
    bars.set(xlabel='probability of the predicted class', ylabel='images', xlim=(0, 1))
    kept, accuracy = analysis.coverage()
    chosen = np.unique(np.linspace(min(len(kept) - 1, len(kept) // 50), len(kept) - 1, 200).astype(int))
    bottom.plot(100 * kept[chosen], 100 * accuracy[chosen], color=COLORS[2])
    reject = analysis.metrics['reject']
    if reject['accuracy'] is not None:
        bottom.plot(
            reject['coverage'], reject['accuracy'], 'o', color=COLORS[6],
            label=f"probability of at least {reject['threshold']:g}")
        bottom.legend(loc='lower left')
    bottom.set(xlabel='images kept in %, most confident first', ylabel='accuracy in %', xlim=(0, 100))
    return figure


def confusions(analysis: Analysis, other: Optional[Analysis]) -> Figure:
    found = costly_confusions(analysis)
    if not found:
        raise Missing('No image of these classes is taken for another class.')
    figure, axes = new_figure(1.2 + 0.3 * len(found))
    names = analysis.saved.class_names
    axes.barh(range(len(found)), [one.cost for one in found], color=COLORS[6], alpha=0.85)
    axes.set_yticks(
        range(len(found)), [f'{shorten(names[one.true])} → {shorten(names[one.predicted])}' for one in found])
    axes.margins(y=0.01)
    axes.invert_yaxis()
    # Long names leave the axes little room.
    axes.set_xlabel(f"points of {'few-shot' if analysis.has_few else 'balanced'} accuracy lost", loc='right')
    axes.grid(axis='y', visible=False)
    return figure


def confusion_matrix(analysis: Analysis, other: Optional[Analysis]) -> Figure:
    total, mistakes = analysis.total, analysis.total - analysis.right_by_class[:, 0]
    worst = set(np.argsort(-mistakes, kind='stable')[:MOST_LISTED].tolist())
    classes = [c for c in analysis.order.tolist() if total[c] and c in worst]
    place = np.full(analysis.saved.num_classes, -1)
    place[classes] = np.arange(len(classes))
    row, column = place[analysis.saved.targets], place[analysis.predictions[:, 0]]
    shown = (row >= 0) & (column >= 0)
    matrix = np.zeros((len(classes), len(classes)))
    np.add.at(matrix, (row[shown], column[shown]), 1)
    share = 100 * matrix / total[classes, None]
    figure, axes = new_figure(min(3 + 0.2 * len(classes), 6))
    colors = LinearSegmentedColormap.from_list('share', [to_rgba(COLORS[0], 0), to_rgba(COLORS[0], 1)])
    axes.pcolormesh(np.ma.masked_equal(share, 0), cmap=colors, vmin=0, vmax=100)
    if len(classes) <= 12:
        for (row, column), value in np.ndenumerate(share):
            if value:
                axes.text(column + 0.5, row + 0.5, f'{value:.0f}', ha='center', va='center', fontsize=8)
    places, names = np.arange(len(classes)) + 0.5, _names(analysis, classes)
    axes.set_xticks(places, names, rotation=90, fontsize=8)
    axes.set_yticks(places, names, fontsize=8)
    axes.set(xlabel='predicted class', ylabel='class')
    axes.invert_yaxis()
    axes.grid(visible=False)
    return figure


def prior_shift(analysis: Analysis, other: Optional[Analysis]) -> Figure:
    plain, adjusted = analysis.prior_shift()
    figure, axes = new_figure(3)
    axes.plot(TILTS, 100 * plain, color=COLORS[0], label='as it is')
    axes.plot(TILTS, 100 * adjusted, color=COLORS[1], linestyle='--', label='prior added')
    axes.set(
        xlabel='class frequencies: from uniform (0) to those of training (1)', ylabel='expected top-1 in %',
        xlim=(0, 1))
    add_legend(axes)
    return figure


def learning_curves(analysis: Analysis, other: Optional[Analysis]) -> Figure:
    if analysis.saved.run is None:
        raise Missing('There is no run folder with a summary.csv beside this model.')
    return draw_curves(analysis.saved.run)


DRAWINGS: Dict[str, Callable[..., Figure]] = {one.__name__: one for one in (
    class_counts, class_accuracy, best_experts, hardest_negatives, stages_and_experts, reliability, confusion_matrix,
    confusions, prior_shift, learning_curves)}
"""Each figure of the page by name. The page has its title and caption."""
