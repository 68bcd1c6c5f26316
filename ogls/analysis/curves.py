"""The training curves of the report as data: what `pages/charts.js` draws, per round and per optimizer step.

A group of panels shares one axis, so that a cursor and a zoom hold for all of them. Every panel has the same measure
twice if it can be seen twice: by round (`round`) and by optimizer step of the run (`step`); an evaluation is placed at
the last step before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ogls.stages.run import Run
from ogls.store import run_query

MAX_POINTS = 1500  # points of a curve; of longer ones, neighbours are averaged
_BY_ROUND = """
SELECT round, max(step) AS step, sum(loss * tokens) / sum(tokens) AS loss, avg(grad_norm) AS grad_norm,
       avg(learning_rate) AS learning_rate FROM updates GROUP BY round ORDER BY round
"""
_TARGETS = """
SELECT round, sum(kl * tokens) / sum(tokens) AS kl_target, sum(target_entropy * tokens) / sum(tokens) AS target_entropy
FROM steered GROUP BY round ORDER BY round
"""
_BY_STEP = "SELECT step, loss, grad_norm, learning_rate FROM updates ORDER BY step"


@dataclass(frozen=True)
class _Panel:
    """One measure: its columns (drawn as lines of different dash), title and unit."""

    title: str
    unit: str
    lines: Mapping[str, str]  # column: name of the line; empty if the panel has one line
    band: tuple[str, str] | None = None  # columns of the band around the first line
    about: str = ""


_PANELS = (
    _Panel(
        "Accuracy",
        "",
        {"accuracy": "avg@k", "greedy_accuracy": "greedy"},
        ("accuracy_low", "accuracy_high"),
        "Band: 95% bootstrap interval over problems.",
    ),
    _Panel("pass@k, k = samples per problem", "", {"pass_at_k": ""}),
    _Panel("Loss", "nats per token", {"loss": ""}),
    _Panel("Gradient norm before clipping", "", {"grad_norm": ""}),
    _Panel("Learning rate", "", {"learning_rate": ""}),
    _Panel("KL(policy || base)", "nats per token", {"kl_base": ""}, about="On completions of the first benchmark."),
    _Panel("KL(target || base)", "nats per token", {"kl_target": ""}, about="On the rollouts that are distilled."),
    _Panel("Entropy", "nats per token", {"entropy": "policy", "target_entropy": "target"}),
    _Panel(
        "Length", "tokens", {"mean_length": ""}, ("length_p50", "length_p95"), "Band: median to the 95th percentile."
    ),
    _Panel("Truncated completions", "share", {"truncated": ""}),
    _Panel("Completions that end in a loop", "share", {"repeated": ""}),
)


def training_curves(runs: Sequence[Run], summaries: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Return the panels of the training curves of some runs, and the titles of those that are 0 everywhere.

    `summaries` has the rows of the table `summaries` for the first benchmark, by run and in order of rounds.
    """
    tables = [_read(run, summaries[run.config.name]) for run in runs]
    panels, zero = [], []
    for panel in _PANELS:
        by_axis = {
            axis: [s for index, table in enumerate(tables) for s in _series(panel, index, table[axis], axis)]
            for axis in ("round", "step")
        }
        values = [abs(y) for lines in by_axis.values() for s in lines for y in (*s["y"], *s.get("high", ())) if y]
        if not values:
            if any(s["y"] for lines in by_axis.values() for s in lines):
                zero.append(panel.title)
            continue
        panels.append({"title": panel.title, "unit": panel.unit, "about": panel.about, **by_axis})
    return {"runs": [run.config.name for run in runs], "axes": ["round", "step"], "panels": panels, "zero": zero}


def steering_curves(runs: Sequence[str], positions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the panels of the steering by position in the rollout."""
    panels = []
    for title, unit, column in (
        ("Norm of the direction", "logits", "direction_norm"),
        ("KL(target || base)", "nats per token", "kl"),
    ):
        rows = [{**r, "position": (r["position_from"] + r["position_to"]) / 2} for r in positions]
        lines = []
        for index, run in enumerate(runs):
            of_run = [r for r in rows if r["run"] == run]
            lines += _series(_Panel(title, unit, {column: ""}), index, of_run, "position")
        panels.append({"title": title, "unit": unit, "about": "", "position": lines})
    return {"runs": list(runs), "axes": ["position"], "panels": panels, "zero": []}


def _read(run: Run, summaries: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of a run by axis; a row has the columns that were measured there."""

    def rows(sql: str) -> list[dict[str, Any]]:
        return run_query(run.store, sql, run.config.name).to_pylist()

    trained = rows(_BY_ROUND)
    by_round: dict[int, dict[str, Any]] = {}
    for row in (*trained, *rows(_TARGETS), *summaries):
        by_round.setdefault(row["round"], {}).update({k: v for k, v in row.items() if v is not None})
    last_step = {row["round"]: row["step"] for row in trained}
    evaluated = [
        {**by_round[r], "step": max((s for n, s in last_step.items() if n <= r), default=0)} for r in sorted(by_round)
    ]
    measured_by_step = {"loss", "grad_norm", "learning_rate"}
    at_rounds = [{k: v for k, v in row.items() if k not in measured_by_step} for row in evaluated]
    return {"round": evaluated, "step": [*at_rounds, *_thinned(rows(_BY_STEP))]}


def _thinned(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return at most MAX_POINTS rows: means over equally many neighbours."""
    width = -(-len(rows) // MAX_POINTS) or 1
    parts = [rows[i : i + width] for i in range(0, len(rows), width)]
    return [{k: _mean([row[k] for row in part]) for k in rows[0]} for part in parts]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def _series(panel: _Panel, run: int, rows: Sequence[Mapping[str, Any]], axis: str) -> list[dict[str, Any]]:
    """Return the lines of a panel for one run: x and y, with `low` and `high` if the line has a band."""
    lines = []
    for dash, (column, name) in enumerate(panel.lines.items()):
        measured = [r for r in rows if r.get(column) is not None and r.get(axis) is not None]
        if not measured:
            continue
        line: dict[str, Any] = {"run": run, "name": name, "dash": dash}
        line |= {"x": [r[axis] for r in measured], "y": [_short(r[column]) for r in measured]}
        if panel.band and not dash and all(r.get(c) is not None for r in measured for c in panel.band):
            low, high = ([_short(r[c]) for r in measured] for c in panel.band)
            line |= {"low": low, "high": high}
        lines.append(line)
    return lines


def _short(value: float) -> float:
    """Return a number with five significant digits, which is more than a pixel shows."""
    return float(f"{value:.5g}")
