"""The numbers of a report, computed from saved logits."""
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch

from ..metrics import MOST_EXPERTS, NUM_BINS, SHOTS, ExpertEvaluator, all_subsets
from .logits import SavedLogits

_TAILS = 2.5, 97.5  # percentiles that bound a 95 % interval
_Z = 1.959963984540054  # quantile of the normal distribution for 95 %
_DRAWS = 10_000  # from a posterior
_CHUNK = 2 ** 25  # logits to work on at a time
_TILTS = np.linspace(0, 1, 6)  # exponents of the training prior
_EDGES = torch.linspace(0, 1, NUM_BINS + 1).numpy()


@cache
def _wilson(right: int, total: int) -> Tuple[float, float]:
    from scipy.stats import binomtest
    interval = binomtest(right, total).proportion_ci(method='wilson')
    return interval.low, interval.high


def wilson(right: np.ndarray, total: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """Lower and upper bounds of Wilson's 95 % interval of shares. NaN where `total` is 0.

    Args:
        right: Number of successes, of any shape.
        total: Number of trials, of a shape that fits.
    """
    right, total = np.broadcast_arrays(right, total)
    bounds = [_wilson(r, n) if n else (np.nan, np.nan) for r, n in zip(right.ravel().tolist(), total.ravel().tolist())]
    low, high = np.array(bounds).reshape(*right.shape, 2).transpose(-1, *range(right.ndim))
    return low, high


@dataclass
class Analysis:
    """The numbers of saved logits. Output 0 is the ensemble, output 1 + m is expert m."""

    saved: SavedLogits
    metrics: Dict[str, Any]  # of `ExpertEvaluator`
    predictions: np.ndarray  # predicted classes [N, 1 + M]
    confidence: np.ndarray  # probability that the ensemble gives the predicted class [N]
    hardest_negative: np.ndarray  # largest probability that the ensemble gives a wrong class [N]
    subset_top1: List[float]  # top-1 in percent of every subset of the experts, in the order of `all_subsets`
    tilted: np.ndarray  # accuracy of the ensemble by class [T, C], with a power of the training prior added
    tilts = _TILTS  # the powers [T]

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
        """Correct answers by class and output [C, 1 + M]."""
        return _count_by_class(self.saved.targets, self.right, self.saved.num_classes)

    @cached_property
    def accuracy(self) -> np.ndarray:
        """Accuracy by class and output [C, 1 + M], NaN without test images."""
        with np.errstate(invalid='ignore'):
            return self.right_by_class / self.total[:, None]

    @cached_property
    def order(self) -> np.ndarray:
        """The classes by shot division, then from the most training images to the fewest."""
        return np.lexsort((-self.saved.class_counts, self.saved.shots))

    @cached_property
    def shots(self) -> Dict[str, np.ndarray]:
        """Masks [C] of the shot divisions. Classes without test images are left out."""
        return {shot: (self.saved.shots == number) & (self.total > 0) for number, shot in enumerate(SHOTS)}

    @cached_property
    def intervals(self) -> Dict[str, Optional[Tuple[float, float]]]:
        """95 % intervals of the ensemble's accuracies in percent, by the names of `mean_intervals`."""
        right = self.right_by_class[:, 0]
        return mean_intervals(np.stack([right, self.total - right], axis=1), (1, 0), self.shots)

    @cached_property
    def confusions(self) -> List[Tuple[int, int, int]]:
        """Each true class and the wrong class that the ensemble predicts, with their number, most frequent first."""
        wrong = ~self.right[:, 0]
        pairs, counts = np.unique(
            np.stack([self.saved.targets[wrong], self.predictions[wrong, 0]], axis=1), axis=0, return_counts=True)
        return [(*pairs[i].tolist(), int(counts[i])) for i in np.argsort(-counts, kind='stable')]

    @cached_property
    def most_confused(self) -> List[Optional[Tuple[int, int]]]:
        """The wrong class that the ensemble predicts most for each class, and how often. None without mistakes."""
        best = {true: (predicted, count) for true, predicted, count in reversed(self.confusions)}
        return [best.get(c) for c in range(self.saved.num_classes)]

    def reliability(self) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Images, correct answers and mean confidence in each bin of confidence. The mean of an empty bin is NaN."""
        bins = np.minimum((np.searchsorted(_EDGES, self.confidence.astype(np.float32), side='right') - 1), NUM_BINS - 1)
        count, confidence, right = (
            np.bincount(bins, weights=one, minlength=NUM_BINS)
            for one in (np.ones_like(self.confidence), self.confidence, self.right[:, 0]))
        with np.errstate(invalid='ignore'):
            return count.astype(int), right.astype(int), confidence / count

    def coverage(self) -> Tuple[np.ndarray, np.ndarray]:
        """Shares [N] of the images that one keeps from the most confident on, and the accuracy on them [N]."""
        right = self.right[np.argsort(-self.confidence, kind='stable'), 0]
        kept = np.arange(1, len(right) + 1)
        return kept / len(right), right.cumsum() / kept

    def prior_shift(self) -> Tuple[np.ndarray, np.ndarray]:
        """Expected top-1 [T] under class frequencies from uniform to those of training: as it is, with prior added."""
        seen = self.total > 0
        priors = (self.saved.class_counts[seen] / self.saved.class_counts.sum())[None] ** _TILTS[:, None]
        priors /= priors.sum(1, keepdims=True)
        return priors @ self.accuracy[seen, 0], (priors * self.tilted[:, seen]).sum(1)


def _count_by_class(targets: np.ndarray, right: np.ndarray, num_classes: int) -> np.ndarray:
    """Correct answers by class and output [C, K] from `right` [N, K]."""
    return np.stack([np.bincount(targets[one], minlength=num_classes) for one in right.T], axis=1)


def analyze(saved: SavedLogits) -> Analysis:
    """Analyze saved logits in chunks of images."""
    _, num_experts, num_classes = saved.logits.shape
    subsets = all_subsets(num_experts) if num_experts <= MOST_EXPERTS else []
    evaluator = ExpertEvaluator(num_experts, saved.shots.tolist(), subsets=subsets)
    log_prior = torch.from_numpy(saved.class_counts / saved.class_counts.sum()).clamp(min=1e-12).log().float()
    parts, tilted = [], np.zeros((len(_TILTS), num_classes))
    size = max(_CHUNK // (num_classes * num_experts), 1)
    for start in range(0, len(saved.targets), size):
        logits = torch.from_numpy(saved.logits[start:start + size]).float()
        target = torch.from_numpy(saved.targets[start:start + size]).long()
        evaluator.update(logits, target)
        ensemble = logits.mean(1)
        for t, tilt in enumerate(_TILTS.tolist()):
            right = (ensemble + tilt * log_prior).argmax(-1) == target
            tilted[t] += np.bincount(target[right], minlength=num_classes)
        probabilities = ensemble.softmax(-1)
        confidence = probabilities.amax(-1)
        probabilities.scatter_(1, target[:, None], -1)
        predictions = torch.cat([ensemble[:, None], logits], dim=1).argmax(-1)
        parts.append((predictions, confidence, probabilities.amax(-1).clamp(min=0)))
    predictions, confidence, hardest = (torch.cat(one).numpy() for one in zip(*parts))
    metrics = evaluator.compute()
    subset_top1 = [one['top1'] for one in metrics.pop('subsets', ())]
    total = np.bincount(saved.targets, minlength=num_classes)
    return Analysis(saved, metrics, predictions, confidence, hardest, subset_top1, tilted / np.maximum(total, 1))


def mean_intervals(
        outcomes: np.ndarray,
        values: Sequence[float],
        shots: Dict[str, np.ndarray],
) -> Dict[str, Optional[Tuple[float, float]]]:
    """95 % intervals, in percent, of mean values over other test images of the same classes.

    The mean of the n images of a class has 1 / n of the variance of one image. The shares of the outcomes estimate that
    variance too small by the factor (n - 1) / n, which is 0 for n = 1. The shot division makes up for it: a class gets
    the variance (v + V / n) / n, where v is its own and V that of the whole division. This is right where the classes
    of a division are alike, and too wide where they are not. Over the m images of a division it adds up to V / m.
    The intervals are percentiles of draws from Jeffreys' posterior of such means (a beta distribution for two outcomes,
    a Dirichlet distribution for more). The draws of the divisions add up to those of all classes.

    Args:
        outcomes: Number of images by class and outcome [C, K].
        values: Value of each outcome [K].
        shots: Masks [C] of the shot divisions, without classes that have no images.

    Returns:
        Intervals of `top1`, the mean over images, `balanced`, the mean over classes, and the mean over the classes of
        each division. None for a division without classes. Each contains the mean itself.
    """
    total, value = outcomes.sum(1), np.asarray(values)
    means = outcomes @ value / np.maximum(total, 1)
    intervals: Dict[str, Optional[Tuple[float, float]]] = {}
    for name, weight in {'top1': total, 'balanced': total > 0, **shots}.items():
        intervals[name] = None
        if weight.any():
            weight, rng = weight / weight.sum(), np.random.default_rng(0)
            drawn = sum(
                weight[mask].sum() * _draw_means(outcomes[mask], value, weight[mask] / weight[mask].sum(), rng)
                for mask in shots.values() if weight[mask].any())
            low, high = np.percentile(drawn, _TAILS)
            intervals[name] = 100 * float(min(low, weight @ means)), 100 * float(max(high, weight @ means))
    return intervals


def _draw_means(outcomes: np.ndarray, values: np.ndarray, weight: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws of the mean value over the classes of a division with weights [C]. All classes have images."""

    def variance(shares: np.ndarray) -> np.ndarray:
        return shares @ values ** 2 - (shares @ values) ** 2

    total = outcomes.sum(1)
    shares = outcomes / total[:, None]
    whole = weight @ shares
    if outcomes.any(0).sum() > 1:
        ratio = variance(shares) / variance(whole)
    else:
        ratio = 1 - 1 / total  # the variance is 0: its average if the classes are alike
    size = 1 / np.sum(weight ** 2 / total * (ratio + 1 / total))
    return rng.dirichlet(size * whole + 0.5, _DRAWS) @ values


