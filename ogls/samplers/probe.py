"""Proving which weights an engine has: what the policy said greedily when it was trained, compared with the engine."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import takewhile
from typing import Any

from ogls.config import SamplingConfig
from ogls.models.policy import Policy
from ogls.records import Completion, Request
from ogls.samplers.choose import create_sampler

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.05}  # nats a token between two implementations
_TOKENS = 16


def greedy_sampling(sampling: SamplingConfig) -> SamplingConfig:
    """The sampling of a probe: greedy, without cuts, a few tokens."""
    tokens = min(_TOKENS, sampling.max_tokens)
    return sampling.model_copy(
        update={"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "max_tokens": tokens}
    )


def take_probe(policy: Policy, request: Request, sampling: SamplingConfig) -> dict[str, Any]:
    """The greedy completion of one request, as it is stored with the adapter: `problem_id`, `token_ids`, `logprobs`."""
    (completion,) = create_sampler("transformers", policy).sample([request], greedy_sampling(sampling))
    return {
        "problem_id": request.problem_id,
        "token_ids": completion.token_ids,
        "logprobs": completion.logprobs,
    }


def compare_probe(probe: Mapping[str, Any], completion: Completion) -> tuple[float, int, int]:
    """The largest difference of log-probs (nats) over the greedy tokens that agree, how many agree, and of how many.

    Tokens are compared up to the first at which the two greedy completions differ, which rounding can cause. The
    difference is infinite if none agrees.
    """
    pairs = list(zip(probe["token_ids"], probe["logprobs"], completion.token_ids, completion.logprobs, strict=False))
    equal = list(takewhile(lambda pair: pair[0] == pair[2], pairs))
    return max((abs(a - b) for _, a, _, b in equal), default=float("inf")), len(equal), len(pairs)
