"""The teacher pass and the target: pools, recipes, steering."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from ogls.config.section import Section, setting

Pool = Literal["base", "reference", "correct", "incorrect"]


class TeacherConfig(Section):
    """The teacher pass: who reads what."""

    weights: Literal["frozen", "live", "ema"] = setting(
        "frozen", "Teacher weights: the base model, the current policy, or an average of the policies so far."
    )
    ema_decay: float = setting(0.9, "ema: share of the old average kept a round.", ge=0, lt=1)
    anchor: Literal["teacher", "policy"] = setting(
        "policy", "Whose logits without privileged text the direction is added to (the base pool)."
    )
    pools: tuple[Pool, ...] = setting((), "Pools to cache besides those that the recipe weights.")
    max_exemplars: int = setting(8, "Most exemplars a pool and rollout.", ge=1)
    exemplar_tokens: int = setting(8192, "Exemplars longer than this are cut at their end.", ge=1)
    reference_exemplar: bool = setting(
        False, "The reference solution, where there is one, is an exemplar of the correct pool like any rollout."
    )
    empty_pool: Literal["skip", "reference"] = setting(
        "skip", "With a needed pool empty: leave the rollout out, or let the reference be the correct pool."
    )
    unanimous: Literal["skip", "anchor"] = setting(
        "skip",
        "Correct rollouts without a failed peer: leave them out, or train them with no direction, so that their target "
        "is the base pool at steer.temperature (needs train.rollouts = all or correct).",
    )
    batch_tokens: int = setting(16384, "Most tokens (padding included) in one forward pass.", ge=1)
    shard_groups: int = setting(8, "Groups whose states are in memory at once; also those of a shard.", ge=1)
    state_dtype: Literal["float16", "bfloat16", "float32"] = setting("float16", "Type of cached hidden states.")


class Recipe(Section):
    """Weights over the pools; they sum to 1 (DESIGN: one family, not many methods)."""

    base: float = setting(1.0, "No privileged text.")
    reference: float = setting(0.0, "The reference solution.")
    correct: float = setting(0.0, "Correct rollouts of the group.")
    incorrect: float = setting(0.0, "Failed rollouts of the group.")

    @model_validator(mode="after")
    def _sums_to_one(self) -> Recipe:
        total = self.base + self.reference + self.correct + self.incorrect
        if abs(total - 1) > 1e-6:
            raise ValueError(f"the weights of a recipe sum to 1, not {total:g}")
        return self

    def pools(self) -> tuple[Pool, ...]:
        """The pools with a weight, in the order of the table."""
        order: tuple[Pool, ...] = ("base", "reference", "correct", "incorrect")
        return tuple(p for p in order if getattr(self, p) != 0)

    def weights(self) -> dict[str, float]:
        """The weights that are not 0, by pool."""
        return {pool: getattr(self, pool) for pool in self.pools()}


class SteerConfig(Section):
    """The target: which recipe, how strong."""

    recipe: Literal["ogls-sd", "opsd", "sdpo", "contrastive", "none", "custom"] = setting(
        "ogls-sd", "A named recipe, or custom: the weights given in steer.weights."
    )
    strength: float = setting(0.5, "lambda of ogls-sd, a of contrastive; the others ignore it.")
    weights: Recipe | None = setting(None, "The weights of recipe custom.")
    temperature: float = setting(1.0, "The target's logits are divided by it: below 1 sharpens.", gt=0)
    support: int = setting(64, "K: tokens a target keeps besides its tail.", ge=1)
    batch_tokens: int = setting(1024, "Tokens whose full-vocabulary logits are alive at once.", ge=1)

    @model_validator(mode="after")
    def _weights_only_for_custom(self) -> SteerConfig:
        if (self.recipe == "custom") != (self.weights is not None):
            raise ValueError("steer.weights goes with steer.recipe = 'custom', and only with it")
        return self

    def to_recipe(self) -> Recipe:
        """The weights that the named recipe and the strength stand for."""
        a = self.strength
        named = {
            "ogls-sd": Recipe(base=1, correct=a, incorrect=-a),
            "opsd": Recipe(base=0, reference=1),
            "sdpo": Recipe(base=0, correct=1),
            "contrastive": Recipe(base=0, correct=1 + a, incorrect=-a),
            "none": Recipe(),
        }
        return self.weights or named[self.recipe]
