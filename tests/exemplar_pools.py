"""Pools put together from the rollouts of a group, and the direction between them, for `benchmarks/exemplars.py`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ogls.models.head import head_logits
from ogls.records import Problem, Rollout

MOST = (1, 2, 4, 8)
FINER = (  # of the sampled token, for the second table; the first that matches
    ("number of the problem", None),
    ("other digit", r"^\s*\d+$"),
    ("operator", r"^\s*[-+*/=%$<>().]+\s*$"),
    (
        "function word",
        r"(?i)^\s*(a|an|the|of|to|in|on|at|for|from|by|with|and|or|so|then|if|as|than|is|are|was|were|has|have|had|he|"
        r"she|it|they|his|her|their|this|that|there|each|per|will|would|do|does|did|be|which|who|how)$",
    ),
    (
        "reflection",
        r"(?i)^\s*(wait|but|however|actually|mistake|wrong|incorrect|error|instead|correct|check|should|not|no)$",
    ),
    ("word of the problem", None),
    ("other", r""),
)


@dataclass(frozen=True)
class Variant:
    """A way to put pools together: their size, the choice of exemplars, their text, and what is done to the logits."""

    exemplars: int
    name: str
    choose: str = "hash"
    text: str = "whole"
    shrink: str = ""
    same: bool = False  # both pools of the rollout's own outcome
    alone: str = ""  # the target is this pool (correct or reference), not the base and the direction


def variants(fewest: int) -> list[Variant]:
    """The rows of the first table."""
    sizes = [m for m in MOST if m <= max(fewest, 2) or (m == MOST[-1] and fewest >= 4)]
    found = [Variant(m, "hash") for m in sizes]
    found += [Variant(m, "nearest", choose="nearest") for m in sizes if m <= 2]
    found += [Variant(m, "steps", text="steps") for m in sizes if m <= 4]
    found += [Variant(m, "shrunk", shrink="token") for m in sizes if m > 1]
    found += [Variant(m, "shrunk by token", shrink="logit") for m in sizes if m > 1]
    found += [Variant(m, "same outcome", same=True) for m in sizes if m <= max(1, fewest // 2)]
    found += [Variant(m, "correct pool alone", alone="correct") for m in sizes]
    return [*found, Variant(1, "reference pool alone", alone="reference")]


def steps_of(text: str) -> str:
    r"""The calculations of a solution, a line each, and its answer: `53 + 38 = 91` and `A: 91` or `\boxed{91}`."""
    found = re.findall(r"[\d.]+(?:\s*[-+*/x]\s*[\d.]+)+\s*=\s*[\d.]+", text.replace("$", "").replace(",", ""))
    answer = re.findall(r"^A: .*$|\\boxed\{[^}]*\}", text, re.MULTILINE)
    return "\n".join([*dict.fromkeys(found), *answer[-1:]])


def pair_of_pools(
    variant: Variant, pools: Mapping[str, Sequence[Any]], rollout: Rollout, fewest: int
) -> tuple[Sequence[Any], Sequence[Any]] | None:
    """The exemplars of both pools, or None if the rollout has too few for this variant."""
    m = variant.exemplars
    if variant.same:
        own = pools["correct" if rollout.outcome == "correct" else "incorrect"]
        other = pools["incorrect" if rollout.outcome == "correct" else "correct"]
        one = own if len(own) >= 2 * m else other
        return (one[:m], one[m : 2 * m]) if len(one) >= 2 * m else None
    both = pools["correct"][:m], pools["incorrect"][:m]
    least = min(map(len, both))
    if (variant.shrink and least < 2) or (m > max(fewest, 2) and least < m):
        return None
    return both


def direction(variant: Variant, base: Any, correct: Sequence[Any], failed: Sequence[Any], head: Any) -> Any:
    """The direction as logits [T, V], after shrinking."""
    difference = torch.stack(correct).mean(0) - torch.stack(failed).mean(0)
    logits = head_logits(difference, head)
    if not variant.shrink:
        return logits
    noise = torch.zeros_like(logits)  # variance of the difference of the means
    for pool in (correct, failed):
        if len(pool) > 1:
            each = torch.stack([_centred(head_logits(s, head), base) for s in pool])
            noise += each.var(0) / len(pool)
    signal = _centred(logits, base) ** 2
    if variant.shrink == "token":
        weight = base.exp()
        noise, signal = ((weight * x).sum(-1, keepdim=True) for x in (noise, signal))
    return _centred(logits, base) * (1 - noise / signal.clamp(min=1e-12)).clamp(min=0)


def _centred(logits: Any, base: Any) -> Any:
    """Logits [.., T, V] minus their mean under the base."""
    return logits - (base.exp() * logits).sum(-1, keepdim=True)


def gains(moved: Any, correct: set[int], failed: set[int]) -> dict[str, Any]:
    """The probability that tokens gain [T], by where they stand."""
    gained = moved.clamp(min=0)
    parts = {"gain_correct": correct - failed, "gain_failed": failed - correct, "gain_both": correct & failed}
    gains = {name: gained[:, sorted(ids)].sum(-1) for name, ids in parts.items()}
    return {**gains, "gain_neither": (gained.sum(-1) - sum(gains.values())).clamp(min=0)}


def finer_classes(problem: Problem, texts: Sequence[str]) -> np.ndarray:
    """The number of the class of FINER of every token of a rollout, from the text of each."""
    words = set(re.findall(r"\w+", problem.problem.lower()))
    numbers = re.findall(r"\d+", problem.problem)
    digits = {d for n in numbers for d in (n, *n)}
    names = [name for name, _ in FINER]

    def number_of(text: str) -> int:
        bare = text.strip().lower()
        if bare.isdigit() and bare in digits:
            return names.index("number of the problem")
        for index, (name, pattern) in enumerate(FINER):
            if (name == "word of the problem" and bare in words) or (pattern is not None and re.search(pattern, text)):
                return index
        raise AssertionError

    return np.array([number_of(text) for text in texts])
