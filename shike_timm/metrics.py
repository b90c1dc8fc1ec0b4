"""Accuracy on many-, medium- and few-shot classes: of the ensemble, of each expert and of subsets of the experts."""
import itertools
import logging
import math
from dataclasses import dataclass
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .distributed import world_size
from .errors import InputError
from .options import option

_logger = logging.getLogger(__name__)

SHOTS = ('many', 'medium', 'few')
METRICS = ('loss', 'top1', 'top5', 'balanced', *SHOTS, 'ece')
MOST_EXPERTS = 4  # Reports measure every subset of the experts up to this number of experts.
MOST_LISTED = 30  # Classes in a table on the terminal.
NUM_BINS = 15  # Bins of the calibration error.
NUM_STEPS = 10_000  # Rejection thresholds that are tried are multiples of 1 / NUM_STEPS.
KEPT_RIGHT = 0.95  # Share of the right answers that a chosen threshold keeps.


@dataclass(frozen=True)
class ShotConfig:
    """Shot divisions."""

    many_shot: int = option(100, 'classes with more training images than this are many-shot', low=0, card='changed')
    few_shot: int = option(20, 'classes with fewer training images than this are few-shot', low=0, card='changed')


def shot_numbers(class_counts: Sequence[int], shots: ShotConfig = ShotConfig()) -> np.ndarray:
    """The shot division of each class [C], as its place in `SHOTS`, by the training images of each class [C]."""
    counts = np.asarray(class_counts)
    return np.select([counts > shots.many_shot, counts < shots.few_shot], [0, 2], 1)


def shot_divisions(class_counts: Sequence[int], shots: ShotConfig = ShotConfig()) -> Dict[str, Tensor]:
    """Masks [C] of the many-, medium- and few-shot classes, by the training images of each class [C]."""
    numbers = torch.from_numpy(shot_numbers(class_counts, shots))
    return {shot: numbers == number for number, shot in enumerate(SHOTS)}


def all_subsets(num_experts: int) -> List[Tuple[int, ...]]:
    """Every subset of the experts, the smallest first."""
    return list(itertools.chain(*(itertools.combinations(range(num_experts), n + 1) for n in range(num_experts))))


