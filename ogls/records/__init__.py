"""The Arrow schemas of the tables, the list of stages, and the frozen types that packages exchange.

Belongs here: what is stored and the types that packages exchange.
Does not belong here: how and where it is stored (`store`), and how it is computed.
"""

from ogls.records.diagnostics import HEALTH, STYLE, SWEEP_AGREEMENT, SWEEP_CLASSES, SWEEP_POSITIONS, SWEEPS
from ogls.records.imported import IMPORTED
from ogls.records.tables import (
    AHEAD,
    ALL_TABLES,
    CONTEXTS,
    PROBLEMS,
    SCORES,
    STEERED,
    SUMMARIES,
    TABLES,
    TARGETS,
    TEACHER_STATES,
    TRAJECTORIES,
    UPDATES,
    VERDICTS,
)
from ogls.records.types import Completion, Key, Problem, Request, Rollout, StageResult

__all__ = [
    "AHEAD",
    "ALL_TABLES",
    "CONTEXTS",
    "HEALTH",
    "IMPORTED",
    "PROBLEMS",
    "SCORES",
    "STEERED",
    "STYLE",
    "SUMMARIES",
    "SWEEPS",
    "SWEEP_AGREEMENT",
    "SWEEP_CLASSES",
    "SWEEP_POSITIONS",
    "TABLES",
    "TARGETS",
    "TEACHER_STATES",
    "TRAJECTORIES",
    "UPDATES",
    "VERDICTS",
    "Completion",
    "Key",
    "Problem",
    "Request",
    "Rollout",
    "StageResult",
]
