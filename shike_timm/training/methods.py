"""Methods by name: the loss that stage one trains with. A method is one entry of `METHODS`, a few lines over a loss."""
from dataclasses import dataclass
from functools import partial
from typing import Any, Callable, Dict, Optional, Sequence

import torch
from timm.loss import compute_class_weights
from timm.task import DistillationTeacher

from ..errors import InputError, nearest
from ..losses import balanced_softmax, expert_cross_entropy, focal, ldam, logit_adjusted
from ..models import Shike
from ..models.classifiers import CosineClassifier
from .config import TaskConfig
from .tasks import ClassifierRetrainingTask, ExpertTask, RepresentationTask

RETRAINING_EPOCHS = 20


@dataclass(frozen=True)
class TaskInputs:
    """The parts of a training task."""

    config: TaskConfig
    model: Shike
    class_counts: Sequence[int]  # training images of each class [C]
    device: torch.device
    mean: Sequence[float]  # channel means that the images are normalized with
    std: Sequence[float]
    teacher: Optional[DistillationTeacher] = None  # Every expert also learns its logits.

    @property
    def counts(self) -> torch.Tensor:
        return torch.tensor(self.class_counts, device=self.device)

    @property
    def teaching(self) -> Dict[str, Any]:
        """Arguments of `ExpertTask` that every method of stage one shares."""
        return dict(
            trunk_grad=self.config.trunk_grad, teacher_model=self.teacher,
            distill_loss_weight=self.config.distill_loss_weight, temperature=self.config.kd_temperature,
            mean=self.mean, std=self.std, device=self.device)


@dataclass(frozen=True)
class Method:
    """How stage one trains. Classifier retraining can follow any method."""

    make_task: Callable[[TaskInputs], ExpertTask]
    crt_epochs: int = 0  # Epochs of classifier retraining, if --crt-epochs is not given.
    # Says why targets must be class indices, and what to do. None if targets may be mixed.
    indices_only: Callable[[TaskConfig], Optional[str]] = lambda config: None
    # Gives the class prior that the logits follow without a teacher: 'train', 'uniform', or None for another one.
    prior: Callable[[TaskConfig], Optional[str]] = lambda config: None


def _shike(inputs: TaskInputs) -> ExpertTask:
    config = inputs.config
    return RepresentationTask(
        inputs.model, config.alpha, config.beta, config.detach_teacher, config.smoothing, **inputs.teaching)


def _ldam_drw(inputs: TaskInputs) -> ExpertTask:
    """LDAM, whose classes are weighted by their effective number in the last fifth of the epochs."""
    classifier = inputs.model.get_classifier()
    if not isinstance(classifier, CosineClassifier):
        raise InputError('--method ldam_drw sets margins between cosines: leave out --classifier linear.')
    if inputs.config.smoothing:
        raise InputError('--smoothing does not go with the margins of --method ldam_drw: leave it out.')
    loss = partial(ldam, class_counts=inputs.counts, scale=classifier.scale)
    _, weights = compute_class_weights(
        list(inputs.class_counts), sum(inputs.class_counts), 'effective_num', beta=0.9999)
    late_loss = partial(loss, class_weights=weights.to(inputs.device))
    return ExpertTask(inputs.model, loss, late_loss=late_loss, **inputs.teaching)


def _by_loss(make_loss: Callable[[TaskInputs], Callable]) -> Callable[[TaskInputs], ExpertTask]:
    return lambda inputs: ExpertTask(
        inputs.model, partial(make_loss(inputs), smoothing=inputs.config.smoothing), **inputs.teaching)


METHODS: Dict[str, Method] = {
    # Jin et al., CVPR 2023: Eq. 10, then new classifiers.
    'shike': Method(
        _shike,
        crt_epochs=RETRAINING_EPOCHS,
        indices_only=lambda config:
            'dynamic knowledge transfer leaves one class out: drop it, or add --alpha 0' if config.alpha else None,
        prior=lambda config: 'train',
    ),
    'ce': Method(_by_loss(lambda inputs: expert_cross_entropy), prior=lambda config: 'train'),
    # BALMS, Ren et al., NeurIPS 2020.
    'balanced_softmax': Method(
        _by_loss(lambda inputs: partial(balanced_softmax, class_counts=inputs.counts)),
        prior=lambda config: 'uniform'),
    # Menon et al., ICLR 2021.
    'logit_adjusted': Method(
        _by_loss(lambda inputs: partial(logit_adjusted, class_counts=inputs.counts, tau=inputs.config.tau)),
        prior=lambda config: {0.: 'train', 1.: 'uniform'}.get(config.tau)),
    # Lin et al., ICCV 2017. The optimal logits of this loss and of the next follow no known prior.
    'focal': Method(_by_loss(lambda inputs: partial(focal, gamma=inputs.config.focal_gamma))),
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


def create_task(inputs: TaskInputs, retraining: bool) -> ExpertTask:
    """The training task of the method's stage one, or of classifier retraining."""
    if not retraining:
        return get_method(inputs.config.method).make_task(inputs)
    return ClassifierRetrainingTask(
        inputs.model, inputs.class_counts, inputs.device, inputs.config.smoothing, inputs.config.crt_cosine_scale)