class ExpertEvaluator:
    """Evaluator of expert logits: metrics of the ensemble, of each expert and of subsets of the experts.

    It keeps sums of fixed size on the device, so batches do not wait for the host and processes can add up their sums.
    `shots` are the shot divisions of the classes [C], as `shot_numbers` gives them. The `subsets` of the experts are
    evaluated as ensembles. The class of an image whose probability is below `threshold` counts as unknown. The default
    threshold keeps 95 % of the right answers of the ensemble.
    """

    def __init__(
            self, num_experts: int, shots: Sequence[int], device: Optional[torch.device] = None, *,
            subsets: Sequence[Sequence[int]] = (), threshold: Optional[float] = None,
    ):
        self.num_experts = num_experts
        self.device = torch.device(device or 'cpu')
        self.shots = torch.as_tensor(shots)
        self.subsets = [torch.tensor(subset, device=device) for subset in subsets]
        self.bin_edges = torch.linspace(0, 1, NUM_BINS + 1, device=device)
        self.threshold = threshold
        self.steps = (torch.arange(NUM_STEPS + 1, dtype=torch.float64) / NUM_STEPS).float().to(self.device)
        num_classes, num_outputs = len(self.shots), 1 + self.num_experts + len(self.subsets)
        self.total = torch.zeros(num_classes, dtype=torch.int64, device=self.device)
        self.top1 = torch.zeros(num_classes, num_outputs, dtype=torch.int64, device=self.device)
        self.top5 = torch.zeros_like(self.top1)
        self.predicted = torch.zeros_like(self.top1)  # How often each output predicts each class.
        # Number of images and of right answers of the ensemble, by the largest threshold that the confidence reaches.
        self.reached = torch.zeros(NUM_STEPS + 1, 2, dtype=torch.int64, device=self.device)
        dtype = torch.float32 if self.device.type == 'mps' else torch.float64
        self.loss_sum = torch.zeros(num_classes, num_outputs, dtype=dtype, device=self.device)
        # Each bin holds the sum of confidences minus the number of correct answers. A confidence of exactly 1 has its
        # own bin.
        self.overconfidence = torch.zeros(NUM_BINS + 1, num_outputs, dtype=dtype, device=self.device)

    @torch.no_grad()
    def update(self, output: Tensor, target: Tensor) -> None:
        """Count a batch of expert logits [B, M, C] with class indices [B]."""
        ensembles = [output.index_select(1, subset).mean(1, keepdim=True) for subset in self.subsets]
        logits = torch.cat([output.mean(1, keepdim=True), output, *ensembles], dim=1).float()
        index = target[:, None].expand(logits.shape[:2])
        loss = F.cross_entropy(logits.transpose(1, 2), index, reduction='none').to(self.loss_sum.dtype)
        answers = logits.argmax(-1)
        right = answers == index  # For equal logits argmax, which reports use, and topk may differ.
        hits = (logits.topk(min(5, logits.shape[-1]), dim=-1).indices == target[:, None, None]).any(-1) | right
        self.total.index_add_(0, target, torch.ones_like(target))
        self.top1.index_add_(0, target, right.long())
        self.predicted.scatter_add_(0, answers, torch.ones_like(answers))
        self.top5.index_add_(0, target, hits.long())
        self.loss_sum.index_add_(0, target, loss)
        confidence = logits.softmax(-1).amax(-1)
        bins = torch.bucketize(confidence, self.bin_edges, right=True) - 1
        self.overconfidence.scatter_add_(0, bins, confidence.to(loss.dtype) - right.to(loss.dtype))
        step = torch.bucketize(confidence[:, 0].contiguous(), self.steps, right=True) - 1
        self.reached.index_add_(0, step, torch.stack([torch.ones_like(target), right[:, 0].to(target.dtype)], 1))

    def compute(self, distributed: bool = False) -> Dict[str, Any]:
        """Metrics of all images so far. All but the loss are in percent with two decimals.

        Args:
            distributed: Add up the sums of all processes first.

        Returns:
            Metrics of the ensemble: the mean cross-entropy `loss`; `top1` and `top5`; `balanced`, the accuracy averaged
            over the `balanced_classes` classes with test images; `many`, `medium` and `few`, averaged over the classes
            of a division (None without test images); `macro_f1`, the mean F1 over the classes with test images; the
            expected calibration error `ece` (Guo et al., ICML 2017, with 15 bins and one for confidences of 1, as in
            torchmetrics). `experts` lists the same for each expert. `subsets` lists it for each subset, with its
            `experts`. `reject` has the `threshold` of the ensemble's probability below which the class of an image is
            unknown, the share `coverage` of the other images, and their `accuracy`. `per_class` has lists over the
            classes: the number of test images `total`, the accuracy (recall) `top1`, `precision` and `f1` of the
            ensemble (None without images), and the accuracies of the `experts`.

        Raises:
            InputError: If a logit is not finite.
        """
        sums = [one.clone() for one in (
            self.total, self.top1, self.top5, self.loss_sum, self.overconfidence, self.predicted, self.reached)]
        if distributed:
            for one in sums:
                dist.all_reduce(one)
        total, top1, top5, loss_sum, overconfidence, predicted, reached = (one.cpu().double() for one in sums)
        if loss_sum.isnan().any():
            raise InputError(
                'The model gives logits that are not finite. Its weights are damaged, or it expects other images: use '
                'another checkpoint.')
        seen, num_images = total > 0, max(int(total.sum()), 1)
        accuracy = 100 * top1 / total[:, None].clamp(min=1)
        groups = {'balanced': seen, **{shot: seen & (self.shots == number) for number, shot in enumerate(SHOTS)}}
        f1 = 200 * top1 / (total[:, None] + predicted).clamp(min=1)
        results = [
            dict(
                loss=round(float(loss_sum[:, k].sum()) / num_images, 4),
                top1=round(100 * float(top1[:, k].sum()) / num_images, 2),
                top5=round(100 * float(top5[:, k].sum()) / num_images, 2),
                **{name: round(float(accuracy[mask, k].mean()), 2) if mask.any() else None
                   for name, mask in groups.items()},
                macro_f1=round(float(f1[seen, k].mean()), 2) if seen.any() else None,
                ece=round(100 * float(overconfidence[:, k].abs().sum()) / num_images, 2),
            ) for k in range(accuracy.shape[1])]
        per_class = [_rounded(shares, total) for shares in accuracy.T]
        last = self.num_experts + 1
        metrics: Dict[str, Any] = dict(
            results[0], balanced_classes=int(seen.sum()), experts=results[1:last],
            reject=self._rejection(reached))
        if self.subsets:
            metrics['subsets'] = [
                dict(one, experts=subset.tolist()) for subset, one in zip(self.subsets, results[last:])]
        precision = _rounded((100 * top1 / predicted)[:, 0], predicted[:, 0])
        metrics['per_class'] = dict(
            total=total.long().tolist(), top1=per_class[0], precision=precision, f1=_rounded(f1[:, 0], total),
            experts=per_class[1:last])
        return metrics

    def _rejection(self, reached: Tensor) -> Dict[str, Any]:
        kept, right = reached.flip(0).cumsum(0).flip(0).T
        step = math.ceil(round((self.threshold or 0) * NUM_STEPS, 6))
        if self.threshold is None and right[0]:
            step = int((right >= KEPT_RIGHT * right[0]).sum()) - 1
        return dict(
            threshold=step / NUM_STEPS, coverage=round(100 * float(kept[step] / kept[0].clamp(min=1)), 2),
            accuracy=round(100 * float(right[step] / kept[step]), 2) if kept[step] else None)


