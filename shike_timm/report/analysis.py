"""Computes the numbers of a report from saved logits."""
from collections import Counter
from functools import cached_property
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch

from ..metrics import MOST_EXPERTS, NUM_BINS, SHOTS, ExpertEvaluator, all_subsets
from .logits import SavedLogits

TILTS = np.linspace(0, 1, 6)  # Exponents [T] of the training prior.
_TAILS = 2.5, 97.5  # Percentiles that bound a 95 % interval.
_Z = 1.959963984540054  # Quantile of the normal distribution for 95 %.
_POSTERIOR_DRAWS, _CHANCE_DRAWS = 10_000, 300
_CHUNK = 2 ** 25  # Number of logits to work on at a time.
_EDGES = torch.linspace(0, 1, NUM_BINS + 1).numpy()


def wilson(right: np.ndarray, total: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """Lower and upper bounds of Wilson's 95 % interval of the shares `right / total`. NaN where `total` is 0."""
    size = total + _Z ** 2
    with np.errstate(invalid='ignore'):
        half = _Z * np.sqrt(right * (total - right) / total + _Z ** 2 / 4) / size
    center = (right + _Z ** 2 / 2) / size
    return (center - half).clip(0, 1), (center + half).clip(0, 1)


def _count_by_class(saved: SavedLogits, right: np.ndarray) -> np.ndarray:
    """Correct answers by class and output [C, K] from `right` [N, K]."""
    return np.stack([np.bincount(saved.targets[one], minlength=saved.num_classes) for one in right.T], axis=1)


class Analysis:
    """What a report computes from saved logits. Output 0 is the ensemble, output 1 + m is expert m."""

    def __init__(self, saved: SavedLogits):
        num_images, num_experts, num_classes = saved.logits.shape
        subsets = all_subsets(num_experts) if num_experts <= MOST_EXPERTS else []
        evaluator = ExpertEvaluator(
            num_experts, saved.shots.tolist(), subsets=subsets, threshold=saved.reject_threshold)
        log_prior = torch.from_numpy(saved.class_counts / saved.class_counts.sum()).clamp(min=1e-12).log().float()
        parts, size = [], max(_CHUNK // (num_classes * num_experts), 1)
        for start in range(0, num_images, size):
            logits = torch.from_numpy(saved.logits[start:start + size]).float()
            target = torch.from_numpy(saved.targets[start:start + size]).long()
            evaluator.update(logits, target)
            ensemble = logits.mean(1)
            predictions = torch.cat([ensemble[:, None], logits], dim=1).argmax(-1)
            tilted = torch.stack([(ensemble + tilt * log_prior).argmax(-1) for tilt in TILTS.tolist()], dim=1)
            probabilities = ensemble.softmax(-1)
            confidence = probabilities.amax(-1)
            probabilities.scatter_(1, target[:, None], 0)
            parts.append((predictions, tilted, confidence, probabilities.amax(-1)))
        predictions, tilted, confidence, hardest_negative = (torch.cat(one).numpy() for one in zip(*parts))

        self.saved = saved
        self.metrics = evaluator.compute()
        # Top-1 in percent of every subset of the experts, in the order of `all_subsets`.
        self.subset_top1: List[float] = [one['top1'] for one in self.metrics.pop('subsets', ())]
        self.predictions = predictions  # Predicted classes [N, 1 + M].
        self.confidence = confidence  # probability that the ensemble gives the predicted class [N]
        self.hardest_negative = hardest_negative  # largest probability that the ensemble gives a wrong class [N]
        self.right = predictions == saved.targets[:, None]  # [N, 1 + M]
        self.total = evaluator.total.numpy()  # test images of each class [C]
        self.right_by_class = evaluator.top1[:, :1 + num_experts].numpy()  # correct answers [C, 1 + M]
        with np.errstate(invalid='ignore'):
            self.accuracy = self.right_by_class / self.total[:, None]  # [C, 1 + M], NaN without test images
            # Accuracy of the ensemble with powers of the training prior added to its logits [C, T].
            self.tilted = _count_by_class(saved, tilted == saved.targets[:, None]) / self.total[:, None]
        # Class indices, sorted by shot division, then from the most training images to the fewest.
        self.order = np.lexsort((-saved.class_counts, saved.shots))
        # Masks [C] of the shot divisions, without the classes that have no test images.
        self.shots = {shot: (saved.shots == number) & (self.total > 0) for number, shot in enumerate(SHOTS)}

    @cached_property
    def intervals(self) -> Dict[str, Optional[Tuple[float, float]]]:
        """95 % intervals of the ensemble's accuracies in percent, by the names of `mean_intervals`."""
        right = self.right_by_class[:, 0]
        return mean_intervals(np.stack([right, self.total - right], axis=1), (1, 0), self.shots)

    @cached_property
    def confusions(self) -> List[Tuple[Tuple[int, int], int]]:
        """Pairs of a true class and the wrong class that the ensemble predicts, with their number, largest first."""
        wrong = ~self.right[:, 0]
        pairs = zip(self.saved.targets[wrong].tolist(), self.predictions[wrong, 0].tolist())
        return Counter(sorted(pairs)).most_common()

    @property
    def has_few(self) -> bool:
        """Whether there are few-shot classes with test images."""
        return bool(self.shots['few'].any())

    @cached_property
    def most_confused(self) -> List[Optional[Tuple[int, int]]]:
        """For each class the wrong class that the ensemble predicts most, and how often. None without mistakes."""
        best = {true: (predicted, count) for (true, predicted), count in reversed(self.confusions)}
        return [best.get(c) for c in range(self.saved.num_classes)]

    def reliability(self) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Images, correct answers and mean confidence in each bin of confidence. The mean of an empty bin is NaN."""
        confidence = self.confidence.astype(float)
        count, right = (np.histogram(one, _EDGES)[0] for one in (confidence, confidence[self.right[:, 0]]))
        total, _ = np.histogram(confidence, _EDGES, weights=confidence)
        with np.errstate(invalid='ignore'):
            return count, right, total / count

    def coverage(self) -> Tuple[np.ndarray, np.ndarray]:
        """Shares [N] of the images, the most confident first, and the accuracy on each share [N]."""
        right = self.right[np.argsort(-self.confidence, kind='stable'), 0]
        kept = np.arange(1, len(right) + 1)
        return kept / len(right), right.cumsum() / kept

    def prior_shift(self) -> Tuple[np.ndarray, np.ndarray]:
        """Expected top-1 [T] for powers of the training frequencies: of plain logits, and with the log prior added."""
        seen = self.total > 0
        priors = (self.saved.class_counts[seen] / self.saved.class_counts.sum())[:, None] ** TILTS
        priors /= priors.sum(0)
        return self.accuracy[seen, 0] @ priors, (self.tilted[seen] * priors).sum(0)


def mean_intervals(
        outcomes: np.ndarray, values: Sequence[float], shots: Dict[str, np.ndarray],
) -> Dict[str, Optional[Tuple[float, float]]]:
    """95 % intervals, in percent, of mean values over other test images of the same classes. None without classes.

    `outcomes` [C, K] counts the images of each class with each outcome. `values` [K] has the value of each outcome, and
    `shots` a mask [C] for each shot division. The intervals are for `top1`, the mean over images, for `balanced`, the
    mean over classes, and for the mean over the classes of each division. Each interval contains the mean itself.

    The mean over the n images of a class has 1 / n of the variance of one image. The estimate
    v from the shares of the outcomes is too small by the factor (n - 1) / n, which is 0 for n = 1. The variance V of
    the whole division corrects it: the mean of a class gets the variance (v + V / n) / n. This is right if the classes
    of a division are alike, and too wide if not. Over the m images of a division it adds up to V / m. The intervals are
    percentiles of draws from Jeffreys' posterior of such means. The draws of the divisions add up to those of all.
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
    ratio = 1 - 1 / total  # The expected ratio if the classes are alike.
    if outcomes.any(0).sum() > 1:  # Otherwise the variance is 0.
        ratio = variance(shares) / variance(whole)
    size = 1 / np.sum(weight ** 2 / total * (ratio + 1 / total))
    return rng.dirichlet(size * whole + 0.5, _POSTERIOR_DRAWS) @ values


def same_images(a: SavedLogits, b: SavedLogits) -> bool:
    """Whether two models saw the same images in the same order with the same labels."""
    return a.paths == b.paths and a.class_names == b.class_names and np.array_equal(a.targets, b.targets)


class PairedTest(NamedTuple):
    """Comparison of two models on a group of classes."""

    difference: float  # accuracy of the second model minus that of the first, in percent
    interval: Tuple[float, float]  # 95 % interval of the difference
    p_value: float  # McNemar's exact test on the images that only one model has right
    classes: Tuple[int, ...]  # number of classes where the second model is better, equal and worse


def paired_test(first: Analysis, second: Analysis) -> Dict[str, PairedTest]:
    """Compare two models that saw the same images: on all of them, `top1`, and on each shot division with images."""
    from scipy.stats import binomtest
    one, two, tests = first.right[:, 0], second.right[:, 0], {}
    gained, lost = _count_by_class(first.saved, np.stack([two & ~one, one & ~two], axis=1)).T
    outcomes = np.stack([gained, lost, first.total - gained - lost], axis=1)
    intervals = mean_intervals(outcomes, (1, -1, 0), first.shots)
    for name, mask in {'top1': first.total > 0, **first.shots}.items():
        interval = intervals[name]
        if interval is None:
            continue
        difference, total = gained[mask] - lost[mask], first.total[mask]
        mean = np.average(difference / total, weights=total if name == 'top1' else None)
        wins, losses = int(gained[mask].sum()), int(lost[mask].sum())
        p_value = float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.
        classes = tuple(int((np.sign(difference) == sign).sum()) for sign in (1, 0, -1))
        tests[name] = PairedTest(100 * float(mean), interval, p_value, classes)
    return tests


def best_expert_shares(analysis: Analysis) -> Tuple[Dict[str, np.ndarray], Dict[str, Tuple[float, float]]]:
    """Shares [M] of the classes that each expert is best at, by shot division, and the bounds of 95 % by chance.

    Experts that tie share a class. Chance means equally good experts: the results on each image are permuted.
    """
    def shares(right: np.ndarray) -> Dict[str, np.ndarray]:
        counts = _count_by_class(analysis.saved, right)
        best = counts == counts.max(1, keepdims=True)
        best = best / best.sum(1, keepdims=True)
        return {shot: best[mask].mean(0) for shot, mask in analysis.shots.items() if mask.any()}

    rng, right = np.random.default_rng(0), analysis.right[:, 1:]
    draws = [shares(rng.permuted(right, axis=1)) for _ in range(_CHANCE_DRAWS)]
    actual = shares(right)
    # By chance all experts are alike, so the draws of all experts make one distribution.
    return actual, {shot: tuple(np.percentile([draw[shot] for draw in draws], _TAILS).tolist()) for shot in actual}


def trend(values: np.ndarray) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Moving average of values [C], skipping NaN. Returns points, averages and half the width of their 95 % band."""
    ranks = np.flatnonzero(~np.isnan(values))
    values = values[ranks]
    points = np.linspace(ranks[0], ranks[-1], 200)
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
    cost: float  # points of few-shot accuracy, or of balanced accuracy without few-shot classes
    images: List[int]  # indices of the first four


def costly_confusions(analysis: Analysis) -> List[Confusion]:
    """The 15 confusions that cost the few-shot classes most, or all classes if there are no few-shot classes."""
    total, targets = analysis.total, analysis.saved.targets
    few = analysis.shots['few'] if analysis.has_few else total > 0
    found = [
        (100 * count / total[true] / few.sum(), true, predicted, count)
        for (true, predicted), count in analysis.confusions if few[true]]
    rows = []
    for cost, true, predicted, count in sorted(found, key=lambda one: -one[0])[:15]:
        images = np.flatnonzero((targets == true) & (analysis.predictions[:, 0] == predicted))
        rows.append(Confusion(true, predicted, count, cost, images[:4].tolist()))
    return rows
