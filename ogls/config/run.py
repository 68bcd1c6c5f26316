"""The configuration of a run: all sections together."""

from __future__ import annotations

import difflib

from pydantic import model_validator

from ogls.config.data import ProblemsConfig, PromptsConfig
from ogls.config.evaluation import EvaluateConfig, VerifyConfig
from ogls.config.model import AdapterConfig, ModelConfig
from ogls.config.operations import ExecutionConfig, HealthConfig, StorageConfig, StyleConfig, TrackingConfig
from ogls.config.sampling import RolloutConfig
from ogls.config.section import Section, setting
from ogls.config.teacher import Pool, PoolConfig, SteerConfig, TeacherConfig, declare
from ogls.config.training import TrainConfig


class RunConfig(Section):
    """The settings of a run that belong to no section, and all sections."""

    name: str = setting("run", "Name of the run, and of its folder in the store.", pattern=r"^[a-z0-9][a-z0-9._-]*$")
    root: str = setting(
        "data/runs",
        "The store: a local folder, s3://bucket/path, gs://bucket/path or az://container/path.",
        operational=True,
        min_length=1,
    )
    seed: int = setting(0, "Seed of the run; all other seeds are derived from it.", ge=0)
    rounds: int = setting(8, "Number of training rounds. Raise it to continue a finished run.", ge=0, operational=True)
    model: ModelConfig = setting(ModelConfig(), "The base model.")
    adapter: AdapterConfig = setting(AdapterConfig(), "The weights that are trained.")
    problems: ProblemsConfig = setting(ProblemsConfig(), "The problems to train on.")
    prompts: PromptsConfig = setting(PromptsConfig(), "Prompt templates.")
    rollout: RolloutConfig = setting(RolloutConfig(), "Sampling of training rollouts.")
    verify: VerifyConfig = setting(VerifyConfig(), "Verification of completions.")
    teacher: TeacherConfig = setting(TeacherConfig(), "The teacher pass.")
    steer: SteerConfig = setting(SteerConfig(), "The target distribution.")
    train: TrainConfig = setting(TrainConfig(), "Training of the policy in a round.")
    evaluate: EvaluateConfig = setting(EvaluateConfig(), "Evaluation.")
    style: StyleConfig = setting(StyleConfig(), "The style stage.")
    health: HealthConfig = setting(HealthConfig(), "Health checks after every evaluation, and their actions.")
    tracking: TrackingConfig = setting(TrackingConfig(), "Experiment tracking with MLflow, and the run's report.")
    storage: StorageConfig = setting(StorageConfig(), "Retention of files on disk.")
    execution: ExecutionConfig = setting(ExecutionConfig(), "Execution of stages, and the workers of their shards.")

    @model_validator(mode="after")
    def _check_benchmarks(self) -> RunConfig:
        if not self.evaluate.benchmarks and not self.problems.holdout:
            raise ValueError("nothing to evaluate on: add an [[evaluate.benchmarks]] table or set problems.holdout")
        if self.problems.holdout and any(b.name == "holdout" for b in self.evaluate.benchmarks):
            raise ValueError("the benchmark name holdout is reserved if problems.holdout is set: rename the benchmark")
        return self

    @model_validator(mode="after")
    def _check_pools(self) -> RunConfig:
        names = [p.name for p in self.teacher.pools if not isinstance(p, str)]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise ValueError(f"teacher.pools declares {', '.join(twice)} more than once: give each pool its own name")
        known = self.declared_pools()
        if self.teacher.unanimous == "anchor":
            foreign = [n for n in self.pools() if known[n].model and known[n].kind in ("correct", "incorrect")]
            if foreign:
                raise ValueError(
                    f"teacher.unanimous = anchor puts the base pool in place of {', '.join(foreign)}, which another "
                    "model computes: set teacher.unanimous = skip"
                )
        named = [p for p in self.teacher.pools if isinstance(p, str)]
        for setting_, pools in (
            ("teacher.pools", named),
            *(("the recipe", recipe.pools()) for recipe in self.steer.recipes()),
        ):
            for pool in pools:
                if pool not in known:
                    near = difflib.get_close_matches(pool, known, n=1, cutoff=0.5)
                    hint = f"did you mean {near[0]}?" if near else f"declared pools: {', '.join(known)}"
                    raise ValueError(f"{setting_} names the pool {pool}, which is not declared; {hint}")
        return self

    @property
    def has_teacher(self) -> bool:
        """Whether rounds include the teach, steer and style stages (train.objective = distil)."""
        return self.train.objective == "distil"

    @property
    def method(self) -> str:
        """Name of the method: the recipe, or the objective of a run without a teacher."""
        return self.steer.recipe if self.has_teacher else self.train.objective

    def declared_pools(self) -> dict[Pool, PoolConfig]:
        """Return all pools by name: the default ones, and those that `teacher.pools` declares."""
        return declare(self.teacher.pools)

    def pools(self) -> tuple[Pool, ...]:
        """Return the pools that the teacher pass caches: base, those of the recipes, and teacher.pools."""
        listed = {p if isinstance(p, str) else p.name for p in self.teacher.pools}
        cached = {"base", *listed, *(p for recipe in self.steer.recipes() for p in recipe.pools())}
        return tuple(p for p in self.declared_pools() if p in cached)

    def pool_model(self, pool: PoolConfig) -> ModelConfig:
        """Return the settings of the model that computes a pool: the run's, or those with the path of another one."""
        own = {"path": pool.model, "revision": pool.revision} if pool.model else {}
        return self.model.model_copy(update=own)

    def other_models(self) -> dict[str, ModelConfig]:
        """Return the models other than the run's that compute cached pools, by path."""
        pools = [self.declared_pools()[name] for name in self.pools()]
        return {pool.model: self.pool_model(pool) for pool in pools if pool.model}

    def columns(self) -> tuple[str, ...]:
        """Return the further columns of the problems that pools read, and `source` if weights depend on it."""
        read = {p.reads for name, p in self.declared_pools().items() if p.kind == "column" and name in self.pools()}
        return tuple(sorted(read | ({"source"} if self.steer.sources else set())))

    @property
    def has_ema(self) -> bool:
        """Whether a pool is computed by the average of the policies."""
        own = [self.declared_pools()[name].weights for name in self.pools()]
        return self.teacher.weights == "ema" or "ema" in own
