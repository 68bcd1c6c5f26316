"""Helpers of the benchmarks: the time and the peak memory of a call, and the files with the results."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


def median_seconds(call: Callable[[], object], repeats: int = 3) -> float:
    """The median wall time of `repeats` calls, in seconds, each with all that it starts on a GPU."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        wait_for_gpu()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def wait_for_gpu() -> None:
    """Wait until the GPU has done what this process has started on it, if it has used one."""
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def device_name() -> str:
    """The name of the GPU, or the number of CPU threads."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"


def peak_flops(name: str) -> float | None:
    """The peak FLOP/s of 16-bit matrix products in the data sheet of a GPU; None if `ogls plan` does not know it."""
    from ogls.planning.gpus import GPUS

    name = name.lower().replace(" ", "")
    return next((g.flops for g in GPUS.values() if g.name != "cpu" and g.name.split("-")[0] in name), None)


def peak_bytes(call: Callable[[], object]) -> int:
    """Peak memory in bytes that torch allocated during the call, beyond what was allocated before.

    On a CPU it is summed from the allocation events of the profiler: the size of the process includes memory that was
    allocated elsewhere, and memory that the C library keeps after it was freed. On CUDA it is CUDA's peak statistic.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda e: (e["ts"], e["args"]["Ev Idx"])):
        allocated += event["args"]["Bytes"]
        peak = max(peak, allocated)
    return peak


def write_results(
    out: Path,
    name: str,
    rows: Sequence[Mapping[str, Any]],
    columns: Mapping[str, tuple[str, str]],
    show: bool = True,
) -> None:
    """Write the rows of a benchmark to OUT/NAME.parquet, and as a Markdown table for the docs to OUT/NAME.md.

    `columns` maps each field of the table to (heading, format specification); the Parquet file has all fields.
    `show` prints the table.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    out.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), out / f"{name}.parquet")
    lines = ["| " + " | ".join(heading for heading, _ in columns.values()) + " |"]
    lines.append("| " + " | ".join("---:" if format_ else "---" for _, format_ in columns.values()) + " |")
    for row in rows:
        cells = ("" if row[field] is None else format(row[field], format_) for field, (_, format_) in columns.items())
        lines.append("| " + " | ".join(cells) + " |")
    (out / f"{name}.md").write_text("\n".join(lines) + "\n")
    if show:
        print((out / f"{name}.md").read_text(), flush=True)
