"""Checking which weights an engine uses, by a probe: a greedy completion of the trained policy.

The probe is stored with the adapter and compared with the greedy completion of the engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import takewhile
from typing import Any

from ogls.config import SamplingConfig
from ogls.models.policy import Policy
from ogls.records import Completion, Request
from ogls.samplers.choose import create_sampler

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.05}  # nats a token between two implementations
_MAX_TOKENS = 16


def greedy_sampling(sampling: SamplingConfig) -> SamplingConfig:
    """The sampling settings of a probe: greedy, without cuts, at most 16 tokens."""
    tokens = min(_MAX_TOKENS, sampling.max_tokens)
    return sampling.model_copy(
        update={"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "max_tokens": tokens}
    )


def take_probe(policy: Policy, request: Request, sampling: SamplingConfig) -> dict[str, Any]:
    """The greedy completion of one request as stored with the adapter: `problem_id`, `token_ids`, `logprobs` (nats)."""
    (completion,) = create_sampler("transformers", policy).sample([request], greedy_sampling(sampling))
    return {
        "problem_id": request.problem_id,
        "token_ids": completion.token_ids,
        "logprobs": completion.logprobs,
    }


def compare_probe(probe: Mapping[str, Any], completion: Completion) -> tuple[float, int, int]:
    """(largest absolute difference of log-probs in nats, number of equal tokens, number of compared tokens).

    The difference is over the tokens before the first one that differs, because rounding can change a greedy token. It
    is infinite if the first token differs.
    """
    pairs = list(zip(probe["token_ids"], probe["logprobs"], completion.token_ids, completion.logprobs, strict=False))
    equal = list(takewhile(lambda pair: pair[0] == pair[2], pairs))
    return max((abs(a - b) for _, a, _, b in equal), default=float("inf")), len(equal), len(pairs)
