"""The losses against slow float64 versions written straight from the equations."""
import math

import pytest
import torch

from shike_timm.losses import (
    balanced_softmax,
    dynamic_knowledge_transfer,
    expert_cross_entropy,
    focal,
    knowledge_distillation,
    ldam,
    logit_adjusted,
    mutual_distillation,
    representation_loss,
)


def softmax(z):
    top = max(z)
    exps = [math.exp(v - top) for v in z]
    return [e / sum(exps) for e in exps]


def log_softmax(z):
    top = max(z)
    total = math.log(sum(math.exp(v - top) for v in z))
    return [v - top - total for v in z]


def kl(p, q):
    """KL(p | q) of the distributions with logits p and q."""
    return sum(a * (b - c) for a, b, c in zip(softmax(p), log_softmax(p), log_softmax(q)))


def slow_mutual(logits, target):
    experts = range(len(logits[0]))
    return sum(kl(z[j], z[k]) for z in logits for j in experts for k in experts if k != j) / len(logits)


def slow_dkt(logits, target):
    total = 0.
    for z, y in zip(logits, target):
        others = [i for i in range(len(z[0])) if i != y]
        mean = {i: sum(expert[i] for expert in z) / len(z) for i in others}
        hardest = max(others, key=lambda i: mean[i])
        teacher = [mean[i] if i == hardest else max(expert[i] for expert in z) for i in others]
        total += sum(kl(teacher, [expert[i] for i in others]) for expert in z)
    return total / len(logits)


def slow_cross_entropy(logits, target):
    return sum(-log_softmax(expert)[y] for z, y in zip(logits, target) for expert in z) / len(logits)


COUNTS = [500, 3, 40, 1, 77, 12, 5]


def slow_balanced(logits, target):
    total = 0.
    for z, y in zip(logits, target):
        for expert in z:
            shifted = [v + math.log(n) for v, n in zip(expert, COUNTS)]
            total -= log_softmax(shifted)[y]
    return total / len(logits)


def balanced(logits, target):
    return balanced_softmax(logits, target, torch.tensor(COUNTS[:logits.shape[-1]]))


def slow_adjusted(logits, target):
    total, tau, counts = 0., 1.5, COUNTS[:len(logits[0][0])]
    for z, y in zip(logits, target):
        for expert in z:
            total -= log_softmax([v + tau * math.log(n / sum(counts)) for v, n in zip(expert, counts)])[y]
    return total / len(logits)


def adjusted(logits, target):
    return logit_adjusted(logits, target, torch.tensor(COUNTS[:logits.shape[-1]]), tau=1.5)


def slow_focal(logits, target):
    total = 0.
    for z, y in zip(logits, target):
        for expert in z:
            rest = sum(p for c, p in enumerate(softmax(expert)) if c != y)
            total -= rest ** 2 * log_softmax(expert)[y]
    return total / len(logits)


WEIGHTS = [0.2, 3., 1., 5., 0.5, 2., 2.5]


def slow_ldam(logits, target):
    """Deferred re-weighting on: the mean over the batch is weighted."""
    total, counts = 0., COUNTS[:len(logits[0][0])]
    for z, y in zip(logits, target):
        margin = 30 * 0.5 * (min(counts) / counts[y]) ** 0.25
        for expert in z:
            total -= WEIGHTS[y] * log_softmax([v - margin * (c == y) for c, v in enumerate(expert)])[y]
    return total / sum(WEIGHTS[y] for y in target)


def margins(logits, target):
    num_classes = logits.shape[-1]
    counts, weights = torch.tensor(COUNTS[:num_classes]), torch.tensor(WEIGHTS[:num_classes], dtype=torch.float64)
    return ldam(logits, target, counts, class_weights=weights)


TEMPERATURE = 3.


def taught(num_classes):
    """Logits of a teacher, the same for every image."""
    return [2. * (c % 3) - c for c in range(num_classes)]


