"""Measuring other recipes and strengths on cached teacher states, without a teacher pass.

The target of a recipe is the head applied to a weighted sum of cached states (see `steering`), so a grid of recipes
costs one matrix product a point and token. Measured for each point: KL(target || base), the entropy of the target, the
probability that it moves to the tokens of correct and of failed rollouts, and how well the log-prob ratio target / base
separates the two (AUC), which is the purpose of the direction.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from ogls.config import Pool, Recipe, SteerConfig
from ogls.distillation.concatenate import concatenate
from ogls.distillation.steering import combine_states, entropy

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


RECIPES = ("ogls-sd", "contrastive", "sdpo", "opsd")
STRENGTHS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
_WITH_STRENGTH = ("ogls-sd", "contrastive")


@dataclass(frozen=True)
class SweepPoint:
    """One recipe at one strength (None for a recipe without strength)."""

    recipe: str
    strength: float | None
    weights: Recipe

    @property
    def name(self) -> str:
        return self.recipe if self.strength is None else f"{self.recipe} {self.strength:g}"


@dataclass(frozen=True)
class Measures:
    """Measures of T tokens at one point, as numpy arrays."""

    kl: np.ndarray
    entropy: np.ndarray
    moved: np.ndarray  # p_target(token) - p_base(token)
    ratio: np.ndarray  # log p_target(token) - log p_base(token)
    top: np.ndarray  # the most likely token of the target


def recipe_grid(
    cached: set[Pool], recipes: Sequence[str] = RECIPES, strengths: Sequence[float] = STRENGTHS
) -> list[SweepPoint]:
    """The points that the cached pools allow. Raises ValueError for an unknown recipe."""
    points = []
    for recipe in recipes:
        for strength in strengths if recipe in _WITH_STRENGTH else (None,):
            # a recipe without a strength ignores the number
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
) -> list[Measures]:
    """Measures of every point on the same tokens; logits [batch_tokens, V] of one point are in memory at once."""
    parts: list[list[Measures]] = [[] for _ in points]
    for start in range(0, len(token_ids), batch_tokens):
        part = slice(start, start + batch_tokens)
        base = (states["base"][part].float() @ head.T).log_softmax(-1)
        for place, point in enumerate(points):
            target = (combine_states({p: s[part] for p, s in states.items()}, point.weights) @ head.T).log_softmax(-1)
            parts[place].append(_measure(base, target, token_ids[part]))
    return [concatenate(p) for p in parts]


def _measure(base: Tensor, target: Tensor, token_ids: Tensor) -> Measures:
    p = target.exp()
    token = token_ids[:, None].long()
    here, before = target.gather(-1, token)[:, 0], base.gather(-1, token)[:, 0]

    def plain(values: Tensor) -> np.ndarray:
        return values.cpu().numpy()

    return Measures(
        kl=plain((p * (target - base)).sum(-1).clamp(min=0)),
        entropy=plain(entropy(target)),
        moved=plain(here.exp() - before.exp()),
        ratio=plain(here - before),
        top=plain(target.argmax(-1)),
    )


def auc(positive: np.ndarray, negative: np.ndarray) -> float | None:
    """Probability that a positive value is above a negative one, ties counted half; None where either is missing."""
    from scipy import stats

    if not len(positive) or not len(negative):
        return None
    u = stats.mannwhitneyu(positive, negative, method="asymptotic").statistic
    return float(u / (len(positive) * len(negative)))


@dataclass(frozen=True)
class TokenPlaces:
    """For every measured token the number of its rollout, its position, and whether the rollout is correct."""

    rollout: np.ndarray
    position: np.ndarray
    correct: np.ndarray


def summary_rows(
    points: Sequence[SweepPoint], measures: Sequence[Measures], where: TokenPlaces
) -> Iterator[dict[str, Any]]:
    """Rows of the table `sweeps`, one a point."""
    _, first = np.unique(where.rollout, return_index=True)
    right = where.correct[first]
    sizes = np.bincount(where.rollout)[where.rollout[first]]
    for point, m in zip(points, measures, strict=True):
        mean_ratio = np.bincount(where.rollout, m.ratio)[where.rollout[first]] / sizes
        yield {
            "recipe": point.recipe,
            "strength": point.strength,
            **{f"w_{pool}": getattr(point.weights, pool) for pool in ("base", "reference", "correct", "incorrect")},
            "tokens": len(m.kl),
            "kl": float(m.kl.mean()),
            "entropy": float(m.entropy.mean()),
            "moved_correct": float(m.moved[where.correct].mean()) if where.correct.any() else None,
            "moved_failed": float(m.moved[~where.correct].mean()) if not where.correct.all() else None,
            "auc": auc(mean_ratio[right], mean_ratio[~right]),
            "token_auc": auc(m.ratio[where.correct], m.ratio[~where.correct]),
        }


def position_rows(
    points: Sequence[SweepPoint], measures: Sequence[Measures], where: TokenPlaces, bins: int = 16
) -> Iterator[dict[str, Any]]:
    """Rows of the table `sweep_positions`, one a point and position bin, with the AUC of single tokens."""
    width = -(-(int(where.position.max()) + 1) // bins) if len(where.position) else 1
    place = where.position // width
    for point, m in zip(points, measures, strict=True):
        for b in np.unique(place):
            here = place == b
            right, wrong = m.ratio[here & where.correct], m.ratio[here & ~where.correct]
            yield {
                "recipe": point.recipe,
                "strength": point.strength,
                "position_from": int(b * width),
                "position_to": int((b + 1) * width - 1),
                "correct_tokens": len(right),
                "failed_tokens": len(wrong),
                "auc": auc(right, wrong),
                "kl": float(m.kl[here].mean()),
            }


def agreement_rows(points: Sequence[SweepPoint], measures: Sequence[Measures]) -> Iterator[dict[str, Any]]:
    """Rows of the table `sweep_agreement`, one a pair of points: how often their most likely tokens agree, and the
    correlation of their log-prob ratios."""
    for (a, one), (b, other) in combinations(zip(points, measures, strict=True), 2):
        varies = one.ratio.std() > 0 and other.ratio.std() > 0
        yield {
            "a": a.name,
            "b": b.name,
            "same_top": float((one.top == other.top).mean()),
            "correlation": float(np.corrcoef(one.ratio, other.ratio)[0, 1]) if varies else None,
        }
