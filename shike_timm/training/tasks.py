"""timm training tasks for expert logits. A task takes a batch and returns its loss."""
from functools import partial
from typing import Any, Callable, Dict, Iterator, Optional, Sequence

import torch
from timm.task import ClassificationTask, DistillationTeacher
from timm.utils import unwrap_model
from torch import Tensor, nn

from ..losses import balanced_softmax, knowledge_distillation, representation_loss
from ..models import Shike

TERMS = {  # The terms that a task may return beside its loss, and their names in figures.
    'ce': 'cross-entropy', 'nt': 'knowledge transfer', 'mu': 'mutual distillation', 'kd': 'teacher'}
LATE = 0.8  # Share of the epochs after which `late_loss` is used.


def expert_features(model: Shike, x: Tensor) -> Tensor:
    """Features of the experts from images [B, in_chans, H, W], or from pooled features [B, F] of all levels."""
    return model.forward_levels(x) if x.ndim == 2 else model.forward_features(x)


class ExpertLogits(nn.Module):
    """A module whose forward returns the expert logits [B, M, C], so that DistributedDataParallel can wrap it."""

    def __init__(self, model: Shike, freeze_features: bool = False):
        super().__init__()
        self.model = model
        self.freeze_features = freeze_features

    def forward(self, x: Tensor) -> Tensor:
        """Expert logits [B, M, C] from images or pooled features, as in `expert_features`."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_features):
            x = expert_features(self.model, x)
        return self.model.forward_expert_head(x)


class ExpertTask(ClassificationTask):
    """Trains a SHIKE model with any loss of the stacked expert logits.

    Evaluation uses the bare model. `loss` takes expert logits [B, M, C] and a target. It returns a scalar, or a named
    tuple of scalars whose first scalar is the total. `late_loss` replaces `loss` once `progress`, the share of finished
    epochs, reaches `LATE`. With `freeze_features`, no gradients are computed below the classifiers. With `trunk_grad`
    'mean', the trunk's gradient is divided by the number of experts. The logits of a frozen `teacher` are distilled
    into each expert. `mean` and `std` are the normalization of the input, which is converted for the teacher.
    """

    def __init__(
            self, model: Shike, loss: Callable[..., Any] = representation_loss,
            late_loss: Optional[Callable[..., Tensor]] = None, freeze_features: bool = False, trunk_grad: str = 'sum',
            teacher: Optional[DistillationTeacher] = None, distill_loss_weight: float = 1., temperature: float = 4.,
            mean: Optional[Sequence[float]] = None, std: Optional[Sequence[float]] = None,
            device: Optional[torch.device] = None,
    ):
        super().__init__(ExpertLogits(model, freeze_features), loss, device=device, verbose=False)
        if trunk_grad == 'mean':
            for parameter in (*model.stem.parameters(), *model.stages.parameters()):
                if parameter.requires_grad:
                    parameter.register_hook(lambda grad: grad / model.num_experts)
        self.late_loss = late_loss or loss
        self.progress = 0.
        self.teacher = teacher
        self.distill_loss_weight = distill_loss_weight
        self.temperature = temperature
        if teacher is not None:
            teacher.requires_grad_(False)
            # From the student's normalization to the teacher's. A comparison of both would wait for the device.
            cfg = model.pretrained_cfg
            own_mean, own_std = (
                teacher.mean_kd.new_tensor(values).view(1, -1, 1, 1)
                for values in (mean or cfg['mean'], std or cfg['std']))
            self.register_buffer('teacher_scale', own_std / teacher.std_kd, persistent=False)
            self.register_buffer('teacher_shift', (own_mean - teacher.mean_kd) / teacher.std_kd, persistent=False)

    def train(self, mode: bool = True) -> 'ExpertTask':
        """Set training or eval mode. The teacher stays in eval mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def compile(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Compile the trainable module and the teacher, before distributed wrapping. Evaluation uses `model`."""
        if self.teacher is not None:
            self.teacher.compile(*args, **kwargs)
        return super().compile(*args, **kwargs)

    def get_eval_model(self, module: Optional[nn.Module] = None, ema: bool = False) -> Optional[nn.Module]:
        """The bare SHIKE model or, with `ema`, its moving average, None if there is no average."""
        module = module if module is not None else self.get_trainable_module(ema=ema)
        return None if module is None else unwrap_model(module).model

    def get_clip_parameters(self, exclude_head: bool = False) -> Iterator[nn.Parameter]:
        """Parameters whose gradients are clipped. `exclude_head` leaves out the classifiers."""
        model = unwrap_model(self.trainable_module).model
        head = set(model.get_classifier().parameters()) if exclude_head else ()
        return (parameter for parameter in model.parameters() if parameter not in head)

    def forward(self, input: Tensor, target: Tensor) -> Dict[str, Tensor]:
        """The `loss` of images [B, in_chans, H, W], its unweighted terms, and the averaged logits `output` [B, C].

        `target` is class indices [B], or class probabilities [B, C] if the loss takes probabilities.
        """
        logits = self.trainable_module(input)
        result = (self.criterion if self.progress < LATE else self.late_loss)(logits, target)
        total, terms = (result, {}) if isinstance(result, Tensor) else (result[0], result._asdict())
        terms.pop('total', None)
        if self.teacher is not None:
            with torch.no_grad():
                taught = self.teacher(input * self.teacher_scale + self.teacher_shift)
            terms['kd'] = knowledge_distillation(logits, taught, self.temperature)
            total = total + self.distill_loss_weight * terms['kd']
        output = logits.detach().mean(1)
        return dict(loss=total, output=output, **{name: term.detach() for name, term in terms.items()})


class ClassifierRetrainingTask(ExpertTask):
    """Stage two: new classifiers trained with balanced softmax, everything else frozen (Eq. 11).

    The new classifiers are put into the model when the task is made. BatchNorm statistics keep updating.
    """

    def __init__(
            self, model: Shike, class_counts: Sequence[int], device: Optional[torch.device] = None,
            smoothing: float = 0., cosine_scale: Optional[float] = None,
    ):
        model.requires_grad_(False)
        model.reset_classifier(model.num_classes, cosine_scale=cosine_scale)
        loss = partial(balanced_softmax, class_counts=torch.tensor(class_counts, device=device), smoothing=smoothing)
        super().__init__(model, loss, freeze_features=True, device=device)
