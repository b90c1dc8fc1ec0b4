"""Search for experts on a frozen trunk: the levels that they read, and the learning rate of their classifiers."""
import logging
import math
from dataclasses import dataclass, replace
from typing import Any, Dict, List, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.dataset import AnySet
from ..losses import balanced_softmax
from ..models.classifiers import COSINE_SCALE, cosines
from .config import RunConfig

_logger = logging.getLogger(__name__)

FOLDS, HELD = 5, 3  # The images of a class are dealt to five folds. Three of them are held out in turn.
RATES = (0.05,)  # Learning rates that are tried beside the given one.
MOST_LEVELS, TOPS, BELOW = 6, 3, 3  # Levels alone; last levels with others below them; how many of those.


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


def _folds(data: Any, seed: int) -> np.ndarray:
    """The fold of each image [N]. The images of a group share one. A class of one image is never held out: -1."""
    order = np.random.default_rng(seed).permutation(len(data))
    order = order[np.argsort(data.targets[order], kind='stable')]
    classes = data.targets[order]
    folds = np.empty(len(data), dtype=np.int64)
    folds[order] = (np.arange(len(data)) - np.searchsorted(classes, classes)) % FOLDS
    if data.groups is not None:
        _, first, group = np.unique(data.groups, return_index=True, return_inverse=True)
        folds = folds[first][group]
    folds[(np.bincount(data.targets) == 1)[data.targets]] = -1
    return folds


def _standardised(
        features: np.ndarray, is_held: np.ndarray, widths: Sequence[int]) -> Tuple[List[Tensor], List[Tensor]]:
    """The levels [N, V, D] of the images that are not held out, and of those that are, by the former's statistics."""
    train, held = (torch.from_numpy(features[chosen]).float() for chosen in (~is_held, is_held))
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
    """Try experts on training images that are set aside, and give all candidates, the best one first.

    First each late level alone is tried, then several of them for one classifier and for three experts, then another
    learning rate for the best ones. The best one has the highest balanced accuracy over three folds. Top-1 would be
    that of the large classes.

    `features` [N, V, F] are the pooled ones of V views of each training image, `widths` the F of each level.
    """
    folds, labels = _folds(data, config.seed), torch.as_tensor(data.targets, dtype=torch.int64)
    splits = [(torch.from_numpy(folds == k), *_standardised(features, folds == k, widths)) for k in range(HELD)]
    tried: List[Tuple[Candidate, Dict[str, float]]] = []

    def attempt(candidate: Candidate) -> None:
        predicted, targets = [], []
        for is_held, levels, held in splits:
            counts = torch.bincount(labels[~is_held], minlength=len(data.class_names or ())).clamp_min(1).float()
            with torch.enable_grad():
                weight = _fit(_experts(levels, candidate.levels), labels[~is_held], counts, candidate, config)
            predicted.append(cosines(_experts(held, candidate.levels)[:, 0], weight).mean(1).argmax(1))
            targets.append(labels[is_held])
        tried.append((candidate, _score(torch.cat(predicted), torch.cat(targets), counts)))
        _logger.info(
            f"Search: levels {' '.join(candidate.names)}, learning rate {candidate.lr:g}. "
            f"top1: {tried[-1][1]['top1']}  balanced: {tried[-1][1]['balanced']}")

    count = len(widths)
    first = Candidate(((count,),), config.cosine_scale or COSINE_SCALE, config.lr)
    for level in range(count, max(count - MOST_LEVELS, 0), -1):
        attempt(replace(first, levels=((level,),)))
    for top in range(count, max(count - TOPS, 1), -1):
        below = tuple(range(max(top - BELOW, 1), top))
        attempt(replace(first, levels=((*below, top),)))
        attempt(replace(first, levels=tuple((level, top) for level in below)))
    for lr in RATES:
        attempt(replace(max(tried, key=lambda one: one[1]['balanced'])[0], lr=lr))
    tried.sort(key=lambda one: -one[1]['balanced'])
    return [dict(levels=one.names, cosine_scale=one.cosine_scale, lr=one.lr, **score) for one, score in tried]
