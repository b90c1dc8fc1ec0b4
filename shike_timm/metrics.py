"""What is measured of a model: accuracy on many-, medium- and few-shot classes, of the ensemble and each expert."""
import itertools
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.task import ClassificationEvaluator
from torch import Tensor

from .distributed import world_size
from .errors import InputError
from .options import option

__all__ = [
    'METRICS', 'SHOTS', 'ExpertEvaluator', 'all_subsets', 'balanced_over', 'evaluate', 'format_subsets', 'format_table',
    'shot_divisions', 'shot_numbers',
]

SHOTS = ('many', 'medium', 'few')
METRICS = ('loss', 'top1', 'top5', 'balanced', *SHOTS, 'ece')
MOST_EXPERTS = 4  # of which a report tries every choice
NUM_BINS = 15  # of the calibration error


@dataclass(frozen=True)
class ShotConfig:
    """Shot divisions."""

    many_shot: int = option(100, 'a class with more training images is one of many', low=0, card='changed')
    few_shot: int = option(20, 'a class with fewer training images is one of few', low=0, card='changed')


def shot_divisions(class_counts: Sequence[int], shots: ShotConfig = ShotConfig()) -> Dict[str, Tensor]:
    """Masks [C] of the classes with many training images (over `many_shot`), few (under `few_shot`), or between."""
    counts = torch.as_tensor(class_counts)
    many, few = counts > shots.many_shot, counts < shots.few_shot
    return {'many': many, 'medium': ~many & ~few, 'few': few & ~many}


def shot_numbers(class_counts: Sequence[int], shots: ShotConfig = ShotConfig()) -> np.ndarray:
    """Place in `SHOTS` of each class's division [C]; arguments as for `shot_divisions`."""
    divisions = shot_divisions(class_counts, shots)
    return torch.stack([divisions[shot] for shot in SHOTS]).int().argmax(0).numpy()


def all_subsets(num_experts: int) -> List[Tuple[int, ...]]:
    """Every choice of experts, the smallest first."""
    numbers = range(num_experts)
    return [subset for size in numbers for subset in itertools.combinations(numbers, size + 1)]


