"""Losses against their definitions written out, and against values worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from ogls.losses import LossInputs, coarsen, distillation, divergence, nll, target_bins

P = [0.5, 0.3, 0.2]
Q = [0.2, 0.3, 0.5]


def logs(values: list[float]) -> torch.Tensor:
    return torch.tensor([values]).log()


def test_forward_and_reverse_by_hand() -> None:
    forward = sum(p * math.log(p / q) for p, q in zip(P, Q, strict=True))
    reverse = sum(q * math.log(q / p) for p, q in zip(P, Q, strict=True))
    assert divergence("forward_kl", logs(P), logs(Q)).item() == pytest.approx(forward, rel=1e-5)
    assert divergence("reverse_kl", logs(P), logs(Q)).item() == pytest.approx(reverse, rel=1e-5)
    assert forward == pytest.approx(0.27489, abs=1e-5)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_generalised_jsd_by_definition(beta: float) -> None:
    mixture = [beta * p + (1 - beta) * q for p, q in zip(P, Q, strict=True)]
    wanted = beta * sum(p * math.log(p / m) for p, m in zip(P, mixture, strict=True))
    wanted += (1 - beta) * sum(q * math.log(q / m) for q, m in zip(Q, mixture, strict=True))
    assert divergence("jsd", logs(P), logs(Q), beta).item() == pytest.approx(wanted, rel=1e-5)


def test_an_unknown_divergence_is_refused() -> None:
    with pytest.raises(ValueError, match="no divergence tv"):
        divergence("tv", logs(P), logs(Q))


def test_coarsen_puts_the_rest_in_one_bin() -> None:
    logits = torch.tensor([[0.2, 0.1, 0.4, 0.3]]).log() + 7
    bins = coarsen(logits, torch.tensor([[2, 0]])).exp()
    torch.testing.assert_close(bins, torch.tensor([[0.4, 0.2, 0.4]]))


def test_an_underflowed_tail_stays_finite() -> None:
    logits = torch.randn(1, 8, requires_grad=True)
    bins = coarsen(logits, torch.tensor([[0, 1]]))
    target = target_bins(logs([0.6, 0.4]), torch.zeros(1), 3)
    for kind in ("forward_kl", "reverse_kl", "jsd"):
        loss = divergence(kind, target, bins).sum()
        (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
        assert loss.isfinite()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_the_gradient_vanishes_where_student_and_target_agree(kind: str) -> None:
    logits = torch.randn(5, 20, requires_grad=True)
    target = logits.detach().log_softmax(-1)
    loss = divergence(kind, target, logits.log_softmax(-1)).sum()
    loss.backward()
    assert loss.abs().item() < 1e-6
    assert logits.grad.abs().max().item() < 1e-6


def test_nll_is_cross_entropy() -> None:
    logits, ids = torch.randn(4, 9), torch.tensor([0, 3, 8, 8])
    torch.testing.assert_close(nll(logits, ids), torch.nn.functional.cross_entropy(logits, ids, reduction="none"))


def test_stored_targets_and_the_full_vocabulary_agree_at_k_equal_v() -> None:
    logits, target = torch.randn(6, 12), torch.randn(6, 12)
    top = target.log_softmax(-1).topk(12)
    nothing = {"tail_logits": torch.zeros(0, 12), "tail_ids": torch.zeros(0, dtype=torch.long)}
    stored = LossInputs(logits, top.indices, top.values.half().float(), torch.zeros(6), **nothing)
    full = LossInputs(logits, None, target, None, **nothing)
    for kind in ("forward_kl", "reverse_kl", "jsd"):
        got, wanted = distillation(stored, kind).divergence, distillation(full, kind).divergence
        torch.testing.assert_close(got, wanted, atol=2e-3, rtol=1e-3)  # log-probs are stored as fp16
