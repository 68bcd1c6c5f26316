"""A whole round, by stage: what share of its wall time each takes, and who waits meanwhile.

    python tests/benchmarks/rounds.py OUT

The quickstart's configuration, as `ogls train` runs it (Prefect's flow, MLflow), with the transformers engine and, with
`make vllm`, with vLLM's; the mean of rounds 2 and 3. A round's time is from one health stage's end to the next one's;
what no stage accounts for is Prefect and MLflow. Writes OUT/rounds.md and .parquet.
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

from measured import publish

ROUNDS = 3  # the first one is warming up
# Whose turn it is: what rolls out, what runs or trains the policy, or neither.
TURN = {"sample": "engine", "evaluate": "engine", "teach": "trainer", "train": "trainer", "steer": "trainer"}

QUESTION = """
WITH ends AS (SELECT round, max(written)::TIMESTAMP AS ended FROM stages WHERE stage = 'health' GROUP BY round),
     walls AS (SELECT round, epoch(ended - lag(ended) OVER (ORDER BY round)) AS wall FROM ends)
SELECT stage, avg(seconds) AS seconds, avg(wall) AS wall
FROM stages JOIN walls USING (round) WHERE round > 1 GROUP BY stage ORDER BY seconds DESC
"""


def main(out: Path) -> None:
    rows = list(measure("transformers", []))
    if find_spec("vllm"):
        from padded import pad_heads

        with tempfile.TemporaryDirectory() as folder:
            rows += measure("vllm", [f"model.path={pad_heads(Path('data/tiny/model'), Path(folder) / 'model')}"])
    shown = {
        "engine": ("engine", ""),
        "stage": ("stage", ""),
        "turn": ("runs", ""),
        "seconds": ("seconds a round", ".2f"),
        "share": ("share", ".2f"),
    }
    publish(out, "rounds", rows, shown)


def measure(engine: str, overrides: list[str]) -> Iterator[dict[str, Any]]:
    """A row a stage, one for what is between the stages, and who was idle for how much of the round."""
    from ogls.store import Store

    with tempfile.TemporaryDirectory() as root:
        settings = [f"root={root}", "name=round", f"rounds={ROUNDS}", f"rollout.engine={engine}", *overrides]
        settings += [f"tracking.uri=sqlite:///{root}/mlflow.db"]
        command = [sys.executable, "-m", "flows.cli", "train", "deployments/runs/tiny.toml"]
        subprocess.run([*command, *(w for s in settings for w in ("--set", s))], check=True, capture_output=True)
        found = run_query(Store(root), QUESTION, run="round").to_pylist()
    wall = found[0]["wall"]
    found.append({"stage": "between the stages", "seconds": wall - sum(row["seconds"] for row in found)})
    for row in found:
        turn = TURN.get(row["stage"], "neither")
        yield {"engine": engine, "stage": row["stage"], "turn": turn, **_share(row["seconds"], wall)}
    for turn in ("engine", "trainer"):
        busy = sum(row["seconds"] for row in found if TURN.get(row["stage"]) == turn)
        yield {"engine": engine, "stage": f"*{turn} idle*", "turn": "", **_share(wall - busy, wall)}
    yield {"engine": engine, "stage": "*a round*", "turn": "", **_share(wall, wall)}


def _share(seconds: float, wall: float) -> dict[str, float]:
    return {"seconds": seconds, "share": seconds / wall}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
