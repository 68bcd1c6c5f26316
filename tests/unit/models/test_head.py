"""Binned log-probs from one buffer: values and gradients equal a plain implementation, and peak memory is lower."""

from __future__ import annotations

import pytest
import torch
from measured import peak_bytes

from ogls.models.head import bfloat16_terms, binned_logprobs, head_logits, nll
from ogls.training.losses import divergence, target_bins


def reference_logprobs(states: torch.Tensor, head: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log-probs on the support and of the rest in one bin, by plain autograd operations."""
    logprobs = (states.float() @ head.float().T).log_softmax(-1)
    rest = logprobs.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logprobs.gather(-1, ids), rest], -1)


def random_inputs(dtype: torch.dtype = torch.float32, n: int = 7, d: int = 16, v: int = 50, k: int = 5):
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(n, d, generator=generator).to(dtype)
    head = torch.randn(v, d, generator=generator).to(dtype)
    ids = torch.stack([torch.randperm(v, generator=generator)[:k] for _ in range(n)])
    return states, head, ids


def test_the_rest_is_in_one_bin() -> None:
    logits = torch.tensor([[0.2, 0.1, 0.4, 0.3]]).log() + 7
    bins = binned_logprobs(logits, torch.eye(4), torch.tensor([[2, 0]])).exp()
    torch.testing.assert_close(bins, torch.tensor([[0.4, 0.2, 0.4]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_values_and_gradients_equal_autograd(dtype: torch.dtype, kind: str) -> None:
    states, head, ids = random_inputs(dtype)
    target = torch.randn(7, 6, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    results = []
    for function in (binned_logprobs, reference_logprobs):
        leaf = states.clone().requires_grad_()
        loss = divergence(kind, target, function(leaf, head, ids)).sum()
        loss.backward()
        assert leaf.grad.dtype == dtype
        results.append((loss.detach(), leaf.grad.float()))
    torch.testing.assert_close(*(loss for loss, _ in results))
    tolerance = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    torch.testing.assert_close(*(gradient for _, gradient in results), **tolerance)


@pytest.mark.parametrize(("dtype", "count"), [(torch.float16, 2), (torch.float32, 3)])
def test_states_are_a_sum_of_bfloat16_terms(dtype: torch.dtype, count: int) -> None:
    """What lets the tensor cores of a GPU multiply fp32 states: every number of fp16 exactly, of fp32 to 2^-24."""
    if dtype == torch.float16:
        states = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
        states = states[states.isfinite()][None]
    else:
        states = torch.randn(64, 500, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 500)
    terms = bfloat16_terms(states)
    assert len(terms) == count
    assert {t.dtype for t in terms} == {torch.bfloat16}
    error = (sum(t.double() for t in terms) - states.double()).abs()
    assert (error <= states.double().abs() * (0 if dtype == torch.float16 else 2.0**-24)).all()
    head = torch.randn(100, states.shape[1], generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    if dtype == torch.float32:
        exact, product = states.double() @ head.T.double(), sum(t.float() @ head.T.float() for t in terms)
        scale = states.double().abs() @ head.T.double().abs()
        assert ((product - exact).abs() / scale).max() < 2 * ((states @ head.T.float() - exact).abs() / scale).max()


@pytest.mark.parametrize("blocks", [8192, 300])
def test_large_logits_of_a_bfloat16_model_are_not_rounded(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The student's logits, from a head in bfloat16, equal the target's, from the same head in fp32."""
    monkeypatch.setattr("ogls.models.head.HEAD_BLOCK", blocks)
    states, head, ids = random_inputs(torch.bfloat16, n=64, d=128, v=1000)
    states = states * 0.6
    exact = states.float() @ head.float().T
    assert exact.abs().max() > 20
    torch.testing.assert_close(head_logits(states, head), exact, atol=1e-4, rtol=1e-5)
    rounded = (states @ head.T).float()
    kl = divergence("forward_kl", exact.log_softmax(-1), rounded.log_softmax(-1)).mean()
    assert kl > 1e-4  # what rounding to bfloat16 costs
    bins = binned_logprobs(states.requires_grad_(), head, ids)
    bins.sum().backward()
    assert states.grad is not None
    inside = exact.log_softmax(-1).gather(-1, ids)
    torch.testing.assert_close(bins[:, :-1], inside, atol=1e-4, rtol=1e-5)


def test_a_support_of_the_whole_vocabulary_has_no_rest_bin() -> None:
    states, head, ids = random_inputs(v=12, k=12)
    leaf = states.clone().requires_grad_()
    bins = binned_logprobs(leaf, head, ids)
    torch.testing.assert_close(bins, (states @ head.T).log_softmax(-1).gather(1, ids))
    bins[:, 0].sum().backward()
    assert leaf.grad.abs().max() > 0


def test_nll_is_cross_entropy() -> None:
    logits, ids = torch.randn(4, 9), torch.tensor([0, 3, 8, 8])
    expected = torch.nn.functional.cross_entropy(logits, ids, reduction="none")
    torch.testing.assert_close(nll(logits, torch.eye(9), ids), expected)


@pytest.mark.parametrize("scale", [1e-4, 60.0, 1e4])
def test_logits_of_any_size_stay_finite(scale: float) -> None:
    """At 1e4 the exponentials of the rest underflow in fp32 relative to the support, or the other way round."""
    states, head, ids = random_inputs()
    leaf = (states * scale).requires_grad_()
    bins = binned_logprobs(leaf, head, ids)
    torch.testing.assert_close(bins, reference_logprobs(leaf.detach(), head, ids), atol=1e-3 * max(scale, 1), rtol=1e-5)
    bins.sum().backward()
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_an_underflowed_tail_stays_finite(kind: str) -> None:
    logits = torch.randn(1, 8, requires_grad=True)
    target = target_bins(torch.tensor([[0.6, 0.4]]).log(), torch.zeros(1), 3)
    loss = divergence(kind, target, binned_logprobs(logits, torch.eye(8), torch.tensor([[0, 1]]))).sum()
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


def test_peak_memory_is_one_tensor_of_the_vocabularys_width() -> None:
    states, head, ids = random_inputs(n=64, d=32, v=20_000, k=16)
    full = 64 * 20_000 * 4

    def peak(function) -> int:
        leaf = states.clone().requires_grad_()
        return peak_bytes(lambda: function(leaf, head, ids)[:, 0].sum().backward())

    assert peak(binned_logprobs) < 1.2 * full
    assert peak(reference_logprobs) > 3 * full


def test_a_second_gradient_is_refused() -> None:
    states, head, ids = random_inputs()
    bins = binned_logprobs(states.requires_grad_(), head, ids).sum()
    bins.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can be computed only once"):
        bins.backward()
