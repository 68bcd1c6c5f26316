"""The table of rounds of a run as text and Markdown, and a few rollouts of a round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ogls.records import TABLES
from ogls.records.stages import STAGES
from ogls.stages.rounds import RoundRow
from ogls.store import RunStore

_STAGES = tuple(stage for stage in STAGES if stage.in_rounds)
_TABLES = tuple(stage.table for stage in _STAGES)
HEADINGS = (
    *("round", "accuracy", "95% interval", "greedy", "length", "truncated", "mixed", "KL"),
    *(stage.name for stage in _STAGES),
)


# Columns by importance: a narrow terminal shows the first ones that fit.
IMPORTANCE = ("round", "accuracy", "95% interval", "length", "greedy", "mixed", "KL", "truncated")
SHORT_LEGEND = "length in tokens; KL(target || base) in nats per token"
LEGEND = f"{SHORT_LEGEND}; sample to evaluate: wall time in seconds"


def round_cells(row: RoundRow) -> list[str]:
    """Return the cells of a row as text, in the order of HEADINGS."""
    s = row.summary

    def cell(name: str, format_spec: str) -> str:
        return format(s[name], format_spec) if s else "-"

    interval = f"{s['accuracy_low']:.3f}-{s['accuracy_high']:.3f}" if s else "-"
    seconds = [row.seconds.get(TABLES[t].stage) for t in _TABLES]
    return [
        str(row.round),
        cell("accuracy", ".3f"),
        interval,
        cell("greedy_accuracy", ".3f"),
        cell("mean_length", ".1f"),
        cell("truncated", ".1%"),
        "-" if row.mixed_groups is None else f"{row.mixed_groups} of {row.groups}",
        "-" if row.kl is None else f"{row.kl:.4f}",
        *("-" if t is None else f"{t:.1f}" for t in seconds),
    ]


def fitting_columns(rows: Sequence[RoundRow], width: int) -> list[int]:
    """Return the indices of the columns that fit in `width` characters, in the order of HEADINGS.

    The most important columns come first (`IMPORTANCE`, then the seconds of the stages from the left).
    """
    cells = [list(HEADINGS), *(round_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in cells) + 3 for i in range(len(HEADINGS))]  # padding and a border
    order = [HEADINGS.index(name) for name in (*IMPORTANCE, *(h for h in HEADINGS if h not in IMPORTANCE))]
    chosen, used = [], 1
    for index in order:
        if used + widths[index] > width:
            break
        chosen.append(index)
        used += widths[index]
    return sorted(chosen)


def round_line(row: RoundRow) -> str:
    """Return a round as one line for the log."""
    cells = dict(zip(HEADINGS, round_cells(row), strict=True))
    interval = f" ({cells['95% interval']})" if row.summary else ""
    parts = [f"{name} {cells[name]}" for name in ("greedy", "length", "mixed", "KL") if cells[name] != "-"]
    parts += [f"style {share:.0%}"] if (share := row.style.get("target_style_share")) is not None else []
    seconds = sum(row.seconds.values())
    return f"r{row.round:03d}  accuracy {cells['accuracy']}{interval}  {'  '.join(parts)}  {seconds:.1f} s"


def rounds_markdown(rows: Sequence[RoundRow]) -> str:
    """Return the table of rounds as Markdown, with the notices of the health checks."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|" + " ---: |" * len(HEADINGS)]
    lines += ["| " + " | ".join(round_cells(row)) + " |" for row in rows]
    notices = [f"**{row.health['notice']}**\n" for row in rows if row.health.get("notice")]
    return "\n".join([*lines, "", f"*{LEGEND}*", "", *notices])


def workers_markdown(run: RunStore, round_: int) -> str:
    """Return a table of what each worker did in the stages of a round as Markdown; empty if no worker did anything."""
    rows = []
    for stage in _STAGES:
        manifest = run.manifest(stage.table, round_)
        for name, did in (manifest.metrics.get("workers", {}) if manifest else {}).items():
            if isinstance(did, int):  # 0.3.0 counted the shards alone
                did = {"device": "-", "shards": did, "seconds": 0.0, "tokens": 0}
            rate = f"{did['tokens'] / did['seconds']:,.0f}" if did["tokens"] else "-"
            rows.append([stage.name, name, did["device"], str(did["shards"]), f"{did['seconds']:.1f}", rate])
    if not rows:
        return ""
    heading = ["stage", "worker", "device", "shards", "seconds", "tokens a second"]
    rule = ["---"] * 3 + ["---:"] * 3
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heading, rule, *rows))


def sample_rollouts(run: RunStore, round_: int, count: int = 3) -> list[dict[str, Any]]:
    """Return up to `count` training rollouts of a round, at most one per problem, with their problems and verdicts."""
    if not run.manifest("verdicts", round_):
        return []
    rows = run.read("trajectories", round_, ["problem_id", "sample", "text", "n_tokens"]).to_pylist()
    first = {row["problem_id"]: row for row in reversed(rows)}
    return with_verdicts(run, round_, list(first.values())[:count])


def with_verdicts(run: RunStore, round_: int, rollouts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rollouts with the columns of their verdicts, and with `problem` and `expected` (the answer) of their problems.

    A rollout that is not verified yet has the verdict and the answer None.
    """
    unverified = {"verdict": None, "outcome": None, "answer": None}
    verdicts = {}
    if run.manifest("verdicts", round_):
        verdicts = {(r["problem_id"], r["sample"]): r for r in run.read("verdicts", round_).to_pylist()}
    table = run.read("problems", 0, ["split", "problem_id", "problem", "answer"]).to_pylist()
    train = [r for r in table if r["split"] == "train"]
    problems = {r["problem_id"]: {"problem": r["problem"], "expected": r["answer"]} for r in train}
    return [
        {**row, **verdicts.get((row["problem_id"], row["sample"]), unverified), **problems[row["problem_id"]]}
        for row in rollouts
    ]