def _rounded(values: Tensor, counts: Tensor) -> List[Optional[float]]:
    return [round(value, 2) if count else None for value, count in zip(values.tolist(), counts.tolist())]


@torch.inference_mode()
def evaluate(
        model: Any, loader, class_counts: Sequence[int], device: torch.device, subsets: Sequence[Sequence[int]] = (),
        flip: bool = False, shots: ShotConfig = ShotConfig(),
        kept: Optional[List[Tuple[Tensor, Tensor]]] = None, threshold: Optional[float] = None,
) -> Dict[str, Any]:
    """Evaluate a SHIKE model in float32 on the images of all processes. Each image counts once.

    Args:
        model: Model with `num_experts` and `forward_experts`.
        loader: Iterable of batches: images [B, in_chans, H, W] and class indices [B] on `device`.
        class_counts: Training images of each class [C], which decide its shot division.
        device: Device of the model.
        subsets: Subsets of the experts to evaluate as ensembles.
        flip: Average the logits with those of the mirrored images.
        shots: Borders of the shot divisions.
        threshold: As in `ExpertEvaluator`.
        kept: List to which the expert logits [B, M, C] and class indices [B] of each batch are added, on the CPU.

    Returns:
        What `ExpertEvaluator.compute` returns.
    """
    was_training = model.training
    model.eval()
    divisions = shot_numbers(class_counts, shots).tolist()
    evaluator = ExpertEvaluator(model.num_experts, divisions, device, subsets=subsets, threshold=threshold)
    for images, target in loader:
        if not len(target):
            continue  # No image of the batch could be read.
        # The memory layout is always the same, so that the same weights give the same metrics.
        if images.ndim == 4:  # Otherwise they are features.
            images = images.contiguous(memory_format=torch.channels_last)
        logits = model.forward_experts(images)
        if flip:
            logits = (logits + model.forward_experts(images.flip(-1))) / 2
        evaluator.update(logits, target)
        if kept is not None:
            kept.append((logits.float().cpu(), target.cpu()))
    model.train(was_training)
    return evaluator.compute(distributed=world_size() > 1)


def balanced_over(metrics: Dict[str, Any], num_classes: int) -> str:
    """Sentences below a table: how many classes its means cover, and a hint if only one shot division has images."""
    divisions = [shot for shot in SHOTS if metrics[shot] is not None]
    return (
        f"balanced and macro_f1 are means over {metrics['balanced_classes']} of {num_classes} classes, those with "
        'images here.'
        + (f' All of them are {divisions[0]}-shot: --many-shot and --few-shot choose other borders.'
           if len(divisions) == 1 else ''))


def rejection(reject: Dict[str, Any], known: bool) -> str:
    """A sentence on the metrics `reject`. Their threshold was `known` before, or was chosen on these images."""
    whose = "The model's threshold" if known else 'A threshold that keeps 95 % of the right answers here'
    kept = f"keeps {reject['coverage']} % of the images" + (
        '' if reject['accuracy'] is None else f", of which {reject['accuracy']} % are right")
    how = '' if known else f" --reject-below {reject['threshold']:g}"
    return (
        f"{whose} is a probability of {reject['threshold']:g}: it {kept}. shike predict --reject{how} calls the others "
        'unknown.')


