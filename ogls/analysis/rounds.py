"""What happened in a run, round by round: the rows of the table, as data, text and markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ogls.records import TABLES
from ogls.records.stages import STAGES
from ogls.stages.summaries import read_first_summary
from ogls.store import RunStore

_STAGES = tuple(stage for stage in STAGES if stage.in_rounds)
_TABLES = tuple(stage.table for stage in _STAGES)
HEADINGS = (
    *("round", "accuracy", "95% interval", "greedy", "length", "truncated", "mixed", "KL"),
    *(stage.name for stage in _STAGES),
)


LEGEND = "length in tokens; KL(target || base) in nats a token; sample to evaluate: wall time in seconds"


@dataclass(frozen=True)
class RoundRow:
    """One round; a number is None if its stage is not done."""

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


def read_round(run: RunStore, round_: int) -> RoundRow:
    """A round from its manifests and the summary of the first benchmark."""
    found = {t: m for t in (*_TABLES, "style", "health") if (m := run.manifest(t, round_))}
    metrics = {t: m.metrics for t, m in found.items()}
    summary = None
    if "scores" in found:
        summary = read_first_summary(run, round_)
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


def read_rounds(run: RunStore, last: int | None = None) -> list[RoundRow]:
    """All rounds with a finished stage, up to `last`."""
    rounds = sorted({n for t in _TABLES for n in run.rounds(t)})
    return [read_round(run, n) for n in rounds if last is None or n <= last]


def round_cells(row: RoundRow) -> list[str]:
    """The cells of a row under HEADINGS, as text."""
    s = row.summary

    def of(name: str, form: str) -> str:
        return format(s[name], form) if s else "-"

    interval = f"{s['accuracy_low']:.3f}-{s['accuracy_high']:.3f}" if s else "-"
    seconds = [row.seconds.get(TABLES[t].stage) for t in _TABLES]
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


def round_line(row: RoundRow) -> str:
    """A round as one line for the log."""
    named = dict(zip(HEADINGS, round_cells(row), strict=True))
    interval = f" ({named['95% interval']})" if row.summary else ""
    shown = [f"{name} {named[name]}" for name in ("greedy", "length", "mixed", "KL") if named[name] != "-"]
    shown += [f"style {share:.0%}"] if (share := row.style.get("target_style_share")) is not None else []
    seconds = sum(row.seconds.values())
    return f"r{row.round:03d}  accuracy {named['accuracy']}{interval}  {'  '.join(shown)}  {seconds:.1f} s"


def rounds_markdown(rows: Sequence[RoundRow]) -> str:
    """The table of rounds as markdown."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|" + " ---: |" * len(HEADINGS)]
    lines += ["| " + " | ".join(round_cells(row)) + " |" for row in rows]
    said = [f"**{row.health['notice']}**\n" for row in rows if row.health.get("notice")]
    return "\n".join([*lines, "", f"*{LEGEND}*", "", *said])


def sample_rollouts(run: RunStore, round_: int, count: int = 3) -> list[dict[str, Any]]:
    """Some training rollouts of a round with their verdicts, at most one a problem."""
    if not run.manifest("verdicts", round_):
        return []
    verdicts = {(r["problem_id"], r["sample"]): r for r in run.read("verdicts", round_).to_pylist()}
    rows = run.read("trajectories", round_, ["problem_id", "sample", "text", "n_tokens"]).to_pylist()
    first = {row["problem_id"]: row for row in reversed(rows)}
    return [{**row, **verdicts[name, row["sample"]]} for name, row in list(first.items())[:count]]
