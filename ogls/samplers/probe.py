"""Checking which weights an engine uses, by a probe: greedy completions of the policy that a round trained.

An engine rounds differently from the trainer: in bfloat16 the log-prob of a token may differ by more than a round of
training changes it. So a tolerance alone does not notice the weights of the previous round. The probe therefore has the
log-probs of its tokens under the new weights (n) and under those that the round started from (o). With e, the engine's
log-probs, the least-squares position between the two is

    s = sum (e - o) (n - o) / sum (n - o)^2        1 for the new weights, 0 for the old ones

with the standard error of a regression through the origin. Rounding averages out over the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np

from ogls.config import SamplingConfig
from ogls.models.adapter import Adapter
from ogls.models.continuation import run_continuations
from ogls.models.head import nll
from ogls.models.policy import Policy
from ogls.records import Completion, Request
from ogls.samplers.choose import create_sampler

PROBLEMS = 8
_MAX_TOKENS = 32
_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.05}  # nats, root mean square over tokens
_STANDARD_ERRORS = 3.0


@dataclass(frozen=True)
class ProbeResult:
    """An engine's completions compared with a probe."""

    equal: int  # tokens before the first one that differs, over all completions
    total: int  # tokens of the probe
    error: float  # root mean square difference of the log-probs of equal tokens, in nats; infinite without any
    position: float  # 1: the new weights, 0: those that the round started from; NaN if that cannot be told
    standard_error: float

    def mismatch(self, dtype: str) -> str:
        """Why the engine has other weights than the probe; an empty string if nothing speaks against equal weights."""
        if not self.equal:
            return f"of {self.total} tokens of greedy answers no answer begins with the same token"
        found = f"{self.equal} of {self.total} tokens of greedy answers are equal"
        if self.error > _TOLERANCE[dtype]:
            return f"{found}, with log-probs {self.error:.3g} nats apart"
        old = self.position < 0.5 and 1 - self.position > _STANDARD_ERRORS * self.standard_error
        return f"{found}, with log-probs nearer to those of the weights before the round" if old else ""


def probe_sampling(sampling: SamplingConfig) -> SamplingConfig:
    """The sampling settings of a probe: greedy, without cuts, at most 32 tokens."""
    tokens = min(_MAX_TOKENS, sampling.max_tokens)
    return sampling.model_copy(
        update={"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "max_tokens": tokens}
    )


def take_probe(
    policy: Policy, requests: Sequence[Request], sampling: SamplingConfig, before: Sequence[Adapter | None] = ()
) -> list[dict[str, Any]]:
    """The greedy completions of `requests`, a dict each: `problem_id`, `token_ids`, `logprobs` (nats), `before`.

    `before` are the log-probs of the same tokens under the only adapter in the argument `before` (None: the base
    model); empty without one. The weights of `policy` are the same afterwards.
    """
    completions = create_sampler("transformers", policy).sample(requests, probe_sampling(sampling))
    trained = policy.copy_adapter()
    old: list[list[float]] = [[] for _ in completions]
    for adapter in before:
        policy.use_adapter(adapter)
        old = _logprobs(policy, requests, completions)
        policy.use_adapter(trained)
    return [
        {"problem_id": r.problem_id, "token_ids": c.token_ids, "logprobs": c.logprobs, "before": logprobs}
        for r, c, logprobs in zip(requests, completions, old, strict=True)
    ]


def _logprobs(policy: Policy, requests: Sequence[Request], completions: Sequence[Completion]) -> list[list[float]]:
    """The log-probs of the tokens of each completion under the current weights."""
    import torch

    pairs = [(i, c.token_ids) for i, c in enumerate(completions)]
    with torch.inference_mode():
        states = run_continuations(policy, [r.prompt_ids for r in requests], pairs, 1 << 14)
        ids = (torch.tensor(tokens, device=policy.device) for _, tokens in pairs)
        return [(-nll(s, policy.head, i)).tolist() for s, i in zip(states, ids, strict=True)]


def compare_probe(probe: Sequence[Mapping[str, Any]], completions: Sequence[Completion]) -> ProbeResult:
    """Compare an engine's completions of the probe's problems with the probe.

    Only tokens before the first one that differs are compared, because rounding can change a greedy token.
    """
    new, old, engine = [], [], []
    for entry, completion in zip(probe, completions, strict=True):
        pairs = zip(entry["token_ids"], completion.token_ids, strict=False)
        equal = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        new += list(entry["logprobs"])[:equal]
        old += list(entry.get("before") or [math.nan] * equal)[:equal]
        engine += list(completion.logprobs)[:equal]
    n, o, e = np.array(new), np.array(old), np.array(engine)
    error = float(np.sqrt(np.mean((e - n) ** 2))) if len(n) else math.inf
    position, standard_error = _position(n - o, e - o)
    return ProbeResult(len(n), sum(len(p["token_ids"]) for p in probe), error, position, standard_error)


def _position(change: np.ndarray, found: np.ndarray) -> tuple[float, float]:
    """The slope of `found` over `change` (a regression through the origin), and its standard error."""
    known = ~np.isnan(change)
    change, found = change[known], found[known]
    size = float((change**2).sum())
    if len(change) < 2 or size == 0:
        return math.nan, math.nan
    slope = float((found * change).sum()) / size
    residual = float(((found - slope * change) ** 2).sum()) / (len(change) - 1)
    return slope, math.sqrt(residual / size)
