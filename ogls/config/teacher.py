"""The teacher pass and the target: pools, recipes and steering."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import model_validator

from ogls.config.section import Section, setting

Pool = Literal["base", "reference", "correct", "incorrect"]
POOLS: tuple[Pool, ...] = get_args(Pool)  # in the order of every list of pools


class TeacherConfig(Section):
    """The teacher pass: it scores rollouts under contexts that hold exemplars, and caches the hidden states."""

    weights: Literal["frozen", "live", "ema"] = setting(
        "frozen",
        "Teacher weights. frozen: the base model, also if adapter.start is set. live: the current policy. ema: an "
        "exponential moving average of the policies, which begins with adapter.start.",
    )
    ema_decay: float = setting(
        0.9,
        "ema: share of the previous average that is kept per round. Higher: a slower teacher. The LoRA matrices are "
        "averaged, not their products.",
        ge=0,
        lt=1,
    )
    anchor: Literal["teacher", "policy"] = setting(
        "policy",
        "Weights that compute the base pool, whose logits the direction is added to: the teacher's or the current "
        "policy's. No effect if teacher.weights = live.",
    )
    pools: tuple[Pool, ...] = setting(
        (), "Pools to cache in addition to the recipe's, for example to measure them in the style stage."
    )
    max_exemplars: int = setting(
        8, "Maximum number of exemplars per pool and rollout. More: a smoother average, and more compute.", ge=1
    )
    exemplar_tokens: int = setting(8192, "Maximum length of an exemplar, in tokens; longer ones are truncated.", ge=1)
    reference_exemplar: bool = setting(
        False,
        "Add the reference solution, if the problem has one, to the correct pool as one more exemplar, in the same "
        "prompt as the rollouts.",
    )
    empty_pool: Literal["skip", "reference"] = setting(
        "skip",
        "What to do with a rollout whose correct pool is empty. skip: leave the rollout out if the recipe uses that "
        "pool. reference: use the reference solution as the correct pool.",
    )
    unanimous: Literal["skip", "anchor"] = setting(
        "skip",
        "What to do with correct rollouts of groups without a failed rollout. skip: leave them out if the recipe uses "
        "the incorrect pool. anchor: train them with a direction of zero: with no weight on the reference pool, their "
        "target is the base pool at steer.temperature. Has an effect only with train.rollouts = all or correct.",
    )
    batch_tokens: int = setting(
        16384,
        "Maximum number of tokens, padding included, in one forward pass. Lower it to save memory.",
        ge=1,
        numerics=True,
    )
    shard_groups: int = setting(
        8, "Groups per shard. The hidden states of one shard are in memory at the same time.", ge=1, numerics=True
    )
    state_dtype: Literal["float16", "bfloat16", "float32"] = setting(
        "float16", "Data type of cached hidden states. Use bfloat16 if they overflow float16."
    )


class Recipe(Section):
    """Weights over the pools. They must sum to 1; negative weights steer away from a pool."""

    base: float = setting(1.0, "Weight of the base pool: the prompt without an exemplar.")
    reference: float = setting(0.0, "Weight of the reference pool: the reference solution.")
    correct: float = setting(0.0, "Weight of the correct pool: other correct rollouts of the group.")
    incorrect: float = setting(0.0, "Weight of the incorrect pool: other failed rollouts of the group.")

    @model_validator(mode="after")
    def _check_sum(self) -> Recipe:
        total = self.base + self.reference + self.correct + self.incorrect
        if abs(total - 1) > 1e-6:
            raise ValueError(f"recipe weights must sum to 1, but they sum to {total:g}")
        return self

    def pools(self) -> tuple[Pool, ...]:
        """Return the pools with a nonzero weight, in a fixed order."""
        return tuple(p for p in POOLS if getattr(self, p) != 0)

    def weights(self) -> dict[str, float]:
        """Return the nonzero weights by pool."""
        return {pool: getattr(self, pool) for pool in self.pools()}


class SteerConfig(Section):
    """The target distribution: the recipe and its strength."""

    recipe: Literal["ogls-sd", "opsd", "sdpo", "contrastive", "none", "custom"] = setting(
        "ogls-sd", "Named recipe, or custom to use the weights in steer.weights. none: the base pool alone."
    )
    strength: float = setting(
        0.5,
        "Steering strength: lambda of ogls-sd, a of contrastive. Other recipes ignore it. Higher: the target moves "
        "further from the base pool.",
    )
    weights: Recipe | None = setting(None, "Weights over the pools for recipe custom.")
    temperature: float = setting(
        1.0, "Temperature of the target: its logits are divided by this. Below 1 sharpens the target.", gt=0
    )
    support: int = setting(
        64,
        "K: number of most likely tokens stored per target; the mass of all others is stored as one tail. Higher: more "
        "exact targets, and more disk space.",
        ge=1,
    )
    batch_tokens: int = setting(
        1024,
        "Maximum number of tokens whose full-vocabulary logits are in memory at once. Lower it to save memory.",
        ge=1,
        numerics=True,
    )

    @model_validator(mode="after")
    def _check_custom_weights(self) -> SteerConfig:
        if (self.recipe == "custom") != (self.weights is not None):
            raise ValueError("steer.weights must be set if steer.recipe = 'custom', and only then")
        return self

    def to_recipe(self) -> Recipe:
        """Return the pool weights of the configured recipe at the configured strength."""
        a = self.strength
        named = {
            "ogls-sd": Recipe(base=1, correct=a, incorrect=-a),
            "opsd": Recipe(base=0, reference=1),
            "sdpo": Recipe(base=0, correct=1),
            "contrastive": Recipe(base=0, correct=1 + a, incorrect=-a),
            "none": Recipe(),
        }
        return self.weights or named[self.recipe]
