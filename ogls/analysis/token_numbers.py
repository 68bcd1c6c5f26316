"""The numbers of one rollout for the token view: each distribution, and the target of every recipe on a grid.

A page cannot contain [T, V]. For each token it contains the log-probs of every distribution on the K tokens that are
likely under any of them, and for every recipe and strength the log-normaliser of its target over the vocabulary. From
these, the page computes the log-probs of every target exactly, for any V:

    log p_target(v) = sum_d w_d log p_d(v) / temperature - log_z,    log_z = logsumexp over V of the first term

because sum_d w_d z_d and sum_d w_d log p_d differ by a constant per token, which does not change a softmax.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ogls.config import SteerConfig
from ogls.distillation.steering import centred_norm, entropy
from ogls.distillation.sweep import RECIPES, STRENGTHS, recipe_grid
from ogls.models.head import head_logits

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


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
    """Return the target of the run, a grid of recipes that the cached pools allow, and the trained policy if `trained`.

    Without cached pools (GRPO and fine-tuning), only the trained policy is possible.
    """
    recipes = []
    if pools:
        own = steer.to_recipe()
        if set(own.pools()) <= pools:
            recipes.append(ShownRecipe("own", steer.recipe, steer.strength, own.weights(), steer.temperature))
        recipes += [
            ShownRecipe(p.name, p.recipe, p.strength, p.weights.weights())
            for p in recipe_grid(pools, RECIPES, STRENGTHS)
        ]
    if trained:
        recipes.append(ShownRecipe("after training", "after training", None, {"trained": 1.0}))
    return recipes


def compute_token_numbers(
    states: Mapping[str, Float[Tensor, "T D"]],
    token_ids: Int[Tensor, " T"],
    recipes: Sequence[ShownRecipe],
    head: Float[Tensor, "V D"],
    batch_tokens: int = 1024,
) -> TokenNumbers:
    """Return the numbers of one rollout from the final hidden states of each distribution; `base` is required.

    Recipes that need a missing distribution are left out. `direction_norm` is None without the distributions correct
    and incorrect. Logits [batch_tokens, V] of every distribution are in memory at once.
    """
    possible = [r for r in recipes if set(r.weights) <= set(states)]
    numbers = TokenNumbers(
        [], {d: [] for d in states}, {d: [] for d in states}, {r.name: _empty_lists() for r in possible}, []
    )
    for start in range(0, len(token_ids), batch_tokens):
        part = slice(start, start + batch_tokens)
        _append_numbers(numbers, {d: s[part] for d, s in states.items()}, token_ids[part].long(), possible, head)
    if {"correct", "incorrect"} <= set(states):
        return numbers
    return TokenNumbers(numbers.ids, numbers.logprobs, numbers.entropy, numbers.points, None)


def _empty_lists() -> dict[str, list[float]]:
    return {"log_z": [], "kl": [], "entropy": []}


def _append_numbers(
    numbers: TokenNumbers,
    states: Mapping[str, Tensor],
    token_ids: Tensor,
    recipes: Sequence[ShownRecipe],
    head: Tensor,
) -> None:
    logprobs = {d: head_logits(s, head).log_softmax(-1) for d, s in states.items()}
    top_ids = [lp.topk(min(_TOP, lp.shape[-1]), -1).indices for lp in logprobs.values()]
    for recipe in recipes:
        mixed = sum((w * logprobs[d] for d, w in recipe.weights.items()), start=0 * logprobs["base"])
        mixed = mixed / recipe.temperature
        log_z = mixed.logsumexp(-1)
        target = mixed - log_z[:, None]
        kl = (target.exp() * (target - logprobs["base"])).sum(-1).clamp(min=0)
        for name, values in (("log_z", log_z), ("kl", kl), ("entropy", entropy(target))):
            numbers.points[recipe.name][name] += _rounded(values)
        top_ids.append(target.topk(min(_TOP_TARGET, target.shape[-1]), -1).indices)
    if {"correct", "incorrect"} <= set(states):
        numbers.direction_norm.extend(_rounded(centred_norm(logprobs["correct"] - logprobs["incorrect"])))  # type: ignore[union-attr]
    for name, lp in logprobs.items():
        numbers.entropy[name] += _rounded(entropy(lp))
    candidates = _candidates(top_ids, token_ids)
    for t, ids in enumerate(candidates):
        numbers.ids.append(ids)
        for name, lp in logprobs.items():
            numbers.logprobs[name].append(_rounded(lp[t, ids]))


def _candidates(top_ids: Sequence[Tensor], token_ids: Tensor) -> list[list[int]]:
    """Return the ids that the page can show for each token: the sampled token, then `top_ids`, without duplicates."""
    import torch

    rows = torch.cat([token_ids[:, None], *top_ids], -1).tolist()
    return [list(dict.fromkeys(row)) for row in rows]


def _rounded(values: Tensor) -> list[float]:
    return [round(v, _DIGITS) for v in values.tolist()]


def token_texts(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """Return the text of each token, including control tokens; joined, the texts are the text of the rollout.

    A character that spans several tokens belongs to the last of them.
    """
    texts, start, before = [], 0, ""
    for end in range(1, len(token_ids) + 1):
        text = tokenizer.decode(token_ids[start:end], skip_special_tokens=False)
        if text.endswith("\ufffd") and end < len(token_ids):
            texts.append("")
            continue
        texts.append(text[len(before) :])
        start, before = end - 1, tokenizer.decode(token_ids[end - 1 : end], skip_special_tokens=False)
        if before.endswith("\ufffd"):  # an incomplete character: decode from the next token on
            start, before = end, ""
    return texts
