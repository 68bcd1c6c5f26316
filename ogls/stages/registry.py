"""The stages by name, for the Prefect tasks and for `ogls stage`, which runs one stage for debugging.

    prepare -> evaluate(0), then each round:  sample -> verify -> teach -> steer -> style -> train -> evaluate -> health

Each stage takes a Run and a round, and returns a StageResult. It calls `progress(done, total)` while it works.
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

# Stage functions by name, in the order of `records.stages.STAGES`.
STAGES: dict[str, Callable[..., StageResult]] = {
    s.__name__: s for s in (prepare, sample, verify, teach, steer, style, train, evaluate, health)
}
