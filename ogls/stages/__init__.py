"""Each stage as read, compute, write: what a task runs, and what a debugger calls (`ogls stage`).

    prepare -> evaluate(0), then a round:  sample -> verify -> teach -> steer -> style -> train -> evaluate -> health

Each takes a Run and a round, and returns a StageResult; `progress(done, total)` is called as it goes on.
"""

from __future__ import annotations

from collections.abc import Callable

from ogls.records import StageResult
from ogls.stages.learning import steer, teach, train
from ogls.stages.rollouts import evaluate, prepare, sample, verify
from ogls.stages.watching import health, style

__all__ = ["STAGES", "evaluate", "health", "prepare", "sample", "steer", "style", "teach", "train", "verify"]

STAGES: dict[str, Callable[..., StageResult]] = {
    s.__name__: s for s in (prepare, sample, verify, teach, steer, style, train, evaluate, health)
}