def fit_temperature(logits: Tensor, targets: Tensor) -> float:
    """The temperature T that minimises the cross-entropy of `logits / T`, from 1/20 to 20 (Guo et al., ICML 2017).

    The logits are averaged over experts [N, C], the targets are class indices [N].
    """
    logits, log_t = logits.double(), torch.zeros((), dtype=torch.float64, requires_grad=True)
    bound = math.log(20)
    optimizer = torch.optim.LBFGS([log_t], max_iter=100, line_search_fn='strong_wolfe')

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(logits / log_t.clamp(-bound, bound).exp(), targets)
        value.backward()
        return value

    optimizer.step(loss)
    return round(math.exp(min(max(log_t.item(), -bound), bound)), 6)


def format_classes(per_class: Dict[str, Any], names: Sequence[str], class_counts: Sequence[int]) -> str:
    """A text table of the classes, most training images first. Of more than 30 classes only the worst ten by F1."""
    rows = [
        (f'  {names[c]}'[:40], str(class_counts[c]), str(per_class['total'][c]),
         *(per_class[key][c] for key in ('top1', 'precision', 'f1')))
        for c in sorted(range(len(names)), key=lambda c: -class_counts[c])]
    title = 'classes'
    if len(rows) > MOST_LISTED:
        rows = sorted((row for row in rows if row[-1] is not None), key=lambda row: row[-1])[:10]
        title = 'worst ten classes'
    return _format_rows([(title, 'training', 'test', 'recall', 'precision', 'F1'), *rows])


def print_results(
        stages: Dict[str, Dict[str, Any]], per_class: Dict[str, Any], names: Optional[Sequence[str]],
        class_counts: Sequence[int], known: bool,
) -> None:
    """Print tables of the classes and of the metrics by stage, and log notes on the metrics of the last stage.

    The rejection threshold of that stage was `known` before, or was chosen on these images.
    """
    last = list(stages.values())[-1]
    print(format_classes(per_class, names or [str(c) for c in range(len(class_counts))], class_counts))
    print(format_table(stages), flush=True)
    _logger.info(balanced_over(last, len(class_counts)))
    _logger.info(rejection(last['reject'], known))


def shown_divisions(results: Iterable[Mapping[str, Any]]) -> List[str]:
    """The shot divisions with images in any of the metrics. Empty for a single division, which has all classes."""
    results = list(results)
    found = [shot for shot in SHOTS if any(result[shot] is not None for result in results)]
    return found if len(found) > 1 else []


def shown_metrics(results: Iterable[Mapping[str, Any]]) -> List[str]:
    """The metrics that a table of these results shows, in order."""
    return ['loss', 'top1', 'top5', 'balanced', 'macro_f1', *shown_divisions(results), 'ece']


def format_table(stages: Dict[str, Dict[str, Any]]) -> str:
    """A text table of the metrics by stage. Each expert and each ensemble has a row."""
    columns = shown_metrics(stages.values())
    rows: List[Sequence[Any]] = [('', *columns)]
    for stage, result in stages.items():
        experts = result['experts'] if len(result['experts']) > 1 else []
        named = [*((f'expert {m}', one) for m, one in enumerate(experts)), ('ensemble' if experts else 'model', result)]
        if 'plain' in result:
            named.append(('not averaged', result['plain']))
        rows += [(f'{stage} {name}'.strip(), *(one.get(key) for key in columns)) for name, one in named]
    return _format_rows(rows)


def format_subsets(subsets: Sequence[Dict[str, Any]]) -> str:
    """A text table of the metrics and costs of subsets of the experts."""
    rows: List[Sequence[Any]] = [('experts', *METRICS[1:], 'params M', 'GMACs', 'img/s')]
    for one in subsets:
        costs = one['parameters'] / 1e6, f"{one['gmacs']:.4f}", f"{one['images_per_second']:.0f}"
        rows.append((' '.join(map(str, one['experts'])), *(one[key] for key in METRICS[1:]), *costs))
    return _format_rows(rows)


def _format_rows(rows: Sequence[Sequence[Any]]) -> str:
    def text(cell: Any) -> str:
        return '-' if cell is None else cell if isinstance(cell, str) else f'{cell:.2f}'

    cells = [[text(cell) for cell in row] for row in rows]
    width = max(len(row[0]) for row in cells)
    widths = [max(9, len(head) + 2) for head in cells[0][1:]]
    return '\n'.join(row[0].ljust(width) + ''.join(map(str.rjust, row[1:], widths)) for row in cells)
