"""The evaluation summaries of a round: the one that is shown, and the one that rounds are chosen by."""

from __future__ import annotations

from typing import Any

from ogls.store import RunStore


def read_first_summary(run: RunStore, round_: int) -> dict[str, Any]:
    """The summary of the first benchmark in a round, which tables and figures show."""
    rows: list[dict[str, Any]] = run.read("summaries", round_).to_pylist()
    return next(row for row in rows if row["place"] == 0)


def read_deciding_summary(run: RunStore, round_: int) -> dict[str, Any]:
    """The summary that health checks and the best round are decided by: the holdout's, or else the first benchmark's.

    A benchmark that a round was chosen by is biased upwards for that round. With `problems.holdout` the benchmarks are
    not used for choosing.
    """
    rows: list[dict[str, Any]] = run.read("summaries", round_).to_pylist()
    holdout = next((row for row in rows if row["benchmark"] == "holdout"), None)
    return holdout or next(row for row in rows if row["place"] == 0)
