"""Sampling with transformers: results depend on seeds and not on batches; log-probs, stop tokens and truncation."""

from __future__ import annotations

import pytest
import torch

from ogls.config import RolloutConfig, SamplingConfig
from ogls.models.policy import Policy
from ogls.problems.prompts import Prompter
from ogls.records import Problem, Request
from ogls.samplers import draw
from ogls.samplers.choose import create_sampler
from ogls.samplers.requests import build_requests

PROBLEMS = [Problem(f"p{i}", rf"Modulo 10, left to right: ${i}+4\times2-{'1+' * i}3$", "0") for i in range(5)]
SAMPLING = SamplingConfig(max_tokens=40)


@pytest.fixture
def requests(prompter: Prompter) -> list[Request]:
    return build_requests(PROBLEMS, prompter, 6, 0, "test")


def tokens(policy: Policy, requests: list[Request], sampling: SamplingConfig = SAMPLING) -> list[tuple[int, ...]]:
    return [c.token_ids for c in create_sampler("transformers", policy).sample(requests, sampling)]


def test_results_do_not_depend_on_batches_and_order(policy: Policy, requests: list[Request]) -> None:
    whole = tokens(policy, requests)
    assert tokens(policy, requests, SAMPLING.model_copy(update={"batch_size": 4})) == whole
    assert tokens(policy, requests[::-1])[::-1] == whole
    assert tokens(policy, requests[7:8]) == whole[7:8]
    assert len(set(whole)) > 10


def test_seeds_depend_on_run_purpose_problem_and_sample(prompter: Prompter) -> None:
    seeds = [
        r.seed
        for run in (0, 1)
        for purpose in (("a", 1), ("a", 2), ("b", 1))
        for r in build_requests(PROBLEMS, prompter, 6, run, *purpose)
    ]
    assert len(set(seeds)) == len(seeds) == 2 * 3 * 30


def test_logprobs_are_those_of_the_model(policy: Policy, requests: list[Request]) -> None:
    """Recorded log-probs are at temperature 1 and before the cuts, whatever the sampling settings."""
    sampling = SamplingConfig(max_tokens=40, temperature=0.7, top_k=20, top_p=0.9)
    completions = create_sampler("transformers", policy).sample(requests[:8], sampling)
    for request, completion in zip(requests, completions, strict=False):
        ids = torch.tensor([[*request.prompt_ids, *completion.token_ids]])
        with torch.no_grad():
            logits = policy.model(input_ids=ids).logits[0, len(request.prompt_ids) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-4, rtol=0)


def test_finish_reasons_and_stop_tokens(policy: Policy, requests: list[Request]) -> None:
    whole = create_sampler("transformers", policy).sample(requests, SAMPLING)
    cut = create_sampler("transformers", policy).sample(requests, SamplingConfig(max_tokens=3))
    stops = set(policy.stop_ids)
    for completion in whole:
        assert (completion.token_ids[-1] in stops) == (completion.finish_reason == "stop")
        assert not stops & set(completion.token_ids[:-1])
        assert "<|im_end|>" not in completion.text
    assert {c.finish_reason for c in cut} <= {"length", "stop"}
    assert all(len(c.token_ids) == 3 for c in cut if c.finish_reason == "length")
    assert [c.token_ids for c in cut] == [c.token_ids[:3] for c in whole]


def test_greedy_sampling_does_not_depend_on_the_seed(policy: Policy, requests: list[Request]) -> None:
    greedy = SamplingConfig(max_tokens=40, temperature=0)
    by_problem = tokens(policy, requests, greedy)
    assert all(len(set(by_problem[i : i + 6])) == 1 for i in range(0, 30, 6))


def test_sampled_tokens_follow_the_distribution() -> None:
    probs = torch.tensor([0.5, 0.0, 0.3, 0.2])
    uniform = (torch.arange(1000) + 0.5).double() / 1000
    logits = probs.log().expand(1000, 4)
    sampled = draw.sample_tokens(logits, uniform, 1.0, 0, 1.0)
    assert torch.bincount(sampled, minlength=4).tolist() == [500, 0, 300, 200]
    assert torch.bincount(draw.sample_tokens(logits, uniform, 1.0, 2, 1.0), minlength=4).tolist() == [625, 0, 375, 0]
    assert torch.bincount(draw.sample_tokens(logits, uniform, 1.0, 0, 0.79), minlength=4).tolist() == [625, 0, 375, 0]
    assert torch.bincount(draw.sample_tokens(logits, uniform, 1.0, 0, 0.5), minlength=4).tolist() == [1000, 0, 0, 0]
    cooler = draw.sample_tokens(logits, uniform, 0.5, 0, 1.0)
    assert torch.bincount(cooler, minlength=4)[0].item() == pytest.approx(1000 * 0.25 / 0.38, abs=1)


@pytest.mark.parametrize(
    "cuts", [(0, 1.0, 0.0), (50, 1.0, 0.0), (0, 0.9, 0.0), (50, 0.9, 0.0), (0, 1.0, 0.01), (0, 0.9, 0.01)]
)
@pytest.mark.parametrize("scale", [3.0, 0.01])  # almost uniform: top_p keeps more tokens than are looked at first
def test_a_wide_vocabulary_gives_the_tokens_of_a_narrow_one(
    cuts: tuple[int, float, float], scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(64, 5 * draw.WIDE + 7, generator=random)
    uniform = torch.rand(64, dtype=torch.float64, generator=random)
    found = draw.sample_tokens(logits, uniform, 0.8, *cuts)
    monkeypatch.setattr(draw, "WIDE", logits.shape[1])
    assert torch.equal(found, draw.sample_tokens(logits, uniform, 0.8, *cuts))


def test_equal_logits_on_both_sides_of_top_k_are_all_kept() -> None:
    logits = torch.zeros(100, draw.WIDE + 1)
    uniform = (torch.arange(100) + 0.5).double() / 100
    assert len(set(draw.sample_tokens(logits, uniform, 1.0, 1, 1.0).tolist())) == 100


def test_an_unknown_engine_is_refused(policy: Policy) -> None:
    with pytest.raises(ValueError, match="no engine magic"):
        create_sampler("magic", policy)
    with pytest.raises(ValueError, match="engine"):
        RolloutConfig(engine="magic")
