"""What a long run costs at each step: requests, bytes and seconds of a resume, of publishing a round, and of listings.

    python tests/benchmarks/history.py OUT [ROUNDS ...]

One round of the tiny world is trained, and copied to a run of 20, of 200 and of 2,000 rounds (`tests/history.py`); the
newest round is a real one. Each is measured on a local disk and, up to 200 rounds, in a bucket of moto's S3 server with
30 ms added to each request. Prefect and MLflow are not called: what they cost is not in the store. Writes
OUT/history.md and .parquet.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path[:0] = ["tests"]

from conftest import carry_out, small_config
from history import counted, make_history
from measured import write_results
from s3server import CREDENTIALS, S3Server

ROUNDS = (20, 200, 2_000)
S3_ROUNDS = 200  # a larger bucket takes moto an hour to fill
DELAY = 0.03  # seconds added to each request to the S3 server


def main(out: Path, sizes: list[int]) -> None:
    """Measure every size on both stores, and write the results."""
    os.environ.update(CREDENTIALS)
    server = S3Server()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        source = carry_out(small_config(f"{folder}/source", "rounds=1", "problems.per_round=2"))
        for size in sizes:
            server.delay = 0.0
            stores = {"disk": f"{folder}/{size}"} | (
                {"S3": server.bucket(f"rounds-{size}")} if size <= S3_ROUNDS else {}
            )
            for name, root in stores.items():
                rows += ({"store": name, "rounds": size, **row} for row in measure(source, root, size, server))
                print(rows[-1], flush=True)
    server.stop()
    columns = {
        "step": ("step", ""),
        "store": ("store", ""),
        "rounds": ("rounds", ","),
        "reads": ("reads", ","),
        "lists": ("listings", ","),
        "writes": ("writes", ","),
        "kib": ("KiB read", ",.0f"),
        "seconds": ("seconds", ".2f"),
    }
    order = list(dict.fromkeys(row["step"] for row in rows))
    write_results(out, "history", sorted(rows, key=lambda r: (order.index(r["step"]), r["store"])), columns)


def measure(source: Any, root: str, size: int, server: S3Server) -> Iterator[dict[str, Any]]:
    """One row per step for a run of `size` rounds."""
    from ogls.analysis.watch import read_snapshot
    from ogls.stages.resume import is_trained, needed_optimizers, resume_round
    from ogls.stages.rounds import read_rounds, record_round
    from ogls.stages.run import Run
    from ogls.store.retention import drop_old_files
    from tasks.publish import shown_rounds

    history = make_history(source, root, size - 1)
    drop_old_files(history.records, 2, "optimizers", needed_optimizers(history))
    config = small_config(root, f"rounds={size}", "problems.per_round=2")
    carry_out(config)
    record_round(history.records, size)

    def resume() -> None:
        run = Run(config)
        with run.records.lock("train"):
            run.open()
            assert resume_round(run) == size
            assert is_trained(run, size)

    def publish() -> None:
        run = Run(config)
        record_round(run.records, size)
        assert shown_rounds(run, size)[-1].round == size
        drop_old_files(run.records, 2, "optimizers", needed_optimizers(run))

    def list_run() -> None:
        from flows.store_commands import _run_row

        assert _run_row(Run(config).records)["rounds"] == size

    def rebuild() -> None:
        for name in Run(config).records.storage.list_names(f"{config.name}/rounds"):
            history.records.storage.remove(f"{config.name}/rounds/{name}")
        record_round(history.records, size)

    steps: dict[str, Callable[[], Any]] = {
        "resume": resume,
        "publish a round": publish,
        "`ogls runs`, one run": list_run,
        "`ogls watch`, first screen": lambda: read_snapshot(Run(config)),
        "table of all rounds": lambda: read_rounds(Run(config).records),
        "rebuild the summary": rebuild,
    }
    server.delay = DELAY
    for step, work in steps.items():
        with counted() as cost:
            started = time.perf_counter()
            work()
            seconds = time.perf_counter() - started
        counts = {"reads": cost.reads, "lists": cost.lists, "writes": cost.writes}
        yield {"step": step, **counts, "kib": cost.read_bytes / 1024, "seconds": seconds}


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(a) for a in sys.argv[2:]] or list(ROUNDS))
