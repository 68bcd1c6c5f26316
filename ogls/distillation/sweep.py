"""Measuring other recipes and strengths on cached teacher states, without a teacher pass.

The target of a recipe is the head applied to a weighted sum of cached states (see `steering`), so a grid of recipes
costs one matrix product a point and token. Measured for each point: KL(target || base), the entropy of the target, the
probability that it moves to the tokens of correct and of failed rollouts, and how well the log-prob ratio target / base
separates the two (AUC), which is the purpose of the direction.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from ogls.config import POOLS, Pool, Recipe, SteerConfig
from ogls.distillation.auc import auc, group_auc
from ogls.distillation.concatenate import concatenate
from ogls.distillation.steering import combine_states, entropy, project_substance
from ogls.distillation.style import REST
from ogls.models.head import head_logits

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


RECIPES = ("ogls-sd", "contrastive", "sdpo", "opsd")
STRENGTHS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
_WITH_STRENGTH = ("ogls-sd", "contrastive")  # recipes that use steer.strength


@dataclass(frozen=True)
class SweepPoint:
    """One recipe at one strength; `strength` is None for a recipe without a strength."""

    recipe: str
    strength: float | None
    weights: Recipe

    @property
    def name(self) -> str:
        return self.recipe if self.strength is None else f"{self.recipe} {self.strength:g}"


@dataclass(frozen=True)
class Measures:
    """Measures of T tokens at one point: arrays [T], fp32; `top` is int64."""

    kl: np.ndarray  # KL(target || base), nats
    entropy: np.ndarray  # entropy of the target, nats
    moved: np.ndarray  # p_target(token) - p_base(token)
    ratio: np.ndarray  # log p_target(token) - log p_base(token), nats
    top: np.ndarray  # the most likely token of the target
    projected_kl: np.ndarray  # KL(projected target || base), nats (`steering.project_substance`)
    projected_ratio: np.ndarray  # log-prob ratio of the projected target, nats
    base_logprob: np.ndarray  # log p_base(token), nats


def recipe_grid(
    cached: set[Pool], recipes: Sequence[str] = RECIPES, strengths: Sequence[float] = STRENGTHS
) -> list[SweepPoint]:
    """Return the points that the cached pools allow, every recipe with a strength at every strength.

    Raises ValueError if a recipe is unknown.
    """
    points = []
    for recipe in recipes:
        for strength in strengths if recipe in _WITH_STRENGTH else (None,):
            # A recipe without a strength ignores the number.
            config = SteerConfig.model_validate({"recipe": recipe, "strength": 1.0 if strength is None else strength})
            weights = config.to_recipe()
            if set(weights.pools()) <= cached:
                points.append(SweepPoint(recipe, strength, weights))
    return points


def measure_points(
    states: Mapping[Pool, Float[Tensor, "T D"]],
    token_ids: Int[Tensor, " T"],
    points: Sequence[SweepPoint],
    head: Float[Tensor, "V D"],
    batch_tokens: int = 1024,
    temperature: float = 1.0,
    classes: Int[Tensor, " V"] | None = None,
) -> list[Measures]:
    """Return the measures of every point on the same T tokens, in the order of `points`.

    `states` has the pool base and the pools of all points. They and the head have any floating-point dtype.
    `temperature` divides the logits of the targets and not those of the base, as in `steer_tokens`. `classes` are those
    of the projection; without them the projected target is the base. Logits
    [batch_tokens, V] of the base pool and of one point are in memory at once.
    """
    parts: list[list[Measures]] = [[] for _ in points]
    for start in range(0, len(token_ids), batch_tokens):
        part = slice(start, start + batch_tokens)
        base = head_logits(states["base"][part], head).log_softmax(-1)
        for index, point in enumerate(points):
            combined = combine_states({p: s[part] for p, s in states.items()}, point.weights, temperature)
            target = head_logits(combined, head).log_softmax(-1)
            projected = base if classes is None else project_substance(target, base, classes)
            parts[index].append(_measure(base, target, projected, token_ids[part]))
    return [concatenate(p) for p in parts]


def _measure(base: Tensor, target: Tensor, projected: Tensor, token_ids: Tensor) -> Measures:
    p = target.exp()
    token = token_ids[:, None].long()
    target_logprob, base_logprob = target.gather(-1, token)[:, 0], base.gather(-1, token)[:, 0]

    def to_numpy(values: Tensor) -> np.ndarray:
        return values.cpu().numpy()

    return Measures(
        kl=to_numpy((p * (target - base)).sum(-1).clamp(min=0)),
        entropy=to_numpy(entropy(target)),
        moved=to_numpy(target_logprob.exp() - base_logprob.exp()),
        ratio=to_numpy(target_logprob - base_logprob),
        top=to_numpy(target.argmax(-1)),
        projected_kl=to_numpy((projected.exp() * (projected - base)).sum(-1).clamp(min=0)),
        projected_ratio=to_numpy(projected.gather(-1, token)[:, 0] - base_logprob),
        base_logprob=to_numpy(base_logprob),
    )


@dataclass(frozen=True)
class SweepTokens:
    """The measured tokens: arrays [T]."""

    rollout: np.ndarray  # number of the rollout that contains the token
    position: np.ndarray  # position in the rollout
    correct: np.ndarray  # whether the rollout is correct, bool
    token_class: np.ndarray  # class of the sampled token: 0 for the rest, else 1 + its index in style.classes
    group: np.ndarray  # number of the group of its rollout

    def means(self, values: np.ndarray, among: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The mean of `values` [T] over the tokens `among` [T], whether it is correct, and the group, by rollout.

        A rollout without such a token is left out.
        """
        _, first, of_token = np.unique(self.rollout, return_index=True, return_inverse=True)
        sums, sizes = (np.bincount(of_token, v, len(first)) for v in (values * among, among))
        kept = sizes > 0
        return sums[kept] / sizes[kept], self.correct[first][kept], self.group[first][kept]

    def auc_of_means(self, values: np.ndarray, among: np.ndarray) -> dict[str, float | None]:
        """The columns `auc` and `group_auc` of the means of `values` [T] over the tokens `among` [T]."""
        means, correct, group = self.means(values, among)
        within = group_auc(means, correct, group)
        value, low, high = within or (None, None, None)
        return {
            "auc": auc(means[correct], means[~correct]),
            "group_auc": value,
            "group_auc_low": low,
            "group_auc_high": high,
        }


