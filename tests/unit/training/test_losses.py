"""Losses compared with their definitions and with values computed by hand.

The head is the identity, so states are logits.
"""

from __future__ import annotations

import math

import pytest
import torch

from ogls.training.losses import LossInputs, PolicyInputs, distillation, divergence, group_advantages, policy_gradient

P = [0.5, 0.3, 0.2]
Q = [0.2, 0.3, 0.5]


def log_row(values: list[float]) -> torch.Tensor:
    return torch.tensor([values]).log()


def test_forward_and_reverse_by_hand() -> None:
    forward = sum(p * math.log(p / q) for p, q in zip(P, Q, strict=True))
    reverse = sum(q * math.log(q / p) for p, q in zip(P, Q, strict=True))
    assert divergence("forward_kl", log_row(P), log_row(Q)).item() == pytest.approx(forward, rel=1e-5)
    assert divergence("reverse_kl", log_row(P), log_row(Q)).item() == pytest.approx(reverse, rel=1e-5)
    assert forward == pytest.approx(0.27489, abs=1e-5)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_generalised_jsd_by_definition(beta: float) -> None:
    mixture = [beta * p + (1 - beta) * q for p, q in zip(P, Q, strict=True)]
    expected = beta * sum(p * math.log(p / m) for p, m in zip(P, mixture, strict=True))
    expected += (1 - beta) * sum(q * math.log(q / m) for q, m in zip(Q, mixture, strict=True))
    assert divergence("jsd", log_row(P), log_row(Q), beta).item() == pytest.approx(expected, rel=1e-5)


def test_an_unknown_divergence_raises_an_error() -> None:
    with pytest.raises(ValueError, match="unknown divergence tv: use forward_kl, reverse_kl or jsd"):
        divergence("tv", log_row(P), log_row(Q))


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_loss_and_gradient_are_zero_if_student_and_target_are_equal(kind: str) -> None:
    logits = torch.randn(5, 20, requires_grad=True)
    target = logits.detach().log_softmax(-1)
    loss = divergence(kind, target, logits.log_softmax(-1)).sum()
    loss.backward()
    assert loss.abs().item() < 1e-6
    assert logits.grad.abs().max().item() < 1e-6


def test_stored_targets_and_the_full_vocabulary_agree_at_k_equal_v() -> None:
    logits, target = torch.randn(6, 12), torch.randn(6, 12)
    top = target.log_softmax(-1).topk(12)
    stored = LossInputs(logits, torch.eye(12), top.indices, top.values.half().float(), torch.zeros(6))
    full = LossInputs(logits, torch.eye(12), None, target, None)
    for kind in ("forward_kl", "reverse_kl", "jsd"):
        got, expected = distillation(stored, kind), distillation(full, kind)
        torch.testing.assert_close(got, expected, atol=2e-3, rtol=1e-3)  # log-probs are stored as fp16


# --- the losses of related methods, computed naively -----------------------------------------------


def naive_bins(logits: torch.Tensor, ids: list[int]) -> list[float]:
    """The probabilities of `ids` and of all other tokens together, for one token."""
    p = logits.softmax(-1).tolist()
    return [*(p[i] for i in ids), 1 - sum(p[i] for i in ids)]


def test_opsd_is_the_generalised_jsd_to_the_teacher_with_the_solution() -> None:
    """arXiv 2601.18734: the mean over tokens of JSD_beta(teacher(. | x, solution, y<t), student(. | x, y<t)).

    The divergence is over the full vocabulary.
    """
    teacher, student, beta = torch.randn(6, 15), torch.randn(6, 15), 0.3
    total = 0.0
    for t in range(6):
        p, q = teacher[t].softmax(-1).tolist(), student[t].softmax(-1).tolist()
        m = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]
        total += beta * sum(a * math.log(a / c) for a, c in zip(p, m, strict=True))
        total += (1 - beta) * sum(b * math.log(b / c) for b, c in zip(q, m, strict=True))
    out = distillation(LossInputs(student, torch.eye(15), None, teacher, None), "jsd", beta)
    assert out.mean().item() == pytest.approx(total / 6, rel=1e-4)


def test_sdpo_is_top_k_with_a_tail_bucket() -> None:
    """arXiv 2601.20802: the divergence over the top-K tokens of the teacher and one bucket for all other tokens."""
    teacher, student = torch.randn(6, 15), torch.randn(6, 15)
    top = teacher.log_softmax(-1).topk(4)
    total = 0.0
    for t in range(6):
        ids = top.indices[t].tolist()
        p, q = naive_bins(teacher[t], ids), naive_bins(student[t], ids)
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    tail = 1 - top.values.exp().sum(-1)
    out = distillation(LossInputs(student, torch.eye(15), top.indices, top.values, tail), "forward_kl")
    assert out.mean().item() == pytest.approx(total / 6, rel=1e-4)


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.1, 0.28)])
def test_grpo_is_the_clipped_surrogate(low: float, high: float) -> None:
    """arXiv 2402.03300, eq. 3, without its KL term; a mean over tokens and two clips as in arXiv 2503.14476."""
    generator = torch.Generator().manual_seed(0)
    logits, ids = torch.randn(40, 9, generator=generator), torch.randint(0, 9, (40,), generator=generator)
    old = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0] + 0.4 * torch.randn(40, generator=generator)
    advantages = torch.randn(40, generator=generator)
    got = policy_gradient(PolicyInputs(logits, torch.eye(9), ids, old, advantages), low, high)
    clipped = 0
    for t in range(40):
        ratio = logits[t].softmax(-1)[ids[t]].item() / math.exp(old[t].item())
        a = advantages[t].item()
        expected = min(ratio * a, max(min(ratio, 1 + high), 1 - low) * a)
        clipped += not 1 - low <= ratio <= 1 + high
        assert -got[t].item() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert 5 < clipped < 35


def test_group_advantages() -> None:
    assert group_advantages([1, 0, 0, 0], normalise_std=False) == [0.75, -0.25, -0.25, -0.25]
    std = math.sqrt(0.75 * 0.25)
    assert group_advantages([1, 0, 0, 0]) == pytest.approx([0.75 / std, *[-0.25 / std] * 3])
    assert group_advantages([1, 1]) == [0, 0]


def test_the_first_step_of_grpo_is_the_plain_policy_gradient() -> None:
    """At ratio 1 the gradient is -A grad log pi."""
    logits = torch.randn(5, 7, requires_grad=True)
    ids, advantages = torch.tensor([0, 1, 2, 3, 4]), torch.tensor([1.0, -1.0, 0.5, 0.0, 2.0])
    old = logits.detach().log_softmax(-1)[range(5), ids]
    loss = policy_gradient(PolicyInputs(logits, torch.eye(7), ids, old, advantages), 0.2, 0.2).sum()
    (got,) = torch.autograd.grad(loss, logits)
    plain = torch.nn.functional.cross_entropy(logits, ids, reduction="none")
    (expected,) = torch.autograd.grad((plain * advantages).sum(), logits)
    torch.testing.assert_close(got, expected)
