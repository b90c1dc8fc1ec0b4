"""Search for experts on a frozen trunk: the levels that they read, the scale and learning rate of their classifiers."""
import logging
import math
from dataclasses import dataclass, replace
from typing import Any, Dict, List, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.dataset import AnySet
from ..data.holdout import hold_out_share
from ..losses import balanced_softmax
from ..models.classifiers import COSINE_SCALE, cosines
from .config import RunConfig

_logger = logging.getLogger(__name__)

SHARE = 0.2  # Share of each class that is set aside to choose on.
SCALES, RATES = (16., 32.), (0.01, 0.05)
MOST_LEVELS = 6  # Earlier levels are not tried.


@dataclass(frozen=True)
class Candidate:
    """Experts, as the levels that each of them reads, and the settings of their classifiers."""

    levels: Tuple[Tuple[int, ...], ...]  # Counted from 1 at the shallowest.
    cosine_scale: float
    lr: float

    @property
    def names(self) -> List[str]:
        """The levels as `--levels` takes them."""
        return ['+'.join(map(str, one)) for one in self.levels]


def _standardised(features: np.ndarray, rows: np.ndarray, widths: Sequence[int]) -> Tuple[List[Tensor], List[Tensor]]:
    """The levels [N, V, D] of the images at these rows and of all others, by the statistics of the latter."""
    others = np.setdiff1d(np.arange(len(features)), rows)
    train, held = (torch.from_numpy(features[chosen]).float() for chosen in (others, rows))
    mean, std = train[:, 0].mean(0), train[:, 0].std(0).clamp_min(1e-5)
    train, held = ((one - mean) / std for one in (train, held[:, :1]))
    return list(train.split(list(widths), 2)), list(held.split(list(widths), 2))


def _experts(levels: Sequence[Tensor], depths: Sequence[Sequence[int]]) -> Tensor:
    """Features [N, V, M, D] of experts from those of the levels. Narrow experts are filled up with zeros."""
    joined = [torch.cat([levels[level - 1] for level in one], -1) for one in depths]
    width = max(one.shape[-1] for one in joined)
    return torch.stack([F.pad(one, (0, width - one.shape[-1])) for one in joined], 2)


def _fit(features: Tensor, targets: Tensor, class_counts: Tensor, candidate: Candidate, config: RunConfig) -> Tensor:
    """Class weights [M, C, D] of cosine classifiers that begin at class means and learn with balanced softmax."""
    generator = torch.Generator().manual_seed(config.seed)
    num_images, num_views, num_experts, width = features.shape
    weight = torch.zeros(num_experts, len(class_counts), width)
    weight.index_add_(1, targets, F.normalize(features[:, 0], dim=-1).transpose(0, 1))
    weight = F.normalize(weight, dim=-1).requires_grad_()
    optimizer = torch.optim.SGD(
        [weight], candidate.lr, momentum=config.momentum, weight_decay=config.weight_decay, nesterov=True)
    steps = math.ceil(num_images / config.batch_size) * config.epochs
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(config.epochs):
        views = torch.randint(num_views, (num_images,), generator=generator)
        for rows in torch.randperm(num_images, generator=generator).split(config.batch_size):
            logits = candidate.cosine_scale * cosines(features[rows, views[rows]], weight)
            optimizer.zero_grad()
            balanced_softmax(logits, targets[rows], class_counts).backward()
            optimizer.step()
            schedule.step()
    return weight.detach()


def _score(predicted: Tensor, targets: Tensor, class_counts: Tensor) -> Dict[str, float]:
    """Top-1 and balanced accuracy in percent."""
    right = (predicted == targets).double()
    total = torch.bincount(targets, minlength=len(class_counts))
    share = torch.zeros(len(class_counts), dtype=torch.float64).index_add_(0, targets, right) / total
    return dict(top1=round(100 * right.mean().item(), 2), balanced=round(100 * share[total > 0].mean().item(), 2))


def search(features: np.ndarray, data: AnySet, widths: Sequence[int], config: RunConfig) -> List[Dict[str, Any]]:
    """Try experts on a share of each training class that is set aside, and give all candidates, the best one first.

    First each level alone is tried, then several late levels in one classifier and in three experts, then other
    scales and learning rates of the best one. The best one has the largest sum of top-1 and balanced accuracy.
    `features` [N, V, F] are the pooled ones of V views of each training image, `widths` the F of each level.
    """
    _, aside = hold_out_share(data, SHARE, 'the training set')
    rows = np.flatnonzero(np.isin(data.rows, aside.rows))
    levels, held = _standardised(features, rows, widths)
    labels = torch.as_tensor(data.targets, dtype=torch.int64)
    targets, wanted = labels[np.setdiff1d(np.arange(len(labels)), rows)], labels[rows]
    class_counts = torch.bincount(targets, minlength=len(data.class_names or ())).clamp_min(1).float()
    tried: List[Tuple[float, Candidate, Dict[str, float]]] = []

    def attempt(candidate: Candidate) -> None:
        if any(candidate == one for _, one, _ in tried):
            return
        with torch.enable_grad():
            weight = _fit(_experts(levels, candidate.levels), targets, class_counts, candidate, config)
        logits = cosines(_experts(held, candidate.levels)[:, 0], weight).mean(1)
        score = _score(logits.argmax(1), wanted, class_counts)
        tried.append((sum(score.values()), candidate, score))
        _logger.info(
            f"Search: levels {' '.join(candidate.names)}, scale {candidate.cosine_scale:g}, learning rate "
            f"{candidate.lr:g}. top1: {score['top1']}  balanced: {score['balanced']}")

    def best() -> Candidate:
        return max(tried, key=lambda one: one[0])[1]

    count = len(widths)
    first = Candidate(((count,),), config.cosine_scale or COSINE_SCALE, config.lr)
    for level in range(count, max(count - MOST_LEVELS, 0), -1):
        attempt(replace(first, levels=((level,),)))
    for top in sorted({best().levels[0][0], count}):
        below = tuple(range(max(top - 3, 1), top))
        if below:
            attempt(replace(first, levels=((*below, top),)))
            attempt(replace(first, levels=tuple((level, top) for level in below)))
    for scale in SCALES:
        attempt(replace(best(), cosine_scale=scale))
    for lr in RATES:
        attempt(replace(best(), lr=lr))
    return [
        dict(levels=one.names, cosine_scale=one.cosine_scale, lr=one.lr, **score)
        for _, one, score in sorted(tried, key=lambda entry: -entry[0])]
