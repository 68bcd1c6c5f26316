"""The stages of a run: the table that each stage writes, the unit of its progress, and whether it uses the device.

prepare -> evaluate, health (round 0), then in every round:
sample -> verify -> teach -> steer -> style -> train -> evaluate -> health
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One stage; `table` is the table whose manifest proves that the stage is done."""

    name: str
    table: str
    unit: str = ""  # what progress(done, total) counts; empty if the stage reports no progress
    on_device: bool = False  # runs the model or its head, so it occupies a slot of execution.limit
    in_rounds: bool = False  # has a column of seconds in the table of rounds
    diagnostic: bool = False  # no other stage reads its table


STAGES = (
    Stage("prepare", "problems"),
    Stage("sample", "trajectories", "rollouts", on_device=True, in_rounds=True),
    Stage("verify", "verdicts", "answers", in_rounds=True),
    Stage("teach", "teacher_states", "groups", on_device=True, in_rounds=True),
    Stage("steer", "targets", on_device=True, in_rounds=True),
    Stage("style", "style", on_device=True, diagnostic=True),
    Stage("train", "updates", "steps", on_device=True, in_rounds=True),
    Stage("evaluate", "scores", "completions", on_device=True, in_rounds=True),
    Stage("health", "health"),
)
STAGES_BY_NAME = {stage.name: stage for stage in STAGES}
