"""The probe tells the weights of a round from those of the round before, although an engine rounds differently."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ogls.models.policy import Policy
from ogls.records import Completion
from ogls.samplers.choose import create_sampler
from ogls.samplers.probe import ProbeResult, compare_probe, probe_sampling, take_probe
from ogls.samplers.requests import build_requests
from ogls.stages.run import Run


def policy_in(run: Run, dtype: str) -> Policy:
    """The model of a run in another data type."""
    return Policy(run.config.model.model_copy(update={"dtype": dtype}), run.config.adapter, run.seed("adapter"))


@pytest.fixture(scope="module")
def probed(finished: Run) -> tuple[Run, list[Any], list[dict[str, Any]]]:
    """The probe of round 2, as a trainer in bfloat16 takes it."""
    policy = policy_in(finished, "bfloat16")
    requests = build_requests(finished.problems("train")[:8], finished.prompter(policy.tokenizer), 1, 0, "probe")
    policy.use_adapter(finished.load_adapter(2))
    return finished, requests, take_probe(policy, requests, finished.config.rollout, [finished.load_adapter(1)])


@pytest.mark.parametrize(("round_", "right"), [(2, True), (1, False), (None, False)])
def test_an_engine_that_rounds_differently_is_told_by_its_weights(
    probed: tuple, round_: int | None, right: bool
) -> None:
    """The engine computes in fp32. With the weights of the round before, its log-probs are within the tolerance."""
    run, requests, probe = probed
    engine = policy_in(run, "float32")
    engine.use_adapter(run.load_adapter(round_) if round_ else None)
    result = compare_probe(
        probe, create_sampler("transformers", engine).sample(requests, probe_sampling(run.config.rollout))
    )
    assert result.error < 0.25
    assert (result.mismatch("bfloat16") == "") is right
    assert result.position == pytest.approx(1.0 if right else 0.0, abs=0.5) or round_ is None


def test_a_tie_at_the_first_token_of_one_answer_is_no_mismatch(probed: tuple) -> None:
    _, _, probe = probed
    completions = [Completion(p["token_ids"], p["logprobs"], "", "stop") for p in probe]
    first = completions[0]
    completions[0] = replace(first, token_ids=(first.token_ids[0] + 1, *first.token_ids[1:]))
    result = compare_probe(probe, completions)
    assert result.equal == sum(len(p["token_ids"]) for p in probe[1:])
    assert result.mismatch("float32") == ""
    other = [replace(c, token_ids=(0,), logprobs=(-1.0,)) for c in completions]
    assert "no answer begins with the same token" in compare_probe(probe, other).mismatch("bfloat16")


def test_a_round_that_changed_nothing_passes() -> None:
    """The weights before and after it are equal, so nothing speaks against the engine."""
    logprobs = (-0.1, -0.2, -0.3)
    probe = [{"problem_id": "p", "token_ids": (1, 2, 3), "logprobs": logprobs, "before": logprobs}]
    result = compare_probe(probe, [Completion((1, 2, 3), (-0.1001, -0.2, -0.3), "", "stop")])
    assert isinstance(result, ProbeResult)
    assert result.mismatch("float32") == ""
