"""Training tasks of timm over expert logits: from a batch to its loss."""
from functools import partial
from typing import Any, Callable, Dict, Iterator, Optional, Sequence, Tuple, Union

import torch
from timm.task import DistillationTeacher, TrainingTask
from timm.utils import unwrap_model
from torch import Tensor, nn

from ..losses import balanced_softmax, knowledge_distillation, representation_loss
from ..models import Shike

TERMS = {  # The terms that a task may give beside its loss, and their names in figures.
    'ce': 'cross-entropy', 'nt': 'knowledge transfer', 'mu': 'mutual distillation', 'kd': 'teacher'}


def expert_features(model: Shike, x: Tensor) -> Tensor:
    """Features of the experts from images [B, in_chans, H, W], or from pooled features [B, F] of all levels."""
    return model.forward_levels(x) if x.ndim == 2 else model.forward_features(x)


class ExpertLogits(nn.Module):
    """A module whose forward gives the expert logits [B, M, C], for DistributedDataParallel to wrap."""

    def __init__(self, model: Shike, freeze_features: bool = False):
        super().__init__()
        self.model = model
        self.freeze_features = freeze_features

    def forward(self, x: Tensor) -> Tensor:
        """Expert logits [B, M, C] from what `expert_features` takes."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_features):
            x = expert_features(self.model, x)
        return self.model.forward_expert_head(x)


class ExpertTask(TrainingTask):
    """Training of a SHIKE model with any loss of the stacked expert logits.

    Evaluation sees the bare model. Beyond the loss, a trained model can teach every expert.

    Args:
        loss: From expert logits [B, M, C] and a target to a scalar, or to a named tuple of scalars that begins with
            the total.
        late_loss: Loss for the last epochs, None for the same one.
        late_from: Share of the epochs after which `late_loss` is used. The training loop sets `progress`.
        freeze_features: Build no graph below the classifiers.
        trunk_grad: Gradient of the shared stages: the 'sum' of what the experts send, as their losses are summed, or
            the 'mean', with which the trunk learns as fast as that of one network.
        teacher_model: Trained model of the same classes, or its name. Its logits are distilled into each expert, at a
            weight `distill_loss_weight` and a temperature. It stays in eval mode and is not trained.
        mean: Channel means that the images are normalized with (default: those of the model's configuration). The
            deviations `std` likewise.
    """

    trainable_module: nn.Module

    def __init__(
            self,
            model: Shike,
            loss: Callable[[Tensor, Tensor], Union[Tensor, Tuple[Tensor, ...]]],
            late_loss: Optional[Callable[[Tensor, Tensor], Tensor]] = None,
            late_from: float = 0.8,
            freeze_features: bool = False,
            trunk_grad: str = 'sum',
            teacher_model: Union[str, nn.Module, DistillationTeacher, None] = None,
            distill_loss_weight: float = 1.,
            temperature: float = 4.,
            mean: Optional[Sequence[float]] = None,
            std: Optional[Sequence[float]] = None,
            device: Optional[torch.device] = None,
    ):
        super().__init__(device=device)
        self.trainable_module = ExpertLogits(model, freeze_features)
        if trunk_grad == 'mean':
            for parameter in (*model.stem.parameters(), *model.stages.parameters()):
                if parameter.requires_grad:
                    parameter.register_hook(lambda grad: grad / model.num_experts)
        self.loss = loss
        self.late_loss = late_loss or loss
        self.late_from = late_from
        self.progress = 0.
        self.teacher = None
        self.distill_loss_weight = distill_loss_weight
        self.temperature = temperature
        if teacher_model is not None:
            teacher = teacher_model
            if not isinstance(teacher, DistillationTeacher):
                teacher = DistillationTeacher(teacher, device=device)
            self.teacher = teacher.requires_grad_(False)
            # From the student's normalization to the teacher's. No comparison waits for the device.
            cfg = model.pretrained_cfg
            own_mean, own_std = (
                teacher.mean_kd.new_tensor(values).view(1, -1, 1, 1)
                for values in (mean or cfg['mean'], std or cfg['std']))
            self.register_buffer('teacher_scale', own_std / teacher.std_kd, persistent=False)
            self.register_buffer('teacher_shift', (own_mean - teacher.mean_kd) / teacher.std_kd, persistent=False)

    def train(self, mode: bool = True) -> 'ExpertTask':
        """Set the mode of all but the teacher."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def prepare_distributed(self, device_ids: Optional[list] = None, **ddp_kwargs: Any) -> 'ExpertTask':
        """Wrap the trainable module in DistributedDataParallel, with the arguments of timm's tasks."""
        self.trainable_module = nn.parallel.DistributedDataParallel(
            self.trainable_module, device_ids=device_ids, **ddp_kwargs)
        return self

    def compile(self, backend: str = 'inductor', mode: Optional[str] = None, **compile_kwargs: Any) -> nn.Module:
        """Compile trainable module and teacher, before distributed wrapping. Evaluation keeps the bare model."""
        if self.teacher is not None:
            self.teacher.compile(backend=backend, mode=mode, **compile_kwargs)
        self.trainable_module = torch.compile(self.trainable_module, backend=backend, mode=mode, **compile_kwargs)
        return self.trainable_module

    def get_eval_model(self, module: Optional[nn.Module] = None, ema: bool = False) -> Optional[nn.Module]:
        """The bare SHIKE model, or its moving average, None where there is no average."""
        module = module if module is not None else self.get_trainable_module(ema=ema)
        return None if module is None else unwrap_model(module).model

    def get_clip_parameters(self, exclude_head: bool = False) -> Iterator[nn.Parameter]:
        """Parameters whose gradients are clipped, without those of the classifiers if exclude_head."""
        model = unwrap_model(self.trainable_module).model
        head = set(model.get_classifier().parameters()) if exclude_head else ()
        return (parameter for parameter in model.parameters() if parameter not in head)

    def forward(self, input: Tensor, target: Tensor) -> Dict[str, Tensor]:
        """Loss of a batch.

        Args:
            input: Images [B, in_chans, H, W].
            target: Class indices [B], or class probabilities [B, C] if the loss takes them.

        Returns:
            `loss`, the averaged logits `output` [B, C], the unweighted terms of the loss and, with a teacher, `kd`.
        """
        logits = self.trainable_module(input)
        result = (self.loss if self.progress < self.late_from else self.late_loss)(logits, target)
        total, terms = (result, {}) if isinstance(result, Tensor) else (result[0], result._asdict())
        terms.pop('total', None)
        if self.teacher is not None:
            with torch.no_grad():
                taught = self.teacher(input * self.teacher_scale + self.teacher_shift)
            terms['kd'] = knowledge_distillation(logits, taught, self.temperature)
            total = total + self.distill_loss_weight * terms['kd']
        output = logits.detach().mean(1)
        return dict(loss=total, output=output, **{name: term.detach() for name, term in terms.items()})


class RepresentationTask(ExpertTask):
    """Stage one of SHIKE: cross-entropy, dynamic knowledge transfer `nt` and mutual distillation `mu` (Eq. 10).

    Arguments are those of `shike_timm.losses.representation_loss` and of `ExpertTask`.
    """

    def __init__(
            self, model: Shike, alpha: float = 0.1, beta: float = 0.01, detach_teacher: bool = False,
            smoothing: float = 0., **kwargs: Any,
    ):
        loss = partial(
            representation_loss, alpha=alpha, beta=beta, detach_teacher=detach_teacher, smoothing=smoothing)
        super().__init__(model, loss, **kwargs)


class ClassifierRetrainingTask(ExpertTask):
    """Stage two: new classifiers trained with balanced softmax, everything else frozen (Eq. 11).

    The model gets new classifiers when the task is made, with `cosine_scale` as in `Shike.reset_classifier`. BatchNorm
    statistics keep updating. `class_counts` are the training images of each class [C], all positive.
    """

    def __init__(
            self, model: Shike, class_counts: Sequence[int], device: Optional[torch.device] = None,
            smoothing: float = 0., cosine_scale: Optional[float] = None,
    ):
        model.requires_grad_(False)
        model.reset_classifier(model.num_classes, cosine_scale=cosine_scale)
        loss = partial(balanced_softmax, class_counts=torch.tensor(class_counts, device=device), smoothing=smoothing)
        super().__init__(model, loss, freeze_features=True, device=device)
