"""Methods of stage one by name. A method is one entry of `METHODS`, a few lines that choose its loss."""
from dataclasses import dataclass
from functools import partial
from typing import Any, Callable, Dict, Optional, Sequence, Tuple

import torch
from timm.loss import compute_class_weights
from torch import Tensor

from ..errors import InputError, nearest
from ..losses import balanced_softmax, expert_cross_entropy, focal, ldam, logit_adjusted, representation_loss
from ..models import Shike
from ..models.classifiers import CosineClassifier
from .config import TaskConfig
from .tasks import ClassifierRetrainingTask, ExpertTask

RETRAINING_EPOCHS = 20
Losses = Tuple[Callable[..., Any], Optional[Callable[..., Tensor]]]  # The loss, and another loss for the last epochs.


@dataclass(frozen=True)
class Method:
    """How stage one trains. Classifier retraining can follow any method."""

    # Takes options, model and the number of training images of each class [C].
    make_losses: Callable[[TaskConfig, Shike, Tensor], Losses]
    crt_epochs: int = 0  # Epochs of classifier retraining, if --crt-epochs is not given.
    # Returns why targets must be class indices and what to do, or None if targets may be probabilities.
    indices_only: Callable[[TaskConfig], Optional[str]] = lambda config: None
    # Returns the class prior that the logits follow without a teacher: 'train', 'uniform', or None if neither.
    prior: Callable[[TaskConfig], Optional[str]] = lambda config: None


def _ldam_drw(config: TaskConfig, model: Shike, counts: Tensor) -> Losses:
    """LDAM loss, with classes weighted by their effective number of images in the last fifth of the epochs."""
    classifier = model.get_classifier()
    if not isinstance(classifier, CosineClassifier):
        raise InputError('--method ldam_drw sets margins between cosines: leave out --classifier linear.')
    if config.smoothing:
        raise InputError('--smoothing does not go with the margins of --method ldam_drw: leave it out.')
    loss = partial(ldam, class_counts=counts, scale=classifier.scale)
    _, weights = compute_class_weights(counts.tolist(), int(counts.sum()), 'effective_num', beta=0.9999)
    return loss, partial(loss, class_weights=weights.to(counts.device))


def _one(loss: Callable[..., Any], config: TaskConfig, **options: Any) -> Losses:
    return partial(loss, smoothing=config.smoothing, **options), None


METHODS: Dict[str, Method] = {
    # Jin et al., CVPR 2023: Eq. 10, then classifier retraining.
    'shike': Method(
        lambda config, model, counts: _one(
            representation_loss, config, alpha=config.alpha, beta=config.beta, detach_teacher=config.detach_teacher),
        crt_epochs=RETRAINING_EPOCHS,
        indices_only=lambda config:
            'dynamic knowledge transfer leaves one class out: drop it, or add --alpha 0' if config.alpha else None,
        prior=lambda config: 'train',
    ),
    'ce': Method(lambda config, model, counts: _one(expert_cross_entropy, config), prior=lambda config: 'train'),
    # BALMS, Ren et al., NeurIPS 2020.
    'balanced_softmax': Method(
        lambda config, model, counts: _one(balanced_softmax, config, class_counts=counts),
        prior=lambda config: 'uniform'),
    # Menon et al., ICLR 2021.
    'logit_adjusted': Method(
        lambda config, model, counts: _one(logit_adjusted, config, class_counts=counts, tau=config.tau),
        prior=lambda config: {0.: 'train', 1.: 'uniform'}.get(config.tau)),
    # Lin et al., ICCV 2017. The optimal logits of the focal loss and of LDAM follow no known prior.
    'focal': Method(lambda config, model, counts: _one(focal, config, gamma=config.focal_gamma)),
    # Cao et al., NeurIPS 2019.
    'ldam_drw': Method(
        _ldam_drw,
        indices_only=lambda config:
            'LDAM subtracts a margin from one class: drop it, or choose another --method'),
}


def get_method(name: str) -> Method:
    """A method by name."""
    if name not in METHODS:
        raise InputError(f"--method '{name}' is unknown{nearest(name, METHODS)}: choose one of {', '.join(METHODS)}.")
    return METHODS[name]


def create_task(
        config: TaskConfig, model: Shike, class_counts: Sequence[int], device: torch.device, retraining: bool = False,
        **teaching: Any,
) -> ExpertTask:
    """Create the training task of stage one, with the loss of the method, or that of classifier retraining.

    `class_counts` are the training images of each class. `teaching` are arguments of `ExpertTask` for a teacher.
    """
    if retraining:
        return ClassifierRetrainingTask(model, class_counts, device, config.smoothing, config.crt_cosine_scale)
    counts = torch.tensor(class_counts, device=device)
    loss, late_loss = get_method(config.method).make_losses(config, model, counts)
    return ExpertTask(
        model, loss, late_loss, trunk_grad=config.trunk_grad, distill_loss_weight=config.distill_loss_weight,
        temperature=config.kd_temperature, device=device, **teaching)