class ExpertEvaluator(ClassificationEvaluator):
    """timm's evaluator for the logits of experts: metrics of the ensemble, of each expert and of choices of them.

    All it keeps are sums of fixed size, on the device: no batch waits for the host, and processes can add theirs up.

    Args:
        num_experts: Experts M.
        class_counts: Images of each class [C] that make the shot divisions.
        device: Device of the logits.
        subsets: Choices of experts to judge as ensembles of their own.
        max_samples: Images to count at most, the rest being what a distributed sampler pads with.
        shots: Borders of the shot divisions.
    """

    metric_names = METRICS

    def __init__(
            self,
            num_experts: int,
            class_counts: Sequence[int],
            device: Optional[torch.device] = None,
            *,
            subsets: Sequence[Sequence[int]] = (),
            max_samples: Optional[int] = None,
            shots: ShotConfig = ShotConfig(),
    ):
        self.shots = shots
        self.num_experts = num_experts
        self.class_counts = class_counts
        self.subsets = [torch.tensor(subset, device=device) for subset in subsets]
        self.bin_edges = torch.linspace(0, 1, NUM_BINS + 1, device=device)
        super().__init__(device, max_samples=max_samples)

    def reset(self) -> None:
        self.num_samples = 0
        num_classes, num_outputs = len(self.class_counts), 1 + self.num_experts + len(self.subsets)
        self.total = torch.zeros(num_classes, dtype=torch.int64, device=self.device)
        self.top1 = torch.zeros(num_classes, num_outputs, dtype=torch.int64, device=self.device)
        self.top5 = torch.zeros_like(self.top1)
        dtype = torch.float32 if self.device.type == 'mps' else torch.float64
        self.loss_sum = torch.zeros(num_classes, num_outputs, dtype=dtype, device=self.device)
        # Of each bin the sum of confidence less right answers; a confidence of exactly 1 has a bin to itself.
        self.overconfidence = torch.zeros(NUM_BINS + 1, num_outputs, dtype=dtype, device=self.device)

    @torch.no_grad()
    def update(self, output: Tensor, target: Tensor) -> None:
        """Count a batch of expert logits [B, M, C] with class indices [B]."""
        if self.max_samples is not None:
            num_left = max(self.max_samples - self.num_samples, 0)
            output, target = output[:num_left], target[:num_left]
        self.num_samples += len(target)
        chosen = [output.index_select(1, subset).mean(1, keepdim=True) for subset in self.subsets]
        logits = torch.cat([output.mean(1, keepdim=True), output, *chosen], dim=1).float()
        index = target[:, None].expand(logits.shape[:2])
        loss = F.cross_entropy(logits.transpose(1, 2), index, reduction='none').to(self.loss_sum.dtype)
        hits = logits.topk(min(5, logits.shape[-1]), dim=-1).indices == target[:, None, None]
        self.total.index_add_(0, target, torch.ones_like(target))
        self.top1.index_add_(0, target, hits[..., 0].long())
        self.top5.index_add_(0, target, hits.any(-1).long())
        self.loss_sum.index_add_(0, target, loss)
        confidence = logits.softmax(-1).amax(-1)
        bins = torch.bucketize(confidence, self.bin_edges, right=True) - 1
        self.overconfidence.scatter_add_(0, bins, confidence.to(loss.dtype) - hits[..., 0].to(loss.dtype))

    def summary(self) -> Dict[str, Any]:
        """What `compute` gives of this process alone."""
        return self.compute()

    def compute(self, distributed: bool = False) -> Dict[str, Any]:
        """Metrics of all images counted.

        Args:
            distributed: Add up the sums of all processes first.

        Returns:
            Of the ensemble the mean cross-entropy `loss`, the share of images right, `top1` and `top5`, the accuracy
            averaged over the classes with test images, `balanced`, of which there are `balanced_classes`, and over
            those of each shot division, None for a division without test images, and the expected calibration error
            `ece` (15 bins, Guo et al., ICML 2017, and one of confidences of 1, as torchmetrics has it); all but the
            loss are in percent, to two decimals. The same under `experts` of each expert and, if there are subsets,
            under `subsets` of each, with its `experts`. Under `per_class` are lists over the classes: their test
            images, `total`, the ensemble's accuracy, `top1`, None without test images, and under `experts` that of
            each.

        Raises:
            InputError: If a logit was not a number.
        """
        sums = [one.clone() for one in (self.total, self.top1, self.top5, self.loss_sum, self.overconfidence)]
        if distributed:
            for one in sums:
                dist.all_reduce(one)
        total, top1, top5, loss_sum, overconfidence = (one.cpu().double() for one in sums)
        if loss_sum.isnan().any():
            raise InputError(
                'The model gives logits that are not finite, which are no answers: its weights are damaged, or the '
                'images are not what it expects; use another checkpoint.')
        num_images = max(int(total.sum()), 1)
        accuracy = 100 * top1 / total[:, None].clamp(min=1)
        divisions = dict(balanced=total >= 0, **shot_divisions(self.class_counts, self.shots))
        results, per_class = [], []
        for k in range(accuracy.shape[1]):
            result: Dict[str, Any] = dict(
                loss=round(float(loss_sum[:, k].sum()) / num_images, 4),
                top1=round(100 * float(top1[:, k].sum()) / num_images, 2),
                top5=round(100 * float(top5[:, k].sum()) / num_images, 2),
            )
            for name, mask in divisions.items():
                mask = mask & (total > 0)
                result[name] = round(float(accuracy[mask, k].mean()), 2) if mask.any() else None
            result['ece'] = round(100 * float(overconfidence[:, k].abs().sum()) / num_images, 2)
            results.append(result)
            per_class.append([
                round(share, 2) if count else None for share, count in zip(accuracy[:, k].tolist(), total.tolist())])
        last = self.num_experts + 1
        metrics: Dict[str, Any] = dict(
            results[0], balanced_classes=int((total > 0).sum()), experts=results[1:last])
        if self.subsets:
            metrics['subsets'] = [
                dict(one, experts=subset.tolist()) for subset, one in zip(self.subsets, results[last:])]
        metrics['per_class'] = dict(total=total.long().tolist(), top1=per_class[0], experts=per_class[1:last])
        return metrics


