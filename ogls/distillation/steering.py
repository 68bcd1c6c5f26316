"""Outcome-guided logit steering (OGLS-SD, arXiv 2605.12400), and related methods as weightings of pools.

    direction = z_correct - z_incorrect
    target    = softmax(z_base + lambda * direction) = softmax(sum over pools p of w_p z_p),  sum of w_p = 1

z_p is the mean of the teacher's logits over the contexts of pool p. The head is linear, so sum_p w_p z_p is the head
applied to sum_p w_p h_p, with h_p the averaged hidden states of the pool: one matrix product gives the exact target.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ogls.config import Pool, Recipe
from ogls.distillation.concatenate import concatenate
from ogls.models.head import head_logits

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


@dataclass(frozen=True)
class Target:
    """The steered targets of T tokens on their top-K support.

    All values except `ids` are fp32. Log-probs, KL and entropies are in nats and are normalised over the whole
    vocabulary.
    """

    ids: Int[Tensor, "T K"]  # int64: the most likely tokens of the target, most likely first
    base_logprobs: Float[Tensor, "T K"]  # log-probs of `ids` under the base pool
    target_logprobs: Float[Tensor, "T K"]  # log-probs of `ids` under the target
    tail_mass: Float[Tensor, " T"]  # probability of the target outside `ids`
    direction_norm: Float[Tensor, " T"]  # L2 norm of the centred logits of the direction
    kl: Float[Tensor, " T"]  # KL(target || base)
    token_base_logprob: Float[Tensor, " T"]  # log-prob of the sampled token under the base pool
    token_target_logprob: Float[Tensor, " T"]  # log-prob of the sampled token under the target
    base_entropy: Float[Tensor, " T"]
    target_entropy: Float[Tensor, " T"]


def combine_states(
    states: Mapping[Pool, Float[Tensor, "T D"]], recipe: Recipe, temperature: float = 1.0
) -> Float[Tensor, "T D"]:
    """Return sum_p w_p h_p / temperature [T, D], fp32: the states that the head maps to the logits of the target.

    Raises KeyError with the name of the pool if `states` lacks a pool of `recipe`.
    """
    weighted = [getattr(recipe, pool) * states[pool].float() for pool in recipe.pools()]
    total = weighted[0]
    for term in weighted[1:]:
        total = total + term
    return total / temperature


def steer_tokens(
    states: Mapping[Pool, Float[Tensor, "T D"]],
    token_ids: Int[Tensor, " T"],
    recipe: Recipe,
    head: Float[Tensor, "V D"],
    support: int,
    batch_tokens: int = 1024,
    temperature: float = 1.0,
    classes: Int[Tensor, " V"] | None = None,
) -> Target:
    """Compute the target over the whole vocabulary and keep its K = min(support, V) most likely tokens.

    `states` has the pool base and the pools of the recipe. They and the head have any floating-point dtype; logits are
    accumulated in fp32 (`models.head`).
    `token_ids` are the T >= 1 sampled tokens. `temperature` divides the logits of the target and not those of the base.
    The support comes from the steered distribution: top-K lists of different contexts have different supports, so
    their average is not a distribution. With `classes`, the target is projected (`project_substance`). Logits [*, V] of
    at most `batch_tokens` tokens are in memory at once.

    Raises KeyError with the name of the pool if `states` lacks a pool.
    """
    parts = []
    for start in range(0, len(token_ids), batch_tokens):
        part = slice(start, start + batch_tokens)
        part_states = {pool: pool_states[part] for pool, pool_states in states.items()}
        base = head_logits(part_states["base"], head).log_softmax(-1)
        target = head_logits(combine_states(part_states, recipe, temperature), head).log_softmax(-1)
        if classes is not None:
            target = project_substance(target, base, classes)
        norm = centred_norm(head_logits(direction(part_states, recipe), head))
        parts.append(_summarize(base, target, norm, token_ids[part], support))
    return concatenate(parts)


def project_substance(
    target: Float[Tensor, "T V"], base: Float[Tensor, "T V"], classes: Int[Tensor, " V"]
) -> Float[Tensor, "T V"]:
    """Return the log-probs of the target with the style of the base pool.

    Within a class c > 0 of tokens: target'(v) = base(c) target(v | c), with p(c) the mass of the class. Class 0 is the
    rest: target'(v) = base(v). Then KL(target' || base) is the part of the chain rule that is substance
    (`style.split_kl`). `target` and `base` are log-probs over the vocabulary; `classes` has the class of each token.
    """
    projected = base.clone()
    for number in range(1, int(classes.max()) + 1):
        member = classes == number
        within = target[:, member]
        projected[:, member] = within - within.logsumexp(-1, True) + base[:, member].logsumexp(-1, True)
    return projected


def _summarize(base: Tensor, target: Tensor, direction_norm: Tensor, token_ids: Tensor, support: int) -> Target:
    """The stored numbers of targets, from log-probs over the vocabulary."""
    ids = target.topk(min(support, target.shape[-1]), dim=-1).indices
    token = token_ids[:, None].long()
    return Target(
        ids=ids,
        base_logprobs=base.gather(-1, ids),
        target_logprobs=target.gather(-1, ids),
        tail_mass=target.exp().scatter(-1, ids, 0.0).sum(-1),
        direction_norm=direction_norm,
        kl=(target.exp() * (target - base)).sum(-1).clamp(min=0),
        token_base_logprob=base.gather(-1, token)[:, 0],
        token_target_logprob=target.gather(-1, token)[:, 0],
        base_entropy=entropy(base),
        target_entropy=entropy(target),
    )


def entropy(logprobs: Float[Tensor, "T V"]) -> Float[Tensor, " T"]:
    """Return the entropy in nats of each row of log-probs over the whole vocabulary."""
    return -(logprobs.exp() * logprobs).sum(-1)


def direction(states: Mapping[Pool, Float[Tensor, "T D"]], recipe: Recipe) -> Float[Tensor, "T D"]:
    """Return the direction in state space, fp32; the head maps it to the direction of the logits.

    It is h_correct - h_incorrect if both pools are present, else sum_p w_p h_p - h_base, the change that the recipe
    makes to the base. Raises KeyError with the name of the pool if `states` lacks a pool.
    """
    if "correct" in states and "incorrect" in states:
        return states["correct"].float() - states["incorrect"].float()
    return combine_states(states, recipe) - states["base"].float()


def centred_norm(logits: Float[Tensor, "T V"]) -> Float[Tensor, " T"]:
    """Return the L2 norm over the vocabulary of each row minus its mean, because a constant does not change a
    softmax."""
    return (logits - logits.mean(-1, keepdim=True)).norm(dim=-1)
