"""What happened in a run, round by round, for people: the rows of the table, as data and as markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ogls.records import TABLES
from ogls.runstore import RunStore

STAGE_TABLES = ("trajectories", "verdicts", "teacher_states", "targets", "updates", "scores")
HEADINGS = (
    *("round", "accuracy", "95% interval", "greedy", "length", "truncated", "mixed", "KL"),
    *(TABLES[t].stage for t in STAGE_TABLES),
)
LEGEND = "length in tokens; KL(target || base) in nats a token; sample to evaluate: wall time in seconds"


@dataclass(frozen=True)
class RoundRow:
    """One round; a number is None where its stage has not been done."""

    round: int
    summary: dict[str, Any] | None
    groups: int | None
    mixed_groups: int | None
    kl: float | None
    loss: float | None
    seconds: dict[str, float]
    style: dict[str, float]
    tokens: dict[str, float]
    health: dict[str, Any]


def round_row(run: RunStore, round_: int) -> RoundRow:
    """What the manifests and the summary of a round say (the first benchmark's)."""
    found = {t: m for t in (*STAGE_TABLES, "style", "health") if (m := run.manifest(t, round_))}
    metrics = {t: m.metrics for t, m in found.items()}
    summary = None
    if "scores" in found:
        summary = first_summary(run, round_)
    return RoundRow(
        round_,
        summary,
        metrics.get("verdicts", {}).get("groups"),
        metrics.get("verdicts", {}).get("mixed_groups"),
        metrics.get("targets", {}).get("kl"),
        metrics.get("updates", {}).get("loss"),
        {TABLES[t].stage: float(m.get("seconds", 0)) for t, m in metrics.items()},
        metrics.get("style", {}).get("numbers", {}),
        {TABLES[t].stage: float(m["tokens"]) for t, m in metrics.items() if "tokens" in m},
        metrics.get("health", {}),
    )


def first_summary(run: RunStore, round_: int) -> dict[str, Any]:
    """The summary of the first benchmark, by which a round is judged."""
    rows: list[dict[str, Any]] = run.read("summaries", round_).to_pylist()
    return next(row for row in rows if row["place"] == 0)


def round_rows(run: RunStore, last: int | None = None) -> list[RoundRow]:
    """Every round that has any finished stage, up to `last`."""
    rounds = sorted({n for t in STAGE_TABLES for n in run.rounds(t)})
    return [round_row(run, n) for n in rounds if last is None or n <= last]


def cells(row: RoundRow) -> list[str]:
    """A row under HEADINGS, as text."""
    s = row.summary

    def of(name: str, form: str) -> str:
        return format(s[name], form) if s else "-"

    interval = f"{s['accuracy_low']:.3f}-{s['accuracy_high']:.3f}" if s else "-"
    seconds = [row.seconds.get(TABLES[t].stage) for t in STAGE_TABLES]
    return [
        str(row.round),
        of("accuracy", ".3f"),
        interval,
        of("greedy_accuracy", ".3f"),
        of("mean_length", ".1f"),
        of("truncated", ".1%"),
        "-" if row.mixed_groups is None else f"{row.mixed_groups} of {row.groups}",
        "-" if row.kl is None else f"{row.kl:.4f}",
        *("-" if t is None else f"{t:.1f}" for t in seconds),
    ]


def line(row: RoundRow) -> str:
    """A row as one line, for the log."""
    named = dict(zip(HEADINGS, cells(row), strict=True))
    interval = f" ({named['95% interval']})" if row.summary else ""
    shown = [f"{name} {named[name]}" for name in ("greedy", "length", "mixed", "KL") if named[name] != "-"]
    shown += [f"style {share:.0%}"] if (share := row.style.get("target_style_share")) is not None else []
    seconds = sum(row.seconds.values())
    return f"r{row.round:03d}  accuracy {named['accuracy']}{interval}  {'  '.join(shown)}  {seconds:.1f} s"


def markdown(rows: Sequence[RoundRow]) -> str:
    """The table as markdown."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|" + " ---: |" * len(HEADINGS)]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    said = [f"**{row.health['notice']}**\n" for row in rows if row.health.get("notice")]
    return "\n".join([*lines, "", f"*{LEGEND}*", "", *said])


def samples(run: RunStore, round_: int, count: int = 3) -> list[dict[str, Any]]:
    """A few training rollouts of a round with their verdicts, one a problem."""
    if not run.manifest("verdicts", round_):
        return []
    verdicts = {(r["problem_id"], r["sample"]): r for r in run.read("verdicts", round_).to_pylist()}
    rows = run.read("trajectories", round_, ["problem_id", "sample", "text", "n_tokens"]).to_pylist()
    first = {row["problem_id"]: row for row in reversed(rows)}
    return [{**row, **verdicts[name, row["sample"]]} for name, row in list(first.items())[:count]]
