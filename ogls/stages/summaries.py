"""The evaluation summary that decides how good a round is."""

from __future__ import annotations

from typing import Any

from ogls.store import RunStore


def read_first_summary(run: RunStore, round_: int) -> dict[str, Any]:
    """The summary of the first benchmark in a round. Health checks and the best round are decided by it."""
    rows: list[dict[str, Any]] = run.read("summaries", round_).to_pylist()
    return next(row for row in rows if row["place"] == 0)
