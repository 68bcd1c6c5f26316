"""The numbers of one rollout for the token view: each distribution, and the target of every recipe on a grid.

A page cannot contain [T, V]. For each token it contains the log-probs of every distribution on the K tokens that are
likely under any of them, and for every recipe and strength the log-normaliser of its target over the vocabulary. From
these the page computes the log-probs of every target exactly, for any V:

    log p_target(v) = sum_d w_d log p_d(v) / temperature - log_z,    log_z = logsumexp over V of the first term

because sum_d w_d z_d and sum_d w_d log p_d differ by a constant a token, which does not change a softmax.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ogls.config import SteerConfig
from ogls.distillation.steering import centred_norm, entropy
from ogls.distillation.sweep import RECIPES, recipe_grid

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


STRENGTHS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
_TOP, _TOP_TARGET = 6, 3  # most likely tokens of a distribution, and of a target, that a page shows
_DIGITS = 4  # decimals of a log-prob; the error is at most 5e-5 nats


@dataclass(frozen=True)
class ShownRecipe:
    """A target as weights over distributions: a recipe at a strength, or the trained policy."""

    name: str
    recipe: str
    strength: float | None
    weights: Mapping[str, float]
    temperature: float = 1.0


@dataclass(frozen=True)
class TokenNumbers:
    """The numbers of a rollout for the page: lists over T tokens, in nats."""

    ids: list[list[int]]  # [T, K_t]: the tokens that the page can show, the sampled token first
    logprobs: dict[str, list[list[float]]]  # by distribution [T, K_t]
    entropy: dict[str, list[float]]
    points: dict[str, dict[str, list[float]]]  # by recipe: log_z, kl (target || base), entropy of the target
    direction_norm: list[float] | None


def shown_recipes(steer: SteerConfig, pools: set[Any], trained: bool) -> list[ShownRecipe]:
    """The target of the run, a grid of recipes that the cached pools allow, and the trained policy.

    Without cached pools (GRPO and fine-tuning) only the trained policy.
    """
    found = []
    if pools:
        own = steer.to_recipe()
        if set(own.pools()) <= pools:
            found.append(ShownRecipe("own", steer.recipe, steer.strength, own.weights(), steer.temperature))
        found += [
            ShownRecipe(p.name, p.recipe, p.strength, p.weights.weights())
            for p in recipe_grid(pools, RECIPES, STRENGTHS)
        ]
    if trained:
        found.append(ShownRecipe("after training", "after training", None, {"trained": 1.0}))
    return found


def compute_token_numbers(
    states: Mapping[str, Float[Tensor, "T D"]],
    token_ids: Int[Tensor, " T"],
    wanted: Sequence[ShownRecipe],
    head: Float[Tensor, "V D"],
    batch_tokens: int = 1024,
) -> TokenNumbers:
    """The numbers of one rollout from the states of each distribution; one of them is named base.

    Recipes that need a missing distribution are left out. Logits [batch_tokens, V] of every distribution are in memory
    at once.
    """
    possible = [p for p in wanted if set(p.weights) <= set(states)]
    shown = TokenNumbers(
        [], {d: [] for d in states}, {d: [] for d in states}, {p.name: _no_numbers() for p in possible}, []
    )
    for start in range(0, len(token_ids), batch_tokens):
        part = slice(start, start + batch_tokens)
        _add(shown, {d: s[part] for d, s in states.items()}, token_ids[part].long(), possible, head)
    if {"correct", "incorrect"} <= set(states):
        return shown
    return TokenNumbers(shown.ids, shown.logprobs, shown.entropy, shown.points, None)


def _no_numbers() -> dict[str, list[float]]:
    return {"log_z": [], "kl": [], "entropy": []}


def _add(
    shown: TokenNumbers, states: Mapping[str, Tensor], token_ids: Tensor, wanted: Sequence[ShownRecipe], head: Tensor
) -> None:
    logprobs = {d: (s.float() @ head.T).log_softmax(-1) for d, s in states.items()}
    likely = [lp.topk(min(_TOP, lp.shape[-1]), -1).indices for lp in logprobs.values()]
    for point in wanted:
        mixed = sum((w * logprobs[d] for d, w in point.weights.items()), start=0 * logprobs["base"])
        mixed = mixed / point.temperature
        log_z = mixed.logsumexp(-1)
        target = mixed - log_z[:, None]
        kl = (target.exp() * (target - logprobs["base"])).sum(-1).clamp(min=0)
        for name, values in (("log_z", log_z), ("kl", kl), ("entropy", entropy(target))):
            shown.points[point.name][name] += _rounded(values)
        likely.append(target.topk(min(_TOP_TARGET, target.shape[-1]), -1).indices)
    if {"correct", "incorrect"} <= set(states):
        shown.direction_norm.extend(_rounded(centred_norm(logprobs["correct"] - logprobs["incorrect"])))  # type: ignore[union-attr]
    for name, lp in logprobs.items():
        shown.entropy[name] += _rounded(entropy(lp))
    candidates = _candidates(likely, token_ids)
    for t, ids in enumerate(candidates):
        shown.ids.append(ids)
        for name, lp in logprobs.items():
            shown.logprobs[name].append(_rounded(lp[t, ids]))


def _candidates(likely: Sequence[Tensor], token_ids: Tensor) -> list[list[int]]:
    """For every token the ids that the page can show: the sampled token, then the likely tokens, without duplicates."""
    import torch

    together = torch.cat([token_ids[:, None], *likely], -1).tolist()
    return [list(dict.fromkeys(row)) for row in together]


def _rounded(values: Tensor) -> list[float]:
    return [round(v, _DIGITS) for v in values.tolist()]


def token_texts(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """The text of each token, including control tokens; concatenated they give the text of the rollout.

    A character that spans several tokens is assigned to the last of them.
    """
    found, start, before = [], 0, ""
    for end in range(1, len(token_ids) + 1):
        text = tokenizer.decode(token_ids[start:end], skip_special_tokens=False)
        if text.endswith("\ufffd") and end < len(token_ids):
            found.append("")
            continue
        found.append(text[len(before) :])
        start, before = end - 1, tokenizer.decode(token_ids[end - 1 : end], skip_special_tokens=False)
        if before.endswith("\ufffd"):  # an incomplete character: decode from the next token on
            start, before = end, ""
    return found
