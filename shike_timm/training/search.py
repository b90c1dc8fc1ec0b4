"""Search for experts on a frozen trunk: the levels that they read, and the learning rate of their classifiers."""
import logging
import math
from typing import Any, Dict, List, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from ..losses import balanced_softmax
from ..metrics import ExpertEvaluator
from ..models.classifiers import COSINE_SCALE, cosines
from .config import RunConfig
from .features import READ_AT_ONCE, statistics
from .signals import StopFlag

_logger = logging.getLogger(__name__)

CHOSEN = ('levels', 'num_experts', 'cosine_scale', 'lr', 'lr_base', 'search')  # Options that a search sets.
FOLDS, HELD = 5, 3  # Each class is divided into five folds. Three of them are held out, one after the other.
RATES = (0.05,)  # Learning rates to try in addition to --lr.
MOST_LEVELS = 6  # Number of last levels that are tried, each as the only level of one expert.
TOPS, BELOW = 3, 3  # Number of last levels to combine with shallower levels, and number of shallower levels for each.
Levels = Sequence[Sequence[int]]  # The levels that each expert reads, counted from 1 at the shallowest.


def _names(levels: Levels) -> List[str]:
    """The levels in the syntax of `--levels`, such as 4+7."""
    return ['+'.join(map(str, one)) for one in levels]


def _folds(data: Any, seed: int) -> np.ndarray:
    """The fold of each image [N], equal for images of a group, and -1 (never held out) for classes of one image."""
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


class _Fold:
    """Features of held-out and remaining images, which the statistics of the remaining images standardise."""

    def __init__(self, features: np.ndarray, is_held: np.ndarray, widths: Sequence[int]):
        self.rows, self.held = np.flatnonzero(~is_held), np.flatnonzero(is_held)
        self.features, self.widths = features, list(widths)
        mean, variance = statistics(features, self.rows)
        self.mean, self.deviation = mean.float(), variance.sqrt().clamp_min(1e-5).float()

    def read(self, rows: np.ndarray, views: Any, levels: Levels) -> Tensor:
        """Features [B, M, D] of the experts, from `views` of the images at `rows`. Zeros pad narrow experts."""
        values = (torch.from_numpy(self.features[rows, views]).float() - self.mean) / self.deviation
        parts = values.split(self.widths, 1)
        experts = [torch.cat([parts[level - 1] for level in one], 1) for one in levels]
        width = max(one.shape[1] for one in experts)
        return torch.stack([F.pad(one, (0, width - one.shape[1])) for one in experts], 1)


def _fit(
        fold: _Fold, labels: Tensor, class_counts: Tensor, levels: Levels, lr: float, scale: float, config: RunConfig,
) -> Tensor:
    """Train cosine classifiers from class means with balanced softmax, and return their class weights [M, C, D]."""
    generator = torch.Generator().manual_seed(config.seed)
    weight: Any = 0
    for rows in np.array_split(fold.rows, -(-len(fold.rows) // READ_AT_ONCE)):
        normalised = F.normalize(fold.read(rows, 0, levels), dim=-1).transpose(0, 1)
        sums = normalised.new_zeros(len(normalised), len(class_counts), normalised.shape[2])
        weight = weight + sums.index_add_(1, labels[rows], normalised)
    weight = F.normalize(weight, dim=-1).requires_grad_()
    optimizer = torch.optim.SGD(
        [weight], lr, momentum=config.momentum, weight_decay=config.weight_decay, nesterov=True)
    steps = math.ceil(len(fold.rows) / config.batch_size) * config.epochs
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(config.epochs):
        views = torch.randint(fold.features.shape[1], (len(fold.rows),), generator=generator)
        for chosen in torch.randperm(len(fold.rows), generator=generator).split(config.batch_size):
            rows = fold.rows[chosen.numpy()]
            logits = scale * cosines(fold.read(rows, views[chosen].numpy(), levels), weight)
            optimizer.zero_grad()
            balanced_softmax(logits, labels[rows], class_counts).backward()
            optimizer.step()
            schedule.step()
    return weight.detach()


def search(
        features: np.ndarray, data: Any, widths: Sequence[int], config: RunConfig, stop: StopFlag,
) -> List[Dict[str, Any]]:
    """Try levels and learning rates on held-out training images, and return all candidates, the best one first.

    Candidates are single late levels, then several levels together for one expert and for three experts, then another
    learning rate for the best levels. The best candidate has the highest balanced accuracy over three folds, since
    many-shot classes dominate top-1 accuracy.

    `features` [N, V, F] are pooled features of V views of each training image. `widths` of the levels add up to F.
    """
    numbers, labels = _folds(data, config.seed), torch.as_tensor(data.targets, dtype=torch.int64)
    num_classes = len(data.class_names)
    folds = [_Fold(features, numbers == k, widths) for k in range(HELD) if (numbers == k).any()]
    if not folds:
        raise InputError('--search needs a class of several images to set some aside: give --levels and --no-search.')
    count, scale = len(widths), config.cosine_scale or COSINE_SCALE
    tried: List[Dict[str, Any]] = []

    def attempt(levels: Levels, lr: float = config.lr) -> None:
        evaluator = ExpertEvaluator(len(levels), [0] * num_classes, torch.device('cpu'))
        for fold in folds:
            stop.check()
            counts = torch.bincount(labels[fold.rows], minlength=num_classes).clamp_min(1).float()
            weight = _fit(fold, labels, counts, levels, lr, scale, config)
            for rows in np.array_split(fold.held, -(-len(fold.held) // READ_AT_ONCE)):
                evaluator.update(cosines(fold.read(rows, 0, levels), weight), labels[rows])
        scores = evaluator.compute()
        tried.append(dict(levels=levels, cosine_scale=scale, lr=lr, top1=scores['top1'], balanced=scores['balanced']))
        tried.sort(key=lambda one: -one['balanced'])
        _logger.info(
            f"Search: levels {' '.join(_names(levels))}, learning rate {lr:g}. "
            f"top1: {scores['top1']}  balanced: {scores['balanced']}")

    for level in range(count, max(count - MOST_LEVELS, 0), -1):
        attempt([[level]])
    for top in range(count, max(count - TOPS, 1), -1):
        below = range(max(top - BELOW, 1), top)
        attempt([[*below, top]])
        attempt([[level, top] for level in below])
    for lr in RATES:
        attempt(tried[0]['levels'], lr)
    return [dict(one, levels=_names(one['levels'])) for one in tried]
