"""Judging completions, and evaluation."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from ogls.config.data import Benchmark
from ogls.config.sampling import SamplingConfig
from ogls.config.section import Section, setting

Verdict = Literal["correct", "incorrect", "no_answer", "truncated", "timeout", "error"]


class VerifyConfig(Section):
    """Judging completions with math-verify."""

    workers: int = setting(2, "Worker processes.", ge=1, operational=True)
    timeout_seconds: float = setting(5.0, "Wall limit of one judgement; its worker is killed then.", gt=0)
    memory_mb: int = setting(2048, "Address space of a worker, in MiB.", ge=512)
    tail_chars: int = setting(2000, "Only so many last characters of a completion are looked at.", ge=64)
    require_boxed: bool = setting(True, r"Take answers from \boxed{} or #### only, not from loose text.")
    checker: str = setting(
        "",
        "A function of your own, module:name, that judges in place of math-verify: (answer, expected) -> bool. It runs "
        "in the same guarded worker processes; the module may lie in the working directory.",
        later=True,
        pattern=r"^([A-Za-z_][\w.]*:[A-Za-z_]\w*)?$",
    )
    failed: tuple[Verdict, ...] = setting(
        ("incorrect", "no_answer", "truncated"),
        "Verdicts that make a rollout a failure; any other but correct leaves it out of every pool.",
    )


class EvaluateConfig(SamplingConfig):
    """Evaluation after every round (and of the base model, as round 0)."""

    samples: int = setting(4, "k of avg@k: sampled completions a problem.", ge=1)
    every: int = setting(1, "Evaluate each so many rounds; the first and last always are.", ge=1, operational=True)
    base_kl: bool = setting(True, "Score the samples with the base model too, for the policy's KL to it.")
    bootstrap: int = setting(2000, "Bootstrap resamples over problems for the 95% interval.", ge=100)
    benchmarks: tuple[Benchmark, ...] = setting((), "What to evaluate on, besides problems.holdout.")

    @model_validator(mode="after")
    def _unique_names(self) -> EvaluateConfig:
        names = [b.name for b in self.benchmarks]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(f"two benchmarks are named {', '.join(twice)}")
        return self
