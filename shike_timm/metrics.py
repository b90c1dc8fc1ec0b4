"""Accuracy on many-, medium- and few-shot classes, for the ensemble and for each expert."""
from typing import Any, Dict, List, Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.classification import binary_calibration_error

__all__ = ['METRICS', 'SHOTS', 'ExpertEvaluator', 'evaluate', 'format_subsets', 'format_table', 'shot_divisions']

SHOTS = ('many', 'medium', 'few')
METRICS = ('loss', 'top1', 'top5', 'balanced', *SHOTS, 'ece')


def shot_divisions(class_counts: Sequence[int]) -> Dict[str, Tensor]:
    """Masks [C] of the classes with many (over 100), medium (20 to 100) and few (under 20) training images."""
    counts = torch.as_tensor(class_counts)
    return {'many': counts > 100, 'medium': (counts >= 20) & (counts <= 100), 'few': counts < 20}


class ExpertEvaluator:
    """Accumulates the metrics of several outputs at once, on their device, without a host sync per batch.

    Args:
        num_outputs: Outputs K judged side by side.
        class_counts: Training images of each class [C], which make the shot divisions.
        device: Device of the outputs.
    """

    def __init__(self, num_outputs: int, class_counts: Sequence[int], device: Optional[torch.device] = None):
        num_classes = len(class_counts)
        self.divisions = shot_divisions(class_counts)
        self.loss_sum = torch.zeros(num_outputs, dtype=torch.float64, device=device)
        self.top1 = torch.zeros(num_classes, num_outputs, dtype=torch.int64, device=device)
        self.top5 = torch.zeros_like(self.top1)
        self.total = torch.zeros(num_classes, dtype=torch.int64, device=device)
        self.confidence: List[Tensor] = []
        self.correct: List[Tensor] = []

    @torch.no_grad()
    def update(self, logits: Tensor, target: Tensor) -> None:
        """Count a batch of logits [B, K, C] with class indices [B]."""
        index = target[:, None].expand(logits.shape[:2])
        self.loss_sum += F.cross_entropy(logits.transpose(1, 2).float(), index, reduction='none').double().sum(0)
        hits = logits.topk(min(5, logits.shape[-1]), dim=-1).indices == target[:, None, None]
        self.top1.index_add_(0, target, hits[..., 0].long())
        self.top5.index_add_(0, target, hits.any(-1).long())
        self.total.index_add_(0, target, torch.ones_like(target))
        self.confidence.append(logits.float().softmax(-1).amax(-1))
        self.correct.append(hits[..., 0])

    def compute(self) -> List[Dict[str, Optional[float]]]:
        """Metrics of each output.

        Returns:
            Per output the mean cross-entropy `loss`, the share of images right, `top1` and `top5`, the accuracy
            averaged over all classes, `balanced`, and over those of each shot division, None for a division without
            test images, and the expected calibration error `ece` (15 bins, Guo et al., ICML 2017). All but the loss
            are in percent, to two decimals.
        """
        total, top1, top5 = self.total.cpu(), self.top1.cpu().double(), self.top5.cpu().double()
        num_images = int(total.sum())
        accuracy = 100 * top1 / total[:, None].clamp(min=1)
        confidence, correct = (torch.cat(parts).t().contiguous() for parts in (self.confidence, self.correct))
        results = []
        for k, loss_sum in enumerate(self.loss_sum.tolist()):
            metrics = dict(
                loss=round(loss_sum / num_images, 4),
                top1=round(100 * float(top1[:, k].sum()) / num_images, 2),
                top5=round(100 * float(top5[:, k].sum()) / num_images, 2),
            )
            for name, mask in dict(balanced=torch.ones_like(total, dtype=torch.bool), **self.divisions).items():
                mask = mask & (total > 0)
                metrics[name] = round(float(accuracy[mask, k].mean()), 2) if mask.any() else None
            metrics['ece'] = round(100 * float(binary_calibration_error(confidence[k], correct[k], n_bins=15)), 2)
            results.append(metrics)
        return results


@torch.inference_mode()
def evaluate(
        model: nn.Module,
        loader,
        class_counts: Sequence[int],
        device: torch.device,
        subsets: Sequence[Sequence[int]] = (),
        flip: bool = False,
) -> Dict[str, Any]:
    """Evaluate a SHIKE model in float32.

    Args:
        model: A model with `forward_experts`.
        loader: Gives batches of images [B, in_chans, H, W] and class indices [B] on `device`.
        class_counts: Training images of each class.
        device: Device of the model.
        subsets: Choices of experts to judge as ensembles of their own.
        flip: Average the logits with those of the mirrored images.

    Returns:
        The ensemble's metrics (see `ExpertEvaluator.compute`), under `experts` those of each expert and, if subsets
        are given, under `subsets` those of each, with its `experts`.
    """
    was_training = model.training
    model.eval()
    evaluator = None
    for images, target in loader:
        # One layout whatever the model's own, so that the same weights always give the same figures.
        images = images.contiguous(memory_format=torch.channels_last)
        experts = model.forward_experts(images)
        if flip:
            experts = (experts + model.forward_experts(images.flip(-1))) / 2
        chosen = [experts[:, list(subset)].mean(1, keepdim=True) for subset in subsets]
        logits = torch.cat([experts.mean(1, keepdim=True), experts, *chosen], dim=1)
        if evaluator is None:
            evaluator = ExpertEvaluator(logits.shape[1], class_counts, device)
        evaluator.update(logits, target)
    model.train(was_training)
    ensemble, *rest = evaluator.compute()
    num_experts = len(rest) - len(subsets)
    metrics = dict(ensemble, experts=rest[:num_experts])
    if subsets:
        metrics['subsets'] = [
            dict(one, experts=list(subset)) for subset, one in zip(subsets, rest[num_experts:])]
    return metrics


def format_table(stages: Dict[str, Dict[str, Any]]) -> str:
    """A text table of metrics, a row for each expert and the ensemble of each stage.

    Args:
        stages: Results of `evaluate` by the name of the stage.
    """
    rows = [('', *METRICS)]
    for stage, result in stages.items():
        for m, expert in enumerate(result['experts']):
            rows.append((f'{stage} expert {m}'.strip(), *(expert.get(key) for key in METRICS)))
        rows.append((f'{stage} ensemble'.strip(), *(result.get(key) for key in METRICS)))
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