def slow_distillation(logits, target):
    teacher = [v / TEMPERATURE for v in taught(len(logits[0][0]))]
    total = sum(kl(teacher, [v / TEMPERATURE for v in expert]) for z in logits for expert in z)
    return TEMPERATURE ** 2 * total / len(logits)


def distillation(logits, target):
    teacher = torch.tensor(taught(logits.shape[-1]), dtype=logits.dtype).expand(len(logits), -1)
    return knowledge_distillation(logits, teacher, TEMPERATURE)


LOSSES = {
    'distillation': (distillation, slow_distillation),
    'mutual': (lambda z, y: mutual_distillation(z), slow_mutual),
    'dkt': (dynamic_knowledge_transfer, slow_dkt),
    'cross_entropy': (expert_cross_entropy, slow_cross_entropy),
    'balanced': (balanced, slow_balanced),
    'adjusted': (adjusted, slow_adjusted),
    'focal': (focal, slow_focal),
    'ldam': (margins, slow_ldam),
}


def cases():
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    yield 'random', randn(16, 3, 7) * 4
    yield 'large', randn(16, 3, 7) * 300
    yield 'ties', torch.randint(-1, 2, (16, 3, 7), generator=generator).double()
    yield 'all equal', torch.zeros(16, 3, 7, dtype=torch.float64)
    yield 'equal experts', randn(16, 1, 7).repeat(1, 3, 1)
    yield 'near equal experts', randn(16, 1, 7) + randn(16, 3, 7) * 1e-3
    yield 'one-hot', torch.eye(7, dtype=torch.float64).repeat(3, 1, 1).transpose(0, 1) * 1e3
    yield 'C = 2', randn(16, 3, 2) * 4
    yield 'M = 1', randn(16, 1, 7) * 4
    yield 'M = 5', randn(16, 5, 7) * 4
    yield 'B = 1', randn(1, 3, 7)


CASES = dict(cases())


