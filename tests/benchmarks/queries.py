"""Time and memory of the named queries, on stores of ten thousand to a million rollouts.

    python tests/benchmarks/queries.py OUT [ROLLOUTS ...]

Writes OUT/queries.parquet (one row per query and size), OUT/queries.svg and OUT/queries.md. Each size is measured in a
separate process; each time is the median of three. Two ratios are measured at each size in the same process: a query
after creating the views of all tables, and the table `steered` computed from targets, as before schema version 3.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ogls.store import run_query

sys.path[:0] = ["tests"]

import measured

SIZES = (10_000, 32_000, 100_000, 320_000, 1_000_000)


def measure(root: str) -> dict[str, Any]:
    """Seconds of each named query and of `ogls runs`, the ratios, and the peak resident memory in MiB."""
    from typer.testing import CliRunner

    from flows.cli import app
    from ogls.store import Store, named_queries
    from ogls.store.query import define_views

    store = Store(root)
    seconds = {
        name: measured.median_seconds(lambda sql=sql: run_query(store, sql)) for name, sql in named_queries().items()
    }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    seconds["(ogls runs)"] = measured.median_seconds(lambda: CliRunner().invoke(app, ["runs", "--root", root]))
    steered_from_targets = (
        (files("ogls.store") / "sql" / "older" / "steered.sql").read_text().replace("{targets}", "FROM targets")
    )
    max_kl = "SELECT max(kl) FROM "

    def query_with_all_views() -> None:
        import duckdb

        with duckdb.connect() as con:
            define_views(con, store)
            con.sql(named_queries()["rounds"]).to_arrow_table()

    ratios = {
        "every view made first": measured.median_seconds(query_with_all_views) / seconds["rounds"],
        "rollouts' sums from targets": measured.median_seconds(
            lambda: run_query(store, f"{max_kl} ({steered_from_targets})")
        )
        / measured.median_seconds(lambda: run_query(store, f"{max_kl} steered")),
    }
    return {"seconds": seconds, "ratios": ratios, "peak_mib": peak}


def main(out: Path, sizes: list[int]) -> None:
    """Measure each size in a separate process, and write the results."""
    out.mkdir(parents=True, exist_ok=True)
    rows, ratios = [], {}
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            script = [sys.executable, str(Path(__file__))]
            subprocess.run(
                [sys.executable, str(Path(__file__).with_name("generate.py")), folder, str(size)], check=True
            )
            process = subprocess.run([*script, "--measure", folder], check=True, capture_output=True, text=True)
        result = json.loads(process.stdout.splitlines()[-1])
        ratios[size] = result["ratios"]
        rows += [
            {"rollouts": size, "query": name, "seconds": s, "peak_mib": result["peak_mib"]}
            for name, s in result["seconds"].items()
        ]
        print(size, result, flush=True)
    pq.write_table(pa.Table.from_pylist(rows), out / "queries.parquet")
    (out / "queries.svg").write_text(figure(rows))
    (out / "queries.md").write_text(page(rows, ratios))


def figure(rows: list[dict[str, Any]]) -> str:
    """The SVG figure of seconds against rollouts; the six slowest queries are labeled."""
    import io

    import matplotlib as mpl
    from matplotlib.figure import Figure

    from ogls.analysis.figures import line_style

    largest = max(r["rollouts"] for r in rows)
    slowest = sorted((r for r in rows if r["rollouts"] == largest), key=lambda r: -r["seconds"])[:6]
    with mpl.rc_context({"svg.hashsalt": "queries", "svg.fonttype": "none"}):
        plot = Figure(figsize=(8, 4.5), layout="constrained")
        axes = plot.subplots()
        for name in {r["query"] for r in rows} - {r["query"] for r in slowest}:
            query_rows = [r for r in rows if r["query"] == name]
            axes.plot(
                [r["rollouts"] for r in query_rows], [r["seconds"] for r in query_rows], color="#bbbbbb", linewidth=0.8
            )
        for number, top in enumerate(slowest):
            query_rows = [r for r in rows if r["query"] == top["query"]]
            axes.plot(
                [r["rollouts"] for r in query_rows],
                [r["seconds"] for r in query_rows],
                **line_style(number, top["query"]),
            )
        axes.axhline(2, color="#555555", linestyle=":", label="two seconds")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("rollouts in the store, all distilled")
        axes.set_ylabel("seconds a question")
        axes.legend(fontsize=8)
        sink = io.StringIO()
        plot.savefig(sink, format="svg", metadata={"Date": None, "Creator": None})
    return sink.getvalue()


def page(rows: list[dict[str, Any]], ratios: dict[int, dict[str, float]]) -> str:
    """The Markdown table of seconds by query and size, with the peak memory and the ratios."""
    sizes = list(dict.fromkeys(r["rollouts"] for r in rows))
    seconds = {(r["query"], r["rollouts"]): r["seconds"] for r in rows}
    peaks = {r["rollouts"]: r["peak_mib"] for r in rows}
    lines = ["| seconds | " + " | ".join(f"{s:,}" for s in sizes) + " |", "| --- |" + " ---: |" * len(sizes)]
    for name in dict.fromkeys(r["query"] for r in rows):
        lines.append(f"| {name} | " + " | ".join(f"{seconds[name, s]:.2f}" for s in sizes) + " |")
    lines.append("| peak memory of all, MiB | " + " | ".join(f"{peaks[s]:.0f}" for s in sizes) + " |")
    for name in next(iter(ratios.values())):
        lines.append(f"| *{name}: times as long* | " + " | ".join(f"{ratios[s][name]:.1f}" for s in sizes) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if sys.argv[1] == "--measure":
        print(json.dumps(measure(sys.argv[2])))
    else:
        main(Path(sys.argv[1]), [int(a) for a in sys.argv[2:]] or list(SIZES))