def same_images(a: SavedLogits, b: SavedLogits) -> bool:
    """Whether two models saw the same images in the same order with the same labels."""
    return a.paths == b.paths and a.class_names == b.class_names and np.array_equal(a.targets, b.targets)


class PairedTest(NamedTuple):
    """Comparison of two models on a group of classes."""

    difference: float  # accuracy of the second model minus that of the first, in percent
    interval: Tuple[float, float]  # its 95 % interval
    p_value: float  # of McNemar's exact test on the images that only one model has right
    classes: Tuple[int, int, int]  # number of classes where the second model is better, equal and worse


def paired_test(first: Analysis, second: Analysis) -> Dict[str, Optional[PairedTest]]:
    """Compare two models that saw the same images: on all of them, `top1`, and on each shot division."""
    from scipy.stats import binomtest
    one, two = first.right[:, 0], second.right[:, 0]
    gained, lost = _count_by_class(
        first.saved.targets, np.stack([two & ~one, one & ~two], axis=1), first.saved.num_classes).T
    intervals = mean_intervals(
        np.stack([gained, lost, first.total - gained - lost], axis=1), (1, -1, 0), first.shots)
    difference = gained - lost
    results: Dict[str, Optional[PairedTest]] = {}
    for name, mask in {'top1': first.total > 0, **first.shots}.items():
        interval = intervals[name]
        if interval is None:
            results[name] = None
            continue
        wins, losses = int(gained[mask].sum()), int(lost[mask].sum())
        share = difference[mask].sum() / first.total.sum() if name == 'top1' else (
            difference[mask] / first.total[mask]).mean()
        p_value = float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.
        better, same, worse = (int((np.sign(difference[mask]) == sign).sum()) for sign in (1, 0, -1))
        results[name] = PairedTest(100 * float(share), interval, p_value, (better, same, worse))
    return results


