"""The time of a stage with one and with two workers of one CPU core each.

    OMP_NUM_THREADS=1 python tests/benchmarks/workers.py OUT

Carries out `sample`, `teach` and `evaluate` of the tiny world on a Ray cluster of two nodes with one CPU each on this
machine, with work for about a minute on one worker. Workers are started, and have loaded the model, before the clock
starts: they stay for the whole run. The ratio is at best 0.5. Writes OUT/workers.md and .parquet. Other processes on
the machine spoil the ratio: the table has the load before each measurement.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ogls.stages.registry import STAGES
from ogls.stages.run import Run
from ogls.stages.workers import end_workers, shared_pool

sys.path[:0] = ["tests"]

from conftest import small_config
from measured import write_results

STAGE_ROUNDS = (("sample", 1), ("verify", 1), ("teach", 1), ("evaluate", 1))
SIZE = (
    "rounds=1",
    "problems.per_round=256",
    "rollout.samples=8",
    "rollout.batch_size=64",
    "verify.shard_rollouts=64",
    "teacher.shard_groups=8",
    'teacher.pools=["reference", "correct", "incorrect"]',
    "evaluate.samples=32",
    "evaluate.batch_size=64",
    "execution.workers=ray",
)


def main(out: Path) -> None:
    """Measure one and two workers, and write the times and ratios."""
    import ray
    from ray.cluster_utils import Cluster

    size = {"num_cpus": 1, "object_store_memory": 10**8}
    cluster = Cluster(initialize_head=True, head_node_args={**size, "include_dashboard": False})
    cluster.add_node(**size)
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        one, two = ({row["stage"]: row for row in measure(count)} for count in (1, 2))
    finally:
        ray.shutdown()
        cluster.shutdown()
    rows = [
        {
            "stage": stage,
            "shards": one[stage]["shards"],
            "one": one[stage]["seconds"],
            "two": two[stage]["seconds"],
            "ratio": two[stage]["seconds"] / one[stage]["seconds"],
            "load": max(one[stage]["load"], two[stage]["load"]),
        }
        for stage in one
    ]
    columns = {
        "stage": ("stage", ""),
        "shards": ("shards", ""),
        "one": ("seconds, one worker", ".1f"),
        "two": ("seconds, two workers", ".1f"),
        "ratio": ("ratio", ".2f"),
        "load": ("load of the machine before", ".1f"),
    }
    write_results(out, "workers", rows, columns)


def measure(count: int) -> Iterator[dict[str, Any]]:
    """A row a stage: its seconds with `count` workers."""
    with tempfile.TemporaryDirectory() as root:
        config = small_config(root, *SIZE, f"execution.worker_count={count}")
        shared_pool(Run(config)).await_workers(count)
        run = Run(config)
        run.open()
        STAGES["prepare"](run, 0)
        STAGES["sample"](run, 1)  # the workers load the model
        end = [("train", 1)]
        for stage, round_ in (*STAGE_ROUNDS[:3], ("steer", 1), *end, STAGE_ROUNDS[3]):
            if stage == "sample":
                run.records.storage.remove(f"{config.name}/trajectories/round=001/manifest.json")
            load, started = os.getloadavg()[0], time.perf_counter()
            result = STAGES[stage](run, round_)
            manifest = run.records.manifest(TABLES[stage], round_) if stage in TABLES else None
            if (stage, round_) in STAGE_ROUNDS and manifest:
                shards = sum(result.metrics["workers"].values())
                yield {"stage": stage, "seconds": time.perf_counter() - started, "shards": shards, "load": load}
        end_workers()


TABLES = {"sample": "trajectories", "verify": "verdicts", "teach": "teacher_states", "evaluate": "scores"}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
