"""Verification of answers, and evaluation."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from ogls.config.data import Benchmark
from ogls.config.sampling import SamplingConfig
from ogls.config.section import FUNCTION, Section, check_pattern, setting

Verdict = Literal["correct", "incorrect", "no_answer", "truncated", "timeout", "error"]


class VerifyConfig(Section):
    """Verification of completions with math-verify, or with a custom checker."""

    workers: int = setting(2, "Number of worker processes.", ge=1, operational=True)
    shard_rollouts: int = setting(
        0,
        "Rollouts per shard, rounded up to whole files of trajectories; 0: one shard for the whole round. With several "
        "workers (execution.workers), set it so that each of them has a shard.",
        ge=0,
        numerics=True,
    )
    timeout_seconds: float = setting(
        5.0,
        "Wall-clock limit for one answer, in seconds. A worker that exceeds it is killed, and the answer is judged "
        "once more. Before, math-verify is stopped after 2 seconds of CPU time, which do not depend on what else the "
        "machine does.",
        gt=0,
    )
    memory_mb: int = setting(2048, "Address space limit of a worker process, in MiB.", ge=512)
    tail_chars: int = setting(2000, "Search for the answer only in the last N characters of a completion.", ge=64)
    require_boxed: bool = setting(
        True,
        r"Accept answers only in \boxed{}, after #### or by answer_pattern. If false, a completion without any is "
        "compared as a whole.",
    )
    answer_pattern: str = setting(
        "",
        r"Regular expression of the answer, for completions and reference solutions with neither \boxed{} nor ####, "
        "such as '^A: (.+)$'. Its last match counts; its group, if it has one, is the answer; ^ and $ match at every "
        "line. Empty: none.",
        later=True,
    )
    checker: str = setting(
        "",
        "Custom checker `module:function` that replaces math-verify; its signature is (answer, expected) -> bool, or "
        "-> ogls.verifiers.score.Score with a reward and feedback. It "
        "runs in the same worker processes with the same limits. The module may be in the working directory. Empty: "
        "math-verify.",
        later=True,
        pattern=FUNCTION,
    )
    threshold: float = setting(
        0.5, "Reward from which on an answer is correct, if a custom checker gives a reward alone.", later=True
    )
    reveal_answer: bool = setting(
        False,
        "Add the correct answer to the feedback on failed completions, which a pool with reads = feedback reads.",
        later=True,
    )
    failed: tuple[Verdict, ...] = setting(
        ("incorrect", "no_answer", "truncated"),
        "Verdicts that count as failed. Rollouts with any other verdict except correct are undecided: they are not "
        "trained on and are not used as exemplars.",
    )

    @model_validator(mode="after")
    def _check_answer_pattern(self) -> VerifyConfig:
        check_pattern("verify.answer_pattern", self.answer_pattern)
        return self


class EvaluateConfig(SamplingConfig):
    """Evaluation of the policy after a round, and of round 0: the base model, or the adapter in adapter.start."""

    samples: int = setting(4, "Sampled completions per problem: the k of avg@k. One greedy completion is added.", ge=1)
    every: int = setting(
        1,
        "Evaluate every N rounds; the first and the last round are always evaluated.",
        ge=1,
        operational=True,
    )
    base_kl: bool = setting(
        True,
        "Also compute the samples' log-probs under the base model, which gives the policy's KL to it. Costs one more "
        "forward pass.",
    )
    bootstrap: int = setting(
        2000, "Number of bootstrap resamples over problems for the 95% confidence interval.", ge=100
    )
    benchmarks: tuple[Benchmark, ...] = setting(
        (), "Benchmarks to evaluate on, in addition to the problems of problems.holdout."
    )

    @model_validator(mode="after")
    def _check_unique_names(self) -> EvaluateConfig:
        names = [b.name for b in self.benchmarks]
        duplicates = sorted({n for n in names if names.count(n) > 1})
        if duplicates:
            raise ValueError(f"benchmark names must be unique; used more than once: {', '.join(duplicates)}")
        return self
