"""Frozen types that packages exchange."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Key = tuple[str, int]  # (problem_id, sample): identifies a rollout in its round


@dataclass(frozen=True)
class Problem:
    """A problem with an expected answer."""

    problem_id: str
    problem: str
    answer: str
    solution: str | None = None
    split: str = "train"
    columns: Mapping[str, str] = field(default_factory=dict, hash=False)  # further columns, which pools read


@dataclass(frozen=True)
class Request:
    """One completion to sample: a rendered prompt and the seed of its random stream."""

    problem_id: str
    sample: int
    prompt_ids: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class Completion:
    """The completion of a request. `logprobs` are at temperature 1, in nats, one per token."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: str


@dataclass(frozen=True)
class Rollout:
    """A trajectory with the outcome of its verdict."""

    problem_id: str
    sample: int
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    outcome: str  # correct, failed or undecided
    logprobs: tuple[float, ...] = ()
    reward: float | None = None  # what the verifier gave it; None if it gave none
    feedback: str = ""  # what the verifier says about it

    @property
    def key(self) -> Key:
        return self.problem_id, self.sample


@dataclass(frozen=True)
class StageResult:
    """The result of a stage: small enough to pass through Prefect."""

    stage: str
    round: int
    rows: int
    seconds: float
    metrics: dict[str, Any] = field(default_factory=dict)
    reused: bool = False
    notice: str = ""
    redone: str = ""  # why finished work was redone; empty if nothing was redone
