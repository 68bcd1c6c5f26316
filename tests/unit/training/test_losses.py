"""Losses compared with their definitions and with values computed by hand.

The head is the identity, so states are logits.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from ogls.config import TrainConfig
from ogls.training.choose import find_loss
from ogls.training.contract import LossInputs, LossOutput
from ogls.training.losses import divergence, group_advantages

P = [0.5, 0.3, 0.2]
Q = [0.2, 0.3, 0.5]


def compute(inputs: LossInputs, **settings: Any) -> LossOutput:
    """The loss that the settings choose, through the registry, as the trainer calls it."""
    config = TrainConfig(**settings)
    return find_loss(config)(replace(inputs, settings=config))


def distilled(states: torch.Tensor, *target: torch.Tensor | None) -> LossInputs:
    """Inputs with a target: ids or None, log-probs or logits, tail mass or None."""
    return LossInputs(states, torch.eye(states.shape[-1]), torch.zeros(len(states), dtype=torch.long), *target)


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
    stored = distilled(logits, top.indices, top.values.half().float(), torch.zeros(6))
    full = distilled(logits, None, target)
    for kind in ("forward_kl", "reverse_kl", "jsd"):
        got, expected = (compute(inputs, divergence=kind).loss for inputs in (stored, full))
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
    out = compute(distilled(student, None, teacher), divergence="jsd", jsd_beta=beta)
    assert out.loss.mean().item() == pytest.approx(total / 6, rel=1e-4)


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
    out = compute(distilled(student, top.indices, top.values, tail), divergence="forward_kl")
    assert out.loss.mean().item() == pytest.approx(total / 6, rel=1e-4)


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.1, 0.28)])
def test_grpo_is_the_clipped_surrogate(low: float, high: float) -> None:
    """arXiv 2402.03300, eq. 3, without its KL term; a mean over tokens and two clips as in arXiv 2503.14476."""
    generator = torch.Generator().manual_seed(0)
    logits, ids = torch.randn(40, 9, generator=generator), torch.randint(0, 9, (40,), generator=generator)
    old = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0] + 0.4 * torch.randn(40, generator=generator)
    advantages = torch.randn(40, generator=generator)
    inputs = LossInputs(logits, torch.eye(9), ids, old_logprobs=old, advantages=advantages)
    out = compute(inputs, objective="grpo", grpo={"clip_low": low, "clip_high": high})
    clipped = without_gradient = 0
    for t in range(40):
        ratio = logits[t].softmax(-1)[ids[t]].item() / math.exp(old[t].item())
        a = advantages[t].item()
        expected = min(ratio * a, max(min(ratio, 1 + high), 1 - low) * a)
        clipped += not 1 - low <= ratio <= 1 + high
        is_clipped = (a > 0 and ratio > 1 + high) or (a < 0 and ratio < 1 - low)
        without_gradient += is_clipped
        assert -out.loss[t].item() == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert out.metrics["ratio"][t].item() == pytest.approx(ratio, rel=1e-4)
        assert out.metrics["clipped"][t].item() == is_clipped
    assert 5 < clipped < 35
    assert 0 < without_gradient < clipped


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
    inputs = LossInputs(logits, torch.eye(7), ids, old_logprobs=old, advantages=advantages)
    loss = compute(inputs, objective="grpo").loss.sum()
    (got,) = torch.autograd.grad(loss, logits)
    plain = torch.nn.functional.cross_entropy(logits, ids, reduction="none")
    (expected,) = torch.autograd.grad((plain * advantages).sum(), logits)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("objective", ["rft", "sft"])
def test_rft_and_sft_are_the_nll(objective: str) -> None:
    logits, ids = torch.randn(5, 7), torch.tensor([0, 1, 2, 3, 6])
    got = compute(LossInputs(logits, torch.eye(7), ids), objective=objective)
    expected = [-math.log(logits[t].softmax(-1)[ids[t]].item()) for t in range(5)]
    assert got.loss.tolist() == pytest.approx(expected, rel=1e-4)


# --- clips, apart from the divergence --------------------------------------------------------------


def naive_terms(kind: str, p: list[float], q: list[float], beta: float) -> list[float]:
    """The terms of a divergence, one for each bin."""
    mixture = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]
    return {
        "forward_kl": [a * math.log(a / b) for a, b in zip(p, q, strict=True)],
        "reverse_kl": [b * math.log(b / a) for a, b in zip(p, q, strict=True)],
        "jsd": [
            beta * a * math.log(a / m) + (1 - beta) * b * math.log(b / m) for a, b, m in zip(p, q, mixture, strict=True)
        ],
    }[kind]


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_the_pointwise_clip_limits_every_term_of_any_divergence(kind: str) -> None:
    """The clip of OPSD (arXiv 2601.18734) by its definition: each term of the sum over the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(6, 15, generator=generator), torch.randn(6, 15, generator=generator)
    clip, clipped = 0.01, 0
    out = compute(distilled(student, None, teacher), divergence=kind, jsd_beta=0.3, pointwise_clip=clip)
    for t in range(6):
        terms = naive_terms(kind, teacher[t].softmax(-1).tolist(), student[t].softmax(-1).tolist(), 0.3)
        assert out.loss[t].item() == pytest.approx(sum(min(term, clip) for term in terms), rel=1e-3, abs=1e-6)
        share = sum(term > clip for term in terms) / 15
        assert out.metrics["clipped_terms"][t].item() == pytest.approx(share)
        clipped += share > 0
    assert clipped == 6


def test_agreement_is_the_share_of_tokens_with_the_same_most_probable_bin() -> None:
    student, teacher = torch.eye(4)[[0, 1, 2]], torch.eye(4)[[0, 1, 3]]
    assert compute(distilled(student, None, teacher)).metrics["agreement"].tolist() == [1, 1, 0]
