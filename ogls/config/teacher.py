"""The teacher pass and the target: pools, recipes and steering."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag, model_validator

from ogls.config.section import Section, check_pattern, setting

Pool = str  # the name of a pool
POOLS: tuple[Pool, ...] = ("base", "reference", "correct", "incorrect")  # declared by default, first in every list
READS = ("nothing", "reference", "correct", "incorrect", "feedback")
Weights = Literal["frozen", "live", "ema"]


class PoolConfig(Section):
    """A pool: which exemplars its contexts hold, the words around them, and the model that reads them."""

    name: str = setting("", "Name of the pool, in recipes and tables.", pattern=r"^[a-z][a-z0-9_]*$")
    reads: str = setting(
        "",
        "What the contexts hold. nothing: the problem alone. reference: the reference solution. correct, incorrect: "
        "other rollouts of the group with that outcome. feedback: the rollout itself, and what the verifier says about "
        "it. Any other word: the column of that name of the problems. Empty: as the default pool of this name, or "
        "nothing.",
    )
    model: str = setting(
        "",
        "Another model that computes this pool: a folder or a Hugging Face id, with the tokenizer of the run's model. "
        "It is frozen. Empty: the run's model.",
    )
    revision: str | None = setting(None, "Revision (branch, tag or commit) of `model` on the Hugging Face Hub.")
    weights: Weights | None = setting(
        None,
        "Weights of the run's model that compute this pool: frozen, live or ema, as in teacher.weights. Without it: "
        "those of teacher.weights, and for the pool base those of teacher.anchor.",
    )
    template: str = setting(
        "",
        "User message, with {problem}, {exemplar} if the pool reads something, and {feedback} if it reads feedback. "
        "Empty: prompts.student, prompts.exemplar, prompts.reference or prompts.feedback.",
    )
    max_exemplars: int | None = setting(
        None, "Maximum number of exemplars per rollout. Without it: teacher.max_exemplars.", ge=1
    )
    choose: Literal["hash", "shortest", "longest", "nearest"] = setting(
        "hash",
        "Which of the rollouts to take as exemplars. hash: in a pseudo-random order. shortest, longest: by tokens "
        "(SSOPD, arXiv 2605.17497, reads the shortest success and the longest failure). nearest: those that share the "
        "most tokens, from the start, with a rollout of the other outcome.",
    )

    @model_validator(mode="after")
    def _check(self) -> PoolConfig:
        if self.model and self.weights not in (None, "frozen"):
            raise ValueError(f"pool {self.name}: another model is frozen, so weights = {self.weights} is not possible")
        if self.revision and not self.model:
            raise ValueError(f"pool {self.name}: revision is of `model`, which is not set")
        kind = self.kind
        if kind == "column" and not self.template:
            raise ValueError(
                f"pool {self.name} reads the column {self.reads} of the problems, so it needs a template with "
                "{problem} and {exemplar}"
            )
        needed = ["{problem}"] + ["{exemplar}"] * (kind != "nothing") + ["{feedback}"] * (kind == "feedback")
        missing = [p for p in needed if self.template and p not in self.template]
        if missing:
            raise ValueError(f"pool {self.name}: its template must contain {' and '.join(missing)}")
        words = re.findall(r"(?<![A-Za-z}])\{([a-z_]+)\}", self.template)  # not \boxed{x}
        if unknown := sorted({f"{{{w}}}" for w in words} - set(needed)):
            raise ValueError(
                f"pool {self.name} reads {self.reads or self.kind}, so its template cannot contain "
                f"{' or '.join(unknown)}, only {', '.join(needed)}"
            )
        if self.name == "base" and kind != "nothing":
            raise ValueError(
                f"the pool base reads nothing: the KL, the projection and first mistakes are measured against it, so "
                f"give the pool that reads {self.reads} another name"
            )
        return self

    @property
    def kind(self) -> str:
        """What the contexts hold: an entry of READS, or column."""
        default = self.name if self.name in POOLS and self.name != "base" else "nothing"
        reads = self.reads or default
        return reads if reads in READS else "column"


def _is_declared(value: Any) -> str:
    return "name" if isinstance(value, str) else "pool"


# Tags, so that an error speaks of the one form that was written.
PoolEntry = Annotated[
    Annotated[str, Tag("name")] | Annotated[PoolConfig, Tag("pool")],
    Discriminator(_is_declared),
]


def declare(pools: Iterable[str | PoolConfig]) -> dict[Pool, PoolConfig]:
    """The pools by name: the four default ones, then the declared ones, which may replace a default one.

    Strings among `pools` name pools without declaring them.
    """
    declared = {name: PoolConfig(name=name) for name in POOLS}
    return declared | {pool.name: pool for pool in pools if isinstance(pool, PoolConfig)}


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
    pools: tuple[PoolEntry, ...] = setting(
        (),
        "Pools to cache in addition to the recipe's, for example to measure them in the style stage: names, or "
        "declarations ([[teacher.pools]]) of pools of your own.",
    )
    max_exemplars: int = setting(
        8, "Maximum number of exemplars per pool and rollout. More: a smoother average, and more compute.", ge=1
    )
    exemplar_tokens: int = setting(8192, "Maximum length of an exemplar, in tokens; longer ones are truncated.", ge=1)
    exemplar_pattern: str = setting(
        "",
        "Regular expression: of a rollout or a reference solution that is an exemplar, only its matches are shown, a "
        "line each, such as calculations and the answer. Less wording is then left in the direction. A group marks the "
        "part to show; ^ and $ match at every line. An exemplar without a match is shown whole. Empty: all are whole.",
        later=True,
    )
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
        8,
        "Groups per shard. A shard is one file, and what an interrupted stage repeats.",
        ge=1,
        numerics=True,
    )
    state_dtype: Literal["float16", "bfloat16", "float32"] = setting(
        "float16", "Data type of cached hidden states. Use bfloat16 if they overflow float16."
    )

    @model_validator(mode="after")
    def _check_exemplar_pattern(self) -> TeacherConfig:
        check_pattern("teacher.exemplar_pattern", self.exemplar_pattern)
        return self


class Recipe(Section):
    """Weights over the pools. They must sum to 1; negative weights steer away from a pool.

    A pool of one's own has its weight under its name.
    """

    model_config = ConfigDict(**{**Section.model_config, "extra": "allow"})
    __pydantic_extra__: dict[str, float] = Field(init=False)

    base: float = setting(1.0, "Weight of the base pool: the prompt without an exemplar.")
    reference: float = setting(0.0, "Weight of the reference pool: the reference solution.")
    correct: float = setting(0.0, "Weight of the correct pool: other correct rollouts of the group.")
    incorrect: float = setting(0.0, "Weight of the incorrect pool: other failed rollouts of the group.")

    @model_validator(mode="after")
    def _check_sum(self) -> Recipe:
        total = self.base + self.reference + self.correct + self.incorrect + sum(self.__pydantic_extra__.values())
        if abs(total - 1) > 1e-6:
            raise ValueError(f"recipe weights must sum to 1, but they sum to {total:g}")
        return self

    def pools(self) -> tuple[Pool, ...]:
        """Return the pools with a nonzero weight, in a fixed order."""
        return tuple(p for p in (*POOLS, *sorted(self.__pydantic_extra__)) if getattr(self, p) != 0)

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
    sources: dict[str, Recipe] = setting(
        {},
        "Weights over the pools for problems with another value in their column `source`, such as "
        "[steer.sources.maths]. All other problems have the recipe.",
        later=True,
    )
    temperature: float = setting(
        1.0, "Temperature of the target: its logits are divided by this. Below 1 sharpens the target.", gt=0
    )
    project: Literal["none", "substance"] = setting(
        "none",
        "substance: keep only what the target says within the token classes of style.classes. Each class keeps its "
        "mass under the base pool, and the rest keeps the base pool's probabilities, so no target makes the "
        "text shorter or changes its wording. none: the whole target.",
        later=True,
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

    def recipes(self) -> tuple[Recipe, ...]:
        """Return the recipe, and those of `sources`."""
        return self.to_recipe(), *self.sources.values()

    def recipe_for(self, source: str | None) -> Recipe:
        """Return the recipe of a problem with this value in its column `source`."""
        return self.sources.get(source or "") or self.to_recipe()
