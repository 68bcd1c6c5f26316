"""Wall time of a round by stage, and the time during which the engine or the trainer is idle.

    python tests/benchmarks/rounds.py OUT

Runs `ogls train` (with Prefect and MLflow) with the configuration of the quickstart and the transformers engine and, if
it is installed (`make vllm`), the vLLM engine. The times are means of rounds 2 and 3. A round lasts from the end of one
health stage to the end of the next. The time between the stages is spent in Prefect and MLflow. Writes OUT/rounds.md
and .parquet.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ogls.store import run_query

sys.path[:0] = ["tests", "tests/unit/samplers"]

from measured import write_results

ROUNDS = 3  # the first round warms up
# The part that works in each stage: the engine samples, the trainer runs or trains the policy; else neither.
PART = {"sample": "engine", "evaluate": "engine", "teach": "trainer", "train": "trainer", "steer": "trainer"}

STAGE_SECONDS = """
WITH ends AS (SELECT round, max(written)::TIMESTAMP AS ended FROM stages WHERE stage = 'health' GROUP BY round),
     walls AS (SELECT round, epoch(ended - lag(ended) OVER (ORDER BY round)) AS wall FROM ends)
SELECT stage, avg(seconds) AS seconds, avg(wall) AS wall
FROM stages JOIN walls USING (round) WHERE round > 1 GROUP BY stage ORDER BY seconds DESC
"""


def main(out: Path) -> None:
    """Measure the available engines, and write the results."""
    rows = list(measure("transformers", []))
    if find_spec("vllm"):
        from padded import pad_heads

        with tempfile.TemporaryDirectory() as folder:
            rows += measure("vllm", [f"model.path={pad_heads(Path('data/tiny/model'), Path(folder) / 'model')}"])
    columns = {
        "engine": ("engine", ""),
        "stage": ("stage", ""),
        "turn": ("runs", ""),
        "seconds": ("seconds a round", ".2f"),
        "share": ("share", ".2f"),
    }
    write_results(out, "rounds", rows, columns)


def measure(engine: str, overrides: list[str]) -> Iterator[dict[str, Any]]:
    """One row per stage, one for the time between the stages, one per idle part, and one for the whole round."""
    from ogls.store import Store

    with tempfile.TemporaryDirectory() as root:
        settings = [f"root={root}", "name=round", f"rounds={ROUNDS}", f"rollout.engine={engine}", *overrides]
        settings += [f"tracking.uri=sqlite:///{root}/mlflow.db"]
        command = [sys.executable, "-m", "flows.cli", "train", "deployments/runs/tiny.toml"]
        subprocess.run(
            [*command, *(argument for s in settings for argument in ("--set", s))], check=True, capture_output=True
        )
        stages = run_query(Store(root), STAGE_SECONDS, run="round").to_pylist()
    wall = stages[0]["wall"]
    stages.append({"stage": "between the stages", "seconds": wall - sum(row["seconds"] for row in stages)})
    for row in stages:
        part = PART.get(row["stage"], "neither")
        yield {"engine": engine, "stage": row["stage"], "turn": part, **_share(row["seconds"], wall)}
    for part in ("engine", "trainer"):
        busy = sum(row["seconds"] for row in stages if PART.get(row["stage"]) == part)
        yield {"engine": engine, "stage": f"*{part} idle*", "turn": "", **_share(wall - busy, wall)}
    yield {"engine": engine, "stage": "*a round*", "turn": "", **_share(wall, wall)}


def _share(seconds: float, wall: float) -> dict[str, float]:
    return {"seconds": seconds, "share": seconds / wall}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