def best_expert_shares(
        analysis: Analysis,
        num_draws: int = 300,
) -> Tuple[Dict[str, np.ndarray], Dict[str, Tuple[float, float]]]:
    """Share of the classes that each expert is best at, by shot division. Experts that tie share a class.

    Returns:
        The shares [M], and the bounds of 95 % of the shares by chance. Chance means equally good experts: on each
        image any of them could have been the ones that were right.
    """
    targets, right = analysis.saved.targets, analysis.right[:, 1:]

    def shares(right: np.ndarray) -> Dict[str, np.ndarray]:
        counts = _count_by_class(targets, right, analysis.saved.num_classes)
        best = counts == counts.max(1, keepdims=True)
        best = best / best.sum(1, keepdims=True)
        return {shot: best[mask].mean(0) for shot, mask in analysis.shots.items() if mask.any()}

    rng = np.random.default_rng(0)
    draws = [shares(rng.permuted(right, axis=1)) for _ in range(num_draws)]
    actual = shares(right)
    # By chance all experts are alike, so the draws of all experts make one distribution.
    return actual, {shot: tuple(np.percentile([draw[shot] for draw in draws], _TAILS).tolist()) for shot in actual}


def trend(values: np.ndarray, num_points: int = 200) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A Gaussian moving average over ranks. Its standard deviation is a fifteenth of the values.

    Args:
        values: Values [C] in order, NaN where there is none.

    Returns:
        Points, averages, and half the width of their 95 % band.
    """
    ranks = np.flatnonzero(~np.isnan(values))
    values = values[ranks]
    points = np.linspace(ranks[0], ranks[-1], num_points)
    weights = np.exp(-0.5 * ((points[:, None] - ranks) / max(len(ranks) / 15, 1)) ** 2)
    weights /= weights.sum(1, keepdims=True)
    mean = weights @ values
    error = np.sqrt((weights ** 2 * (values - mean[:, None]) ** 2).sum(1))
    return points, mean, _Z * error


class Confusion(NamedTuple):
    """A class that the ensemble takes for another."""

    true: int
    predicted: int
    count: int
    cost: float  # points of few-shot accuracy
    images: List[int]  # indices of the first few


def tail_confusions(analysis: Analysis, limit: int = 15) -> List[Confusion]:
    """The confusions that cost the few-shot classes most. Empty without such classes or without mistakes."""
    few, total = analysis.shots['few'], analysis.total
    found = [
        (100 * count / total[true] / few.sum(), true, predicted, count)
        for true, predicted, count in analysis.confusions if few[true]]
    rows = []
    for cost, true, predicted, count in sorted(found, key=lambda one: -one[0])[:limit]:
        images = (analysis.saved.targets == true) & (analysis.predictions[:, 0] == predicted)
        rows.append(Confusion(true, predicted, count, cost, np.flatnonzero(images)[:4].tolist()))
    return rows
