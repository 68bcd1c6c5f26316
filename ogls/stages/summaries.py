"""The evaluation summary by which a round is judged."""

from __future__ import annotations

from typing import Any

from ogls.store import RunStore


def read_first_summary(run: RunStore, round_: int) -> dict[str, Any]:
    """The summary of the first benchmark, by which a round is judged."""
    rows: list[dict[str, Any]] = run.read("summaries", round_).to_pylist()
    return next(row for row in rows if row["place"] == 0)
