"""The losses of SHIKE (Jin et al., CVPR 2023) as pure functions of the stacked expert logits.

`logits` is always [B, M, C]: batch, experts, classes. `target` holds class indices [B]; cross-entropies and the focal
loss also take class probabilities [B, C] from Mixup or CutMix. `class_counts` are the training images n_c of each class
[C], all positive. `smoothing` is the share of the target's weight that goes to all classes equally.

KL(p | q) is sum_c p_c (log p_c - log q_c). Each loss is a scalar, summed over experts and averaged over the batch. All
arithmetic is in float32, or in float64 if the logits are.
"""
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

# Lower bound of log-probabilities, so that sums over experts, classes and batch stay finite in float32.
MIN_LOG_PROB = -1e30


class RepresentationLoss(NamedTuple):
    """Eq. 10 and its unweighted terms, all scalars."""

    total: Tensor
    ce: Tensor
    nt: Tensor
    mu: Tensor


def _widen(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _log_softmax(logits: Tensor) -> Tensor:
    return F.log_softmax(logits, dim=-1).clamp(min=MIN_LOG_PROB)


def _expected(values: Tensor, target: Tensor, smoothing: float = 0.) -> Tensor:
    """Expectation of values [B, M, C] under the target, summed over experts and averaged over the batch.

    With smoothing the target keeps 1 - smoothing of its weight. The rest goes to all classes equally.
    """
    if smoothing:
        return (1 - smoothing) * _expected(values, target) + smoothing * values.mean(-1).sum(1).mean()
    if target.ndim == 1:
        index = target[:, None, None].expand(-1, values.shape[1], 1)
        return values.gather(-1, index).sum(1).mean()
    return (target.to(values.dtype)[:, None] * values).sum((1, 2)).mean()


def expert_cross_entropy(logits: Tensor, target: Tensor, smoothing: float = 0.) -> Tensor:
    """Plain cross-entropy, the L_ce of Eq. 10."""
    return -_expected(_log_softmax(_widen(logits)), target, smoothing)


def mutual_distillation(logits: Tensor) -> Tensor:
    """Mutual knowledge distillation between experts, L_mu of Eq. 4.

    The sum over ordered pairs of KL(p^j | p^k) equals M * sum_j sum_c p^j_c (log p^j_c - mean_k log p^k_c). No tensor
    of pairs is needed.
    """
    num_experts = logits.shape[1]
    log_prob = _log_softmax(_widen(logits))
    gap = log_prob - log_prob[:, :1]  # Subtracting one expert makes the loss of equal experts exactly 0.
    gap = gap - gap.mean(1, keepdim=True)
    return num_experts * (log_prob.exp() * gap).sum((1, 2)).mean()


def dynamic_knowledge_transfer(logits: Tensor, target: Tensor, detach_teacher: bool = False) -> Tensor:
    """Dynamic knowledge transfer (DKT), L_nt of Eq. 5 to 9.

    The target class is left out. For each other class the grand teacher takes the largest logit of any expert
    (Eq. 6). At the consensus hardest negative, the class with the largest logit averaged over experts, it takes that
    average instead (Eq. 7). The loss of an expert is KL(teacher | expert) over the C - 1 classes. `detach_teacher`
    stops the gradients through the teacher.

    Raises:
        ValueError: If there are fewer than two classes or target is not [B] class indices.
    """
    batch_size, num_experts, num_classes = logits.shape
    if num_classes < 2:
        raise ValueError(f'Expected logits of at least 2 classes to leave the target out of, got {num_classes}.')
    if target.shape != (batch_size,):
        raise ValueError(f'Expected target as class indices of shape ({batch_size},), got {tuple(target.shape)}.')
    index = torch.arange(num_classes - 1, device=logits.device).expand(batch_size, -1)
    index = index + (index >= target[:, None])  # These are the C - 1 classes other than the target.
    logits = _widen(logits).gather(2, index[:, None].expand(-1, num_experts, -1))

    mean = (logits / num_experts).sum(1)  # Eq. 5. The division comes first so that no finite logits overflow.
    hardest = mean.argmax(1, keepdim=True)
    teacher = logits.amax(1).scatter(1, hardest, mean.gather(1, hardest))
    if detach_teacher:
        teacher = teacher.detach()

    log_teacher = _log_softmax(teacher)[:, None]
    return (log_teacher.exp() * (log_teacher - _log_softmax(logits))).sum((1, 2)).mean()


def knowledge_distillation(logits: Tensor, teacher: Tensor, temperature: float = 4.) -> Tensor:
    """Distillation of every expert from one trained teacher (Hinton et al., 2015, arXiv:1503.02531).

    T^2 KL(softmax(teacher / T) | softmax(logits / T)). The factor T^2 keeps the size of the gradients for any T. A
    higher temperature T, above 0, gives more weight to the teacher's small probabilities. The logits of the teacher
    [B, C] get no gradient.
    """
    log_prob = _log_softmax(_widen(logits) / temperature)
    log_teacher = _log_softmax(_widen(teacher.detach()) / temperature)[:, None]
    return temperature ** 2 * (log_teacher.exp() * (log_teacher - log_prob)).sum((1, 2)).mean()


def balanced_softmax(logits: Tensor, target: Tensor, class_counts: Tensor, smoothing: float = 0.) -> Tensor:
    """Balanced softmax cross-entropy, Eq. 11: log n_c is added to the logits."""
    logits = _widen(logits)
    return expert_cross_entropy(logits + class_counts.to(logits.dtype).log(), target, smoothing)


def logit_adjusted(
        logits: Tensor, target: Tensor, class_counts: Tensor, tau: float = 1., smoothing: float = 0.,
) -> Tensor:
    """Logit-adjusted cross-entropy (Menon et al., ICLR 2021): tau log pi_c is added to the logits.

    The prior pi are the shares of the class counts. tau = 1 equals `balanced_softmax`, 0 plain cross-entropy.
    """
    logits = _widen(logits)
    prior = class_counts.to(logits.dtype) / class_counts.sum()
    return expert_cross_entropy(logits + tau * prior.log(), target, smoothing)


def focal(logits: Tensor, target: Tensor, gamma: float = 2., smoothing: float = 0.) -> Tensor:
    """Focal loss over softmax probabilities p (Lin et al., ICCV 2017): -(1 - p_y)^gamma log p_y.

    A higher gamma gives less weight to images that are classified well. 0 is plain cross-entropy.
    """
    log_prob = _log_softmax(_widen(logits))
    # 1 - p without cancellation. It is kept above 0, since a power below 1 has an infinite gradient at 0.
    rest = -torch.expm1(log_prob)
    return -_expected(rest.clamp(min=torch.finfo(rest.dtype).tiny) ** gamma * log_prob, target, smoothing)


def ldam(
        logits: Tensor, target: Tensor, class_counts: Tensor, scale: float = 30., max_margin: float = 0.5,
        class_weights: Optional[Tensor] = None,
) -> Tensor:
    """Label-distribution-aware margin loss (Cao et al., NeurIPS 2019).

    The loss subtracts scale * max_margin * (n_min / n_y)^(1/4) from the logit of the target y, then takes the
    cross-entropy. The logits are `scale` times the cosines of a cosine classifier. `max_margin` is the margin of the
    smallest class, as a difference of cosines. `class_weights` [C] weigh the images in the mean over the batch.

    Raises:
        ValueError: If target is not [B] class indices.
    """
    if target.shape != logits.shape[:1]:
        raise ValueError(f'Expected target as class indices of shape ({len(logits)},), got {tuple(target.shape)}.')
    logits = _widen(logits)
    counts = class_counts.to(logits.dtype)
    margin = scale * max_margin * (counts.min() / counts) ** 0.25
    index = target[:, None, None].expand(-1, logits.shape[1], 1)
    log_prob = _log_softmax(logits.scatter_add(-1, index, -margin[target][:, None, None].expand_as(index)))
    if class_weights is None:
        return -_expected(log_prob, target)
    weights = class_weights.to(logits.dtype)[target]
    return -(log_prob.gather(-1, index).sum((1, 2)) * weights).sum() / weights.sum()


def representation_loss(
        logits: Tensor, target: Tensor, alpha: float = 0.1, beta: float = 0.01, detach_teacher: bool = False,
        smoothing: float = 0.,
) -> RepresentationLoss:
    """The loss of stage one, L = L_ce + alpha * L_nt + beta * L_mu (Eq. 10), and its three unweighted terms.

    A term of weight 0 is not computed. If alpha is 0, the target may be class probabilities; DKT needs class
    indices. `smoothing` changes the cross-entropy alone.
    """
    ce = expert_cross_entropy(logits, target, smoothing)
    zero = torch.zeros_like(ce)
    nt = dynamic_knowledge_transfer(logits, target, detach_teacher) if alpha else zero
    mu = mutual_distillation(logits) if beta else zero
    return RepresentationLoss(ce + alpha * nt + beta * mu, ce, nt, mu)
