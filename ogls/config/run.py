"""The configuration of a run: all sections together."""

from __future__ import annotations

from pydantic import model_validator

from ogls.config.data import ProblemsConfig, PromptsConfig
from ogls.config.evaluation import EvaluateConfig, VerifyConfig
from ogls.config.model import AdapterConfig, ModelConfig
from ogls.config.operations import ExecutionConfig, HealthConfig, StorageConfig, StyleConfig, TrackingConfig
from ogls.config.sampling import RolloutConfig
from ogls.config.section import Section, setting
from ogls.config.teacher import POOLS, Pool, SteerConfig, TeacherConfig
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
    execution: ExecutionConfig = setting(ExecutionConfig(), "Execution of stages as Prefect tasks.")

    @model_validator(mode="after")
    def _check_benchmarks(self) -> RunConfig:
        if not self.evaluate.benchmarks and not self.problems.holdout:
            raise ValueError("nothing to evaluate on: add an [[evaluate.benchmarks]] table or set problems.holdout")
        if self.problems.holdout and any(b.name == "holdout" for b in self.evaluate.benchmarks):
            raise ValueError("the benchmark name holdout is reserved if problems.holdout is set: rename the benchmark")
        return self

    @property
    def has_teacher(self) -> bool:
        """Whether rounds include the teach, steer and style stages (train.objective = distil)."""
        return self.train.objective == "distil"

    @property
    def method(self) -> str:
        """Name of the method: the recipe, or the objective of a run without a teacher."""
        return self.steer.recipe if self.has_teacher else self.train.objective

    def pools(self) -> tuple[Pool, ...]:
        """Return the pools that the teacher pass caches: base, the recipe's pools, and teacher.pools."""
        cached = {"base", *self.steer.to_recipe().pools(), *self.teacher.pools}
        return tuple(p for p in POOLS if p in cached)
