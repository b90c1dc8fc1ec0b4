"""The numbers of a report, from saved logits."""
import csv
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch

from ..metrics import MOST_EXPERTS, NUM_BINS, SHOTS, ExpertEvaluator, ShotConfig, all_subsets
from .logits import SavedLogits

__all__ = [
    'Confusion', 'Judged', 'PairedTest', 'best_expert_shares', 'judge', 'mean_intervals', 'paired_test', 'read_curves',
    'same_images', 'tail_confusions', 'trend', 'wilson',
]

_TAILS = 2.5, 97.5  # percent, of a 95 % interval
_Z = 1.959963984540054  # the normal quantile of the latter
_DRAWS = 10_000  # of a posterior
_CHUNK = 2 ** 26  # logits at a time
_TILTS = np.linspace(0, 1, 6)  # exponents of the training prior


def wilson(right: np.ndarray, total: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """Bounds of Wilson's 95 % interval of a share, NaN where nothing was seen.

    Args:
        right: Successes, of any shape.
        total: Trials, of a shape that fits.
    """
    with np.errstate(divide='ignore', invalid='ignore'):
        share = right / total
        centre = (share + _Z ** 2 / (2 * total)) / (1 + _Z ** 2 / total)
        half = _Z / (1 + _Z ** 2 / total) * np.sqrt(share * (1 - share) / total + _Z ** 2 / (4 * total ** 2))
    seen = np.asarray(total) > 0
    return np.where(seen, (centre - half).clip(0), np.nan), np.where(seen, (centre + half).clip(max=1), np.nan)


@dataclass
class Judged:
    """What saved logits come to; output 0 is the ensemble, output 1 + m expert m.

    Attributes:
        saved: The logits.
        metrics: What `eval.py` tells of them.
        predictions: Predicted classes [N, 1 + M].
        confidence: Probability of the predicted class [N], of the ensemble.
        hardest_negative: Largest probability of a wrong class [N], of the ensemble.
        subset_top1: Top-1 in percent of every choice of experts, in the order of `all_subsets`.
        tilted: Per-class accuracy [T, C] of the ensemble that is told the prior of the world, the training prior to
            the power of each of `tilts`.
    """

    saved: SavedLogits
    metrics: Dict[str, Any]
    predictions: np.ndarray
    confidence: np.ndarray
    hardest_negative: np.ndarray
    subset_top1: List[float]
    tilted: np.ndarray

    tilts = _TILTS

    @cached_property
    def right(self) -> np.ndarray:
        """Whether each output is right on each image [N, 1 + M]."""
        return self.predictions == self.saved.targets[:, None]

    @cached_property
    def total(self) -> np.ndarray:
        """Test images of each class [C]."""
        return np.bincount(self.saved.targets, minlength=self.saved.num_classes)

    @cached_property
    def right_by_class(self) -> np.ndarray:
        """Right answers of each class and output [C, 1 + M]."""
        return np.stack([
            np.bincount(self.saved.targets[one], minlength=self.saved.num_classes) for one in self.right.T], axis=1)

    @cached_property
    def accuracy(self) -> np.ndarray:
        """Share of right answers of each class and output [C, 1 + M], NaN without test images."""
        with np.errstate(invalid='ignore'):
            return self.right_by_class / self.total[:, None]

    @cached_property
    def order(self) -> np.ndarray:
        """Classes by shot division, and within one from the most training images to the fewest."""
        return np.lexsort((-self.saved.class_counts, self.saved.shots))

    @cached_property
    def shots(self) -> Dict[str, np.ndarray]:
        """Masks [C] of the shot divisions, of classes with test images."""
        return {shot: (self.saved.shots == number) & (self.total > 0) for number, shot in enumerate(SHOTS)}

    @cached_property
    def intervals(self) -> Dict[str, Optional[Tuple[float, float]]]:
        """95 % intervals in percent of the ensemble's accuracies, as `mean_intervals` names them."""
        right = self.right_by_class[:, 0]
        return mean_intervals(np.stack([right, self.total - right], axis=1), (1, 0), self.shots)

    @cached_property
    def most_confused(self) -> List[Optional[Tuple[int, int]]]:
        """Of each class the wrong class that the ensemble says most, and how often, None where it is never wrong."""
        best: List[Optional[Tuple[int, int]]] = [None] * self.saved.num_classes
        for (true, said), count in _confusions(self):
            if best[true] is None:
                best[true] = (said, count)
        return best

    def reliability(self) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Images, right answers and mean confidence of each bin of confidence, the last NaN where a bin is empty."""
        bins = np.minimum((np.searchsorted(_EDGES, self.confidence.astype(np.float32), side='right') - 1), NUM_BINS - 1)
        count, confidence, right = (
            np.bincount(bins, weights=one, minlength=NUM_BINS)
            for one in (np.ones_like(self.confidence), self.confidence, self.right[:, 0]))
        with np.errstate(invalid='ignore'):
            return count.astype(int), right.astype(int), confidence / count

    def coverage(self) -> Tuple[np.ndarray, np.ndarray]:
        """Share of images kept, from the surest on, and the accuracy on them, both [N]."""
        right = self.right[np.argsort(-self.confidence, kind='stable'), 0]
        kept = np.arange(1, len(right) + 1)
        return kept / len(right), right.cumsum() / kept

    def prior_shift(self) -> Tuple[np.ndarray, np.ndarray]:
        """Expected top-1 [T] in worlds from uniform to the training prior, as it is and told the prior."""
        seen = self.total > 0
        worlds = (self.saved.class_counts[seen] / self.saved.class_counts.sum())[None] ** _TILTS[:, None]
        worlds /= worlds.sum(1, keepdims=True)
        return worlds @ self.accuracy[seen, 0], (worlds * self.tilted[:, seen]).sum(1)


_EDGES = torch.linspace(0, 1, NUM_BINS + 1).numpy()


def judge(saved: SavedLogits) -> Judged:
    """Judge saved logits, some images at a time."""
    _, num_experts, num_classes = saved.logits.shape
    # Divisions as they were when the logits were saved: one, two and three images stand for few, medium and many.
    evaluator = ExpertEvaluator(
        num_experts, (len(SHOTS) - saved.shots).tolist(), shots=ShotConfig(2, 2))
    subsets = all_subsets(num_experts) if num_experts <= MOST_EXPERTS else []
    log_prior = torch.from_numpy(saved.class_counts / saved.class_counts.sum()).clamp(min=1e-12).log().float()
    parts, subset_right, tilted = [], np.zeros(len(subsets)), np.zeros((len(_TILTS), num_classes))
    size = max(_CHUNK // (num_classes * num_experts), 1)
    for start in range(0, len(saved.targets), size):
        logits = torch.from_numpy(saved.logits[start:start + size]).float()
        target = torch.from_numpy(saved.targets[start:start + size]).long()
        evaluator.update(logits, target)
        ensemble = logits.mean(1)
        predictions = torch.cat([ensemble[:, None], logits], dim=1).argmax(-1)
        for t, tilt in enumerate(_TILTS.tolist()):
            said = (ensemble + tilt * log_prior).argmax(-1) if tilt else predictions[:, 0]
            tilted[t] += np.bincount(target[said == target], minlength=num_classes)
        for i, subset in enumerate(subsets):
            subset_right[i] += int((logits[:, list(subset)].mean(1).argmax(-1) == target).sum())
        probabilities = ensemble.softmax(-1)
        confidence = probabilities.amax(-1)
        probabilities.scatter_(1, target[:, None], -1)
        parts.append((predictions, confidence, probabilities.amax(-1).clamp(min=0)))
    predictions, confidence, hardest = (torch.cat(one).numpy() for one in zip(*parts))
    total = np.bincount(saved.targets, minlength=num_classes)
    return Judged(
        saved, evaluator.compute(), predictions, confidence, hardest,
        (100 * subset_right / len(saved.targets)).tolist(), tilted / np.maximum(total, 1))


def mean_intervals(
        outcomes: np.ndarray,
        values: Sequence[float],
        shots: Dict[str, np.ndarray],
) -> Dict[str, Optional[Tuple[float, float]]]:
    """95 % intervals, in percent, of mean values: what other test images of the same classes may give.

    The mean of the n images of a class has an n-th of the variance of one image. Shares of outcomes in the place of
    their probabilities make that too small by (n - 1) / n, nothing at all for n = 1, and what is missing is taken from
    the shot division: the class gets (v + V / n) / n, with v its own variance and V that of the whole division, which
    is right where the classes of a division are alike and too wide where they are not. Summed over a division that is
    the variance V / m of m images drawn from the division at large. Of their means Jeffreys' posterior is drawn, a
    beta distribution for two outcomes and a Dirichlet one for more; draws of the divisions add up to those of all.

    Args:
        outcomes: Images of each class and outcome [C, K].
        values: Value of each outcome [K].
        shots: Masks [C] of the shot divisions, of classes with images.

    Returns:
        Intervals of `top1`, the mean over images, `balanced`, that over classes, and of each division that over its
        classes, None for one without classes. All contain the mean itself.
    """
    total = outcomes.sum(1)
    weights = {'top1': total, 'balanced': total > 0, **shots}
    return {
        name: _mean_interval(outcomes, np.asarray(values), weight / weight.sum(), shots) if weight.any() else None
        for name, weight in weights.items()
    }


def _mean_interval(
        outcomes: np.ndarray,
        values: np.ndarray,
        weight: np.ndarray,
        shots: Dict[str, np.ndarray],
) -> Tuple[float, float]:
    rng = np.random.default_rng(0)
    drawn = sum(
        weight[mask].sum() * _draw_means(outcomes[mask], values, weight[mask] / weight[mask].sum(), rng)
        for mask in shots.values() if weight[mask].any())
    mean = weight @ (outcomes @ values / np.maximum(outcomes.sum(1), 1))
    low, high = np.percentile(drawn, _TAILS)
    return 100 * float(min(low, mean)), 100 * float(max(high, mean))


def _draw_means(outcomes: np.ndarray, values: np.ndarray, weight: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws of the mean value of the classes of a division, all with images, by their weights [C]."""

    def variance(shares: np.ndarray) -> np.ndarray:
        return shares @ values ** 2 - (shares @ values) ** 2

    total = outcomes.sum(1)
    shares = outcomes / total[:, None]
    whole = weight @ shares
    if outcomes.any(0).sum() > 1:
        ratio = variance(shares) / variance(whole)
    else:
        ratio = 1 - 1 / total  # without variance, what it would be on average if the classes are alike
    size = 1 / np.sum(weight ** 2 / total * (ratio + 1 / total))
    return rng.dirichlet(size * whole + 0.5, _DRAWS) @ values


def same_images(a: SavedLogits, b: SavedLogits) -> bool:
    """Whether two models saw the same images, in the same order and with the same labels."""
    return a.paths == b.paths and a.class_names == b.class_names and np.array_equal(a.targets, b.targets)


class PairedTest(NamedTuple):
    """What `paired_test` gives of a group of classes.

    Attributes:
        difference: Accuracy of the second model less that of the first, in percent.
        interval: Its 95 % interval, by `mean_intervals` of what is gained and lost.
        p_value: Of McNemar's exact test on the images that just one model has right.
        classes: Classes where the second model is better, as good and worse.
    """

    difference: float
    interval: Tuple[float, float]
    p_value: float
    classes: Tuple[int, int, int]


def paired_test(first: Judged, second: Judged) -> Dict[str, Optional[PairedTest]]:
    """Compare two models that saw the same images, on all of them, `top1`, and on each shot division."""
    from scipy.stats import binomtest
    num_classes, targets = first.saved.num_classes, first.saved.targets
    one, two = first.right[:, 0], second.right[:, 0]
    gained, lost = (
        np.bincount(targets[only], minlength=num_classes) for only in (two & ~one, one & ~two))
    intervals = mean_intervals(
        np.stack([gained, lost, first.total - gained - lost], axis=1), (1, -1, 0), first.shots)
    difference = gained - lost
    results: Dict[str, Optional[PairedTest]] = {}
    for name, mask in {'top1': first.total > 0, **first.shots}.items():
        interval = intervals[name]
        if interval is None or not mask.any():
            results[name] = None
            continue
        wins, losses = int(gained[mask].sum()), int(lost[mask].sum())
        share = difference[mask].sum() / first.total.sum() if name == 'top1' else (
            difference[mask] / first.total[mask]).mean()
        p_value = float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.
        better, same, worse = (
            int(np.sum(compare(difference[mask], 0))) for compare in (np.greater, np.equal, np.less))
        results[name] = PairedTest(100 * float(share), interval, p_value, (better, same, worse))
    return results


def best_expert_shares(
        judged: Judged,
        num_draws: int = 300,
) -> Tuple[Dict[str, np.ndarray], Dict[str, Tuple[float, float]]]:
    """Share of classes that each expert is best at, by shot; experts that tie share the class.

    Returns:
        The shares [M], and the bounds of 95 % of the shares that chance gives: experts that are equally good, so that
        on each image any of them could have been the ones that were right.
    """
    targets, num_classes = judged.saved.targets, judged.saved.num_classes
    right = judged.right[:, 1:]

    def shares(right: np.ndarray) -> Dict[str, np.ndarray]:
        counts = np.stack([np.bincount(targets[one], minlength=num_classes) for one in right.T], axis=1)
        best = counts == counts.max(1, keepdims=True)
        best = best / best.sum(1, keepdims=True)
        return {shot: best[mask].mean(0) for shot, mask in judged.shots.items() if mask.any()}

    rng = np.random.default_rng(0)
    draws = [shares(rng.permuted(right, axis=1)) for _ in range(num_draws)]
    actual = shares(right)
    # Chance knows no expert by number, so that the draws of all make one distribution.
    return actual, {shot: tuple(np.percentile([draw[shot] for draw in draws], _TAILS).tolist()) for shot in actual}


def trend(values: np.ndarray, num_points: int = 200) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A Gaussian moving average over ranks, a fifteenth of them wide, and half the width of its 95 % band.

    Args:
        values: Values [C] in order, NaN where there is none.

    Returns:
        Points, averages and half widths.
    """
    ranks = np.flatnonzero(~np.isnan(values))
    values = values[ranks]
    points = np.linspace(ranks[0], ranks[-1], num_points)
    weights = np.exp(-0.5 * ((points[:, None] - ranks) / max(len(ranks) / 15, 1)) ** 2)
    weights /= weights.sum(1, keepdims=True)
    mean = weights @ values
    error = np.sqrt((weights ** 2 * (values - mean[:, None]) ** 2).sum(1))
    return points, mean, _Z * error


def _confusions(judged: Judged) -> List[Tuple[Tuple[int, int], int]]:
    """Pairs of true and predicted class with their number, the most frequent first."""
    wrong = ~judged.right[:, 0]
    pairs, counts = np.unique(
        np.stack([judged.saved.targets[wrong], judged.predictions[wrong, 0]], axis=1), axis=0, return_counts=True)
    order = np.argsort(-counts, kind='stable')
    return [((int(pairs[i, 0]), int(pairs[i, 1])), int(counts[i])) for i in order]


class Confusion(NamedTuple):
    """A class taken for another.

    Attributes:
        true: The class.
        predicted: What it is taken for.
        count: How often.
        cost: Points of few-shot accuracy that this costs.
        images: Images of it, by index.
    """

    true: int
    predicted: int
    count: int
    cost: float
    images: List[int]


def tail_confusions(judged: Judged, limit: int = 15) -> List[Confusion]:
    """The confusions that cost the few-shot classes most; empty where there is no such class, or no mistake."""
    few, found = judged.shots['few'], []
    for (true, said), count in _confusions(judged):
        if few[true]:
            found.append(Confusion(true, said, count, 100 * count / judged.total[true] / few.sum(), []))
    found = sorted(found, key=lambda one: -one.cost)[:limit]
    for one in found:
        pair = (judged.saved.targets == one.true) & (judged.predictions[:, 0] == one.predicted)
        one.images.extend(np.flatnonzero(pair)[:4].tolist())
    return found


def read_curves(run: Path) -> Dict[str, List[Optional[float]]]:
    """The columns of a run's `summary.csv`, None for what an epoch does not have."""
    with (run / 'summary.csv').open(newline='') as file:
        rows = list(csv.DictReader(file))
    return {key: [float(row[key]) if row[key] else None for row in rows] for key in (rows[0] if rows else ())}
