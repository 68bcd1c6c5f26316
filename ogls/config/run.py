"""The configuration of a run: all sections together."""

from __future__ import annotations

from pydantic import model_validator

from ogls.config.data import ProblemsConfig, PromptsConfig
from ogls.config.evaluation import EvaluateConfig, VerifyConfig
from ogls.config.model import AdapterConfig, ModelConfig
from ogls.config.operations import ExecutionConfig, HealthConfig, StorageConfig, StyleConfig, TrackingConfig
from ogls.config.sampling import RolloutConfig
from ogls.config.section import Section, setting
from ogls.config.teacher import Pool, SteerConfig, TeacherConfig
from ogls.config.training import TrainConfig


class RunConfig(Section):
    """Everything that decides what a run computes, and how."""

    name: str = setting("run", "Name of the run; its folder in the store.", pattern=r"^[a-z0-9][a-z0-9._-]*$")
    root: str = setting("data/runs", "The store: a folder, s3://bucket/path, or another fsspec URL.", operational=True)
    seed: int = setting(0, "Every other seed derives from it.", ge=0)
    rounds: int = setting(8, "Rounds to train; a finished run goes on if this is raised.", ge=0, operational=True)
    model: ModelConfig = setting(ModelConfig(), "The base model.")
    adapter: AdapterConfig = setting(AdapterConfig(), "What is trained.")
    problems: ProblemsConfig = setting(ProblemsConfig(), "The problems to train on.")
    prompts: PromptsConfig = setting(PromptsConfig(), "The words put before the model.")
    rollout: RolloutConfig = setting(RolloutConfig(), "Sampling of training rollouts.")
    verify: VerifyConfig = setting(VerifyConfig(), "Judging completions.")
    teacher: TeacherConfig = setting(TeacherConfig(), "The teacher pass.")
    steer: SteerConfig = setting(SteerConfig(), "The target.")
    train: TrainConfig = setting(TrainConfig(), "One training round.")
    evaluate: EvaluateConfig = setting(EvaluateConfig(), "Evaluation.")
    style: StyleConfig = setting(StyleConfig(), "Style against substance.")
    health: HealthConfig = setting(HealthConfig(), "What is watched, and what is done about it.")
    tracking: TrackingConfig = setting(TrackingConfig(), "MLflow.")
    storage: StorageConfig = setting(StorageConfig(), "What is kept on disk.")
    execution: ExecutionConfig = setting(ExecutionConfig(), "How stages are carried out.")

    @model_validator(mode="after")
    def _has_a_benchmark(self) -> RunConfig:
        if not self.evaluate.benchmarks and not self.problems.holdout:
            raise ValueError("nothing to evaluate on: add an [[evaluate.benchmarks]] or set problems.holdout")
        if self.problems.holdout and any(b.name == "holdout" for b in self.evaluate.benchmarks):
            raise ValueError("a benchmark named holdout stands beside problems.holdout: rename it")
        return self

    @property
    def has_teacher(self) -> bool:
        """Whether a round has the stages teach and steer."""
        return self.train.objective == "distil"

    @property
    def method(self) -> str:
        """What the run does, in a word: its recipe, or its objective where there is no teacher."""
        return self.steer.recipe if self.has_teacher else self.train.objective

    def pools(self) -> tuple[Pool, ...]:
        """The pools that the teacher pass caches: base, those of the recipe, and those asked for."""
        order: tuple[Pool, ...] = ("base", "reference", "correct", "incorrect")
        wanted = {"base", *self.steer.to_recipe().pools(), *self.teacher.pools}
        return tuple(p for p in order if p in wanted)
