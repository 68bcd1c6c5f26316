"""The time of `sample`, `teach` and `evaluate` with one and with two workers of one CPU core each.

    OMP_NUM_THREADS=1 python tests/benchmarks/workers.py OUT

A Ray cluster of two nodes with one CPU each runs on this machine. The work of a stage takes a worker 40 to 80 s.
Workers are started and have loaded the model before the clock starts, as in every stage of a run but its first. The
ratio is at best 0.5; other processes on the machine spoil it, so the table has the load before each measurement. The
row `waiting` is 40 shards that only wait for half a second: what handing out shards costs, whatever the load. Writes
OUT/workers.md and .parquet.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ogls.config import RunConfig
from ogls.execution.work import Job, OneByOne, Shard, ShardOutput
from ogls.records import VERDICTS
from ogls.stages.kept_models import KeptModels
from ogls.stages.registry import STAGES
from ogls.stages.run import Run
from ogls.stages.workers import end_workers, shared_pool

sys.path[:0] = ["tests"]

from conftest import small_config
from measured import write_results

SIZE = (
    "rounds=1",
    "problems.per_round=1024",
    "rollout.samples=8",
    "rollout.batch_size=64",
    "verify.shard_rollouts=512",
    "teacher.shard_groups=16",
    "evaluate.samples=1500",  # of 8 problems
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
        run = Run(small_config(root, *SIZE, f"execution.worker_count={count}"))
        shared_pool(run).await_workers(count)
        run.open()
        STAGES["prepare"](run, 0)
        yield waiting(run, count)
        for stage, round_ in (("evaluate", 0), ("sample", 1), ("verify", 1), ("teach", 1)):
            load, started = os.getloadavg()[0], time.perf_counter()
            workers = STAGES[stage](run, round_).metrics["workers"]
            seconds = time.perf_counter() - started
            assert len(workers) == count
            yield {
                "stage": stage,
                "seconds": seconds,
                "shards": sum(w["shards"] for w in workers.values()),
                "load": load,
            }
        end_workers()


def waiting(run: Run, count: int) -> dict[str, Any]:
    """The row of shards that compute nothing. Their workers have loaded the model then."""
    pool, load, shards = shared_pool(run), os.getloadavg()[0], [Shard(i, [0.5]) for i in range(40)]

    def open_work(config: RunConfig, round_: int, kept: dict[str, Any]) -> Any:
        Run(config, kept.setdefault("models", KeptModels())).load_policy()

        class Waiting(OneByOne):
            def compute(self, items: Sequence[float], progress: Any) -> ShardOutput:
                time.sleep(items[0])
                return ShardOutput(VERDICTS.schema.empty_table())

            def close(self) -> None:
                pass

        return Waiting()

    for part in (shards[:count], shards):  # the first loads the code and the model
        started = time.perf_counter()
        list(pool.carry_out(Job(pool.expected.config, 1, "verdicts", 0, open_work), part, print))
    return {"stage": "waiting", "seconds": time.perf_counter() - started, "shards": len(shards), "load": load}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
