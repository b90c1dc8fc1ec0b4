"""Initialisation of classifiers at the class means of the features."""
from typing import Any, Iterable, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ..distributed import over_processes, rank
from ..models import Shike
from .signals import StopFlag
from .tasks import expert_features


@torch.no_grad()
def class_means(
        model: Shike, loader: Iterable[Tuple[Tensor, Tensor]], stop: StopFlag) -> Tuple[Tensor, Tensor, Tensor]:
    """For each expert, normalise the features of all processes, average them by class, and normalise the means.

    The model runs in eval mode, so that no image depends on the others of its batch. Returns the means [M, C, D] (zero
    for classes without images), the number of images of each class [C], and each expert's mean feature norm [M].
    """
    num_experts, num_classes = model.num_experts, model.num_classes
    width = model.head_hidden_size // num_experts
    # The CPU adds in the same order each time.
    sums = torch.zeros(num_classes, num_experts, width, dtype=torch.float64)
    counts = torch.zeros(num_classes, dtype=torch.float64)
    norms = torch.zeros(num_experts, dtype=torch.float64)
    was_training = model.training
    model.eval()
    hidden = True if rank() else None  # With None, tqdm hides the bar if there is no terminal.
    for images, target in tqdm(loader, 'Class means', unit=' batches', leave=False, disable=hidden):
        stop.check()
        if images.ndim == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        features = model.forward_head(expert_features(model, images), pre_logits=True)
        features = features.unflatten(1, (num_experts, -1)).cpu().double()
        target = target.cpu()
        sums.index_add_(0, target, F.normalize(features, dim=-1))
        counts.index_add_(0, target, torch.ones(len(target), dtype=torch.float64))
        norms += features.norm(dim=-1).sum(0)
    model.train(was_training)
    sums, counts, norms = map(over_processes, (sums, counts, norms))
    return F.normalize(sums.transpose(0, 1), dim=-1), counts, norms / counts.sum()


def begin_at_class_means(model: Shike, loader: Iterable[Tuple[Tensor, Tensor]], stop: StopFlag) -> int:
    """Set class weights from the means of `class_means`, for classes with images. Returns the number of images."""
    means, counts, norms = class_means(model, loader, stop)
    classifier: Any = model.get_classifier()
    classifier.set_class_means(means, counts > 0, norms)
    return int(counts.sum())