def summary_rows(
    points: Sequence[SweepPoint], measures: Sequence[Measures], tokens: SweepTokens, mistake_nats: float = 1.0
) -> Iterator[dict[str, Any]]:
    """Yield the rows of the table `sweeps`, one per point.

    `auc` ranks rollouts by their mean log-prob ratio; `token_auc` ranks single tokens. The columns of the two switches,
    steer.project and train.until, are measured on the same tokens.
    """
    everything = np.ones(len(tokens.rollout))
    for point, m in zip(points, measures, strict=True):
        until = _until_mistake(m.ratio, tokens, mistake_nats)
        projected = tokens.auc_of_means(m.projected_ratio, everything)
        yield {
            "recipe": point.recipe,
            "strength": point.strength,
            **{f"w_{pool}": getattr(point.weights, pool) for pool in POOLS},
            "weights": json.dumps(point.weights.weights()),
            "tokens": len(m.kl),
            "kl": float(m.kl.mean()),
            "entropy": float(m.entropy.mean()),
            "moved_correct": float(m.moved[tokens.correct].mean()) if tokens.correct.any() else None,
            "moved_failed": float(m.moved[~tokens.correct].mean()) if not tokens.correct.all() else None,
            **tokens.auc_of_means(m.ratio, everything),
            "token_auc": auc(m.ratio[tokens.correct], m.ratio[~tokens.correct]),
            "projected_kl": float(m.projected_kl.mean()),
            "projected_auc": projected["auc"],
            "projected_group_auc": projected["group_auc"],
            "until_share": float(until.mean()),
            "until_kl": float(m.kl[until].mean()),
        }


def _until_mistake(ratio: np.ndarray, tokens: SweepTokens, nats: float) -> np.ndarray:
    """Which tokens come no later than the first one of their rollout whose log-prob the target lowers by `nats`."""
    mistakes = np.zeros(len(ratio), int)
    for rollout in np.unique(tokens.rollout):
        member = np.flatnonzero(tokens.rollout == rollout)
        lowered = (ratio[member] <= -nats).cumsum()
        mistakes[member] = np.concatenate([[0], lowered[:-1]])  # before this token
    return mistakes == 0


def position_rows(
    points: Sequence[SweepPoint], measures: Sequence[Measures], tokens: SweepTokens, bins: int = 16
) -> Iterator[dict[str, Any]]:
    """Yield the rows of the table `sweep_positions`, one per point and position bin, with the AUC of single tokens."""
    width = -(-(int(tokens.position.max()) + 1) // bins) if len(tokens.position) else 1
    bin_of_token = tokens.position // width
    for point, m in zip(points, measures, strict=True):
        for b in np.unique(bin_of_token):
            in_bin = bin_of_token == b
            correct, failed = m.ratio[in_bin & tokens.correct], m.ratio[in_bin & ~tokens.correct]
            yield {
                "recipe": point.recipe,
                "strength": point.strength,
                "position_from": int(b * width),
                "position_to": int((b + 1) * width - 1),
                "correct_tokens": len(correct),
                "failed_tokens": len(failed),
                "auc": auc(correct, failed),
                "kl": float(m.kl[in_bin].mean()),
            }


def class_rows(
    points: Sequence[SweepPoint], measures: Sequence[Measures], tokens: SweepTokens, names: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Yield the rows of the table `sweep_classes`, one per point and class; a class without tokens has no row."""
    base_auc = {}
    for number in np.unique(tokens.token_class):  # the base pool is the same at every point
        means, correct, _ = tokens.means(measures[0].base_logprob, tokens.token_class == number)
        base_auc[number] = auc(means[correct], means[~correct])
    for point, m in zip(points, measures, strict=True):
        for number in base_auc:
            among = tokens.token_class == number
            yield {
                "recipe": point.recipe,
                "strength": point.strength,
                "token_class": (REST, *names)[number],
                "tokens": int(among.sum()),
                "kl": float(m.kl[among].mean()),
                "substance_kl": float(m.projected_kl[among].mean()),
                **tokens.auc_of_means(m.ratio, among),
                "base_auc": base_auc[number],
            }


def agreement_rows(points: Sequence[SweepPoint], measures: Sequence[Measures]) -> Iterator[dict[str, Any]]:
    """Yield the rows of the table `sweep_agreement`, one per pair of points: the share of tokens with the same most
    likely token, and the correlation of the log-prob ratios (None if a ratio is constant)."""
    for (a, measures_a), (b, measures_b) in combinations(zip(points, measures, strict=True), 2):
        varies = measures_a.ratio.std() > 0 and measures_b.ratio.std() > 0
        yield {
            "a": a.name,
            "b": b.name,
            "same_top": float((measures_a.top == measures_b.top).mean()),
            "correlation": float(np.corrcoef(measures_a.ratio, measures_b.ratio)[0, 1]) if varies else None,
        }
