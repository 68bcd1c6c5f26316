"""Each stage as read, compute, write: what a task runs, and what a debugger calls (`ogls stage`).

    prepare -> evaluate(0), then a round:  sample -> verify -> teach -> steer -> style -> train -> evaluate -> health

Each takes a Run and a round, and returns a StageResult; `progress(done, total)` is called as it goes on.
"""

from __future__ import annotations

from collections.abc import Callable

from ogls.records import StageResult
from ogls.stages.evaluate import evaluate
from ogls.stages.health import health
from ogls.stages.prepare import prepare
from ogls.stages.sample import sample
from ogls.stages.steer import steer
from ogls.stages.style import style
from ogls.stages.teach import teach
from ogls.stages.train import train
from ogls.stages.verify import verify

# Function by name, in the order of `records.stages.STAGES`.
STAGES: dict[str, Callable[..., StageResult]] = {
    s.__name__: s for s in (prepare, sample, verify, teach, steer, style, train, evaluate, health)
}