@torch.inference_mode()
def evaluate(
        model: Any,
        loader,
        class_counts: Sequence[int],
        device: torch.device,
        subsets: Sequence[Sequence[int]] = (),
        flip: bool = False,
        per_class: bool = False,
        shots: ShotConfig = ShotConfig(),
        kept: Optional[List[Tuple[Tensor, Tensor]]] = None,
) -> Dict[str, Any]:
    """Evaluate a SHIKE model in float32, on what all processes have of the images, each counted once.

    Args:
        model: A model with `num_experts` and `forward_experts`.
        loader: Gives batches of images [B, in_chans, H, W] and class indices [B] on `device`.
        class_counts: Images of each class that make the shot divisions.
        device: Device of the model.
        subsets: Choices of experts to judge as ensembles of their own.
        flip: Average the logits with those of the mirrored images.
        per_class: Also tell the accuracy on each class, under `per_class`.
        shots: Borders of the shot divisions.
        kept: Gets the expert logits [B, M, C] and class indices [B] of each batch, on the CPU.

    Returns:
        What `ExpertEvaluator.compute` gives.
    """
    was_training = model.training
    model.eval()
    evaluator = ExpertEvaluator(model.num_experts, class_counts, device, subsets=subsets, shots=shots)
    for images, target in loader:
        if not len(target):
            continue  # none of the batch could be read
        # One layout whatever the model's own, so that the same weights always give the same figures.
        images = images.contiguous(memory_format=torch.channels_last)
        logits = model.forward_experts(images)
        if flip:
            logits = (logits + model.forward_experts(images.flip(-1))) / 2
        evaluator.update(logits, target)
        if kept is not None:
            kept.append((logits.float().cpu(), target.cpu()))
    model.train(was_training)
    metrics = evaluator.compute(distributed=world_size() > 1)
    if not per_class:
        del metrics['per_class']
    return metrics


def balanced_over(metrics: Dict[str, Any], num_classes: int) -> str:
    """Over how many classes the balanced accuracy is the mean, in words."""
    return f"balanced is the mean over {metrics['balanced_classes']} of {num_classes} classes, those with images here."


def format_table(stages: Dict[str, Dict[str, Any]]) -> str:
    """A text table of metrics, a row for each expert and the ensemble of each stage.

    Args:
        stages: Results of `evaluate` by the name of the stage.
    """
    rows: List[Sequence[Any]] = [('', *METRICS)]
    for stage, result in stages.items():
        for m, expert in enumerate(result['experts']):
            rows.append((f'{stage} expert {m}'.strip(), *(expert.get(key) for key in METRICS)))
        rows.append((f'{stage} ensemble'.strip(), *(result.get(key) for key in METRICS)))
        if 'plain' in result:
            rows.append((f'{stage} not averaged', *(result['plain'].get(key) for key in METRICS)))
    return _format_rows(rows)


def format_subsets(subsets: Sequence[Dict[str, Any]]) -> str:
    """A text table of accuracy against cost, a row for each choice of experts.

    Args:
        subsets: `subsets` of what `evaluate` returns, each with its `parameters`, `gmacs` and `images_per_second`.
    """
    shares = METRICS[1:]
    rows = [('experts', *shares, 'params M', 'GMACs', 'img/s')]
    rows += [
        (
            ' '.join(map(str, one['experts'])),
            *(one[key] for key in shares),
            one['parameters'] / 1e6,
            f"{one['gmacs']:.4f}",
            f"{one['images_per_second']:.0f}",
        )
        for one in subsets
    ]
    return _format_rows(rows)


def _format_rows(rows: Sequence[Sequence[Any]]) -> str:
    def text(cell: Any) -> str:
        return '-' if cell is None else cell if isinstance(cell, str) else f'{cell:.2f}'

    cells = [[text(cell) for cell in row] for row in rows]
    width = max(len(row[0]) for row in cells)
    return '\n'.join(row[0].ljust(width) + ''.join(cell.rjust(9) for cell in row[1:]) for row in cells)