@pytest.mark.parametrize('loss', LOSSES)
@pytest.mark.parametrize('case', CASES)
def test_equals_the_equation(loss, case):
    fast, slow = LOSSES[loss]
    logits = CASES[case]
    target = torch.arange(len(logits)) % logits.shape[-1]
    expected = slow(logits.tolist(), target.tolist())
    result = fast(logits, target)
    assert result.dtype == torch.float64
    assert float(result) == pytest.approx(expected, rel=1e-10, abs=1e-10)
    single = fast(logits.float(), target)
    assert single.dtype == torch.float32
    assert float(single) == pytest.approx(slow(logits.float().double().tolist(), target.tolist()), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize('loss', LOSSES)
def test_gradients_are_right(loss):
    logits = (CASES['random'][:4]).clone().requires_grad_()
    target = torch.arange(4)
    assert torch.autograd.gradcheck(lambda z: LOSSES[loss][0](z, target), logits)


@pytest.mark.parametrize('loss', LOSSES)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_finite_on_extreme_logits(loss, dtype):
    top = torch.finfo(dtype).max
    signs = torch.tensor([[1., -1., 0.], [-1., 1., 1.], [1., 1., -1.]], dtype=dtype)
    logits = (signs * top).repeat(5, 1, 1).requires_grad_()
    value = LOSSES[loss][0](logits, torch.tensor([0, 1, 2, 0, 1]))
    value.backward()
    assert value.isfinite() and value >= 0
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize('loss', LOSSES)
def test_float32_under_autocast(loss):
    logits = CASES['random'].float()
    target = torch.arange(len(logits)) % 7
    outside = LOSSES[loss][0](logits.bfloat16(), target)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        inside = LOSSES[loss][0](logits.bfloat16(), target)
    assert inside.dtype == outside.dtype == torch.float32
    assert inside == outside


def test_dkt_ignores_the_target_logit():
    logits = CASES['random'].clone().requires_grad_()
    target = torch.arange(16) % 7
    value = dynamic_knowledge_transfer(logits, target)
    value.backward()
    assert (logits.grad.gather(2, target[:, None, None].expand(-1, 3, 1)) == 0).all()
    moved = logits.detach().scatter_add(2, target[:, None, None].expand(-1, 3, 1), torch.full((16, 3, 1), 50.).double())
    assert dynamic_knowledge_transfer(moved, target) == value


def test_no_distillation_between_equal_experts_or_with_one():
    for case in ('equal experts', 'M = 1', 'all equal'):
        logits = CASES[case].float()
        assert mutual_distillation(logits) == 0
        assert abs(float(dynamic_knowledge_transfer(logits, torch.zeros(len(logits), dtype=torch.long)))) < 1e-6


def test_a_trained_teacher_gets_no_gradient_and_agreement_costs_nothing():
    teacher = CASES['random'][:, 0].clone().requires_grad_()
    logits = teacher.detach()[:, None].repeat(1, 3, 1).requires_grad_()
    value = knowledge_distillation(logits, teacher)
    value.backward()
    assert value == 0 and teacher.grad is None and logits.grad.abs().max() < 1e-15


def test_teacher_passes_gradients_unless_detached():
    logits = CASES['random'].clone().requires_grad_()
    target = torch.arange(16) % 7
    through, = torch.autograd.grad(dynamic_knowledge_transfer(logits, target), logits)
    detached, = torch.autograd.grad(dynamic_knowledge_transfer(logits, target, detach_teacher=True), logits)
    assert not torch.allclose(through, detached)
    # Without gradients through the teacher, an expert's gradient is its probabilities minus the teacher's: sums to 0.
    assert torch.allclose(detached.sum(-1), torch.zeros(16, 3).double(), atol=1e-12)


def test_representation_loss_is_the_weighted_sum():
    logits, target = CASES['random'], torch.arange(16) % 7
    loss = representation_loss(logits, target)
    assert loss.ce == expert_cross_entropy(logits, target)
    assert loss.nt == dynamic_knowledge_transfer(logits, target)
    assert loss.mu == mutual_distillation(logits)
    assert torch.isclose(loss.total, loss.ce + 0.1 * loss.nt + 0.01 * loss.mu)
    weighted = representation_loss(logits, target, alpha=2, beta=3)
    assert torch.isclose(weighted.total, loss.ce + 2 * loss.nt + 3 * loss.mu)


def test_what_the_losses_are_in_special_cases():
    logits, target, counts = CASES['random'], torch.arange(16) % 7, torch.tensor(COUNTS)
    plain = expert_cross_entropy(logits, target)
    assert torch.isclose(logit_adjusted(logits, target, counts), balanced_softmax(logits, target, counts))
    assert torch.isclose(logit_adjusted(logits, target, counts, tau=0.), plain)
    assert torch.isclose(focal(logits, target, gamma=0.), plain)
    assert torch.isclose(ldam(logits, target, counts, max_margin=0.), plain)
    assert torch.isclose(
        ldam(logits, target, counts), ldam(logits, target, counts, class_weights=torch.full((7,), 2.)))


def test_soft_targets():
    logits, target = CASES['random'], torch.arange(16) % 7
    one_hot = torch.nn.functional.one_hot(target, 7)
    assert torch.isclose(expert_cross_entropy(logits, one_hot), expert_cross_entropy(logits, target))
    assert torch.isclose(balanced(logits, one_hot), balanced(logits, target))
    assert torch.isclose(
        representation_loss(logits, one_hot, alpha=0).total, representation_loss(logits, target, alpha=0).total)
    assert torch.isclose(focal(logits, one_hot), focal(logits, target))
    for loss in (representation_loss, margins):
        with pytest.raises(ValueError, match=r'class indices of shape \(16,\), got \(16, 7\)'):
            loss(logits, one_hot)


def test_one_class_is_refused():
    with pytest.raises(ValueError, match='at least 2 classes'):
        dynamic_knowledge_transfer(torch.zeros(2, 3, 1), torch.zeros(2, dtype=torch.long))
