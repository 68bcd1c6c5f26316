"""What a call takes: its time, and the bytes that torch has alive at its peak. How a benchmark's results are kept."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


def seconds(call: Callable[[], object], times: int = 3) -> float:
    """The median of some calls' wall time."""
    found = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def peak_bytes(call: Callable[[], object]) -> int:
    """Peak of the bytes that torch gave out during the call and had not yet been given back.

    On a CPU it is counted from the allocator's own events and not from the process's size, which has what other things,
    and the C library's store of freed memory, left there. With CUDA it is CUDA's own count.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(trace))
        events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: (e["ts"], e["args"]["Ev Idx"])):
        alive += event["args"]["Bytes"]
        peak = max(peak, alive)
    return peak


def publish(out: Path, name: str, rows: Sequence[Mapping[str, Any]], shown: Mapping[str, tuple[str, str]]) -> None:
    """Keep a benchmark's rows as OUT/NAME.parquet, and as a table OUT/NAME.md, which the documentation has.

    `shown` gives of each field in the table its heading and how its values are formatted.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    out.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), out / f"{name}.parquet")
    lines = ["| " + " | ".join(heading for heading, _ in shown.values()) + " |"]
    lines.append("| " + " | ".join("---:" if form else "---" for _, form in shown.values()) + " |")
    for row in rows:
        cells = ("" if row[field] is None else format(row[field], form) for field, (_, form) in shown.items())
        lines.append("| " + " | ".join(cells) + " |")
    (out / f"{name}.md").write_text("\n".join(lines) + "\n")
    print((out / f"{name}.md").read_text(), flush=True)
