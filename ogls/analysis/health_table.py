"""The health checks of a run in words, each with its sign and unit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# By check: what is measured, its unit, and whether the limit is the least or the most that is allowed.
WORDS = {
    "accuracy": ("accuracy, upper end of its 95% interval", "", "at least"),
    "short": ("median length", "tokens", "at least"),
    "long": ("95th percentile of the length", "tokens", "at most"),
    "repeats": ("completions that end in a loop", "%", "at most"),
    "low_entropy": ("entropy", "nats per token", "at least"),
    "high_entropy": ("entropy", "nats per token", "at most"),
    "truncated": ("completions truncated at max_tokens", "%", "at most"),
    "stop_mass": ("probability of the stop token where a completion ends", "%", "at least"),
    "kl_base": ("KL(policy || base)", "nats per token", "at most"),
}


def health_in_words(rows: Sequence[Mapping[str, Any]], evaluations: int) -> dict[str, Any]:
    """Return one sentence about the checks of a run, and its checks as rows of a table, failed ones first.

    `rows` are those of the named query `health` for one run; `evaluations` is the number of rounds that were checked.
    """
    measured = [r for r in rows if r["newest"] is not None and r["newest_limit"] is not None]
    failed = [r for r in measured if r["failed_rounds"]]
    left_out = [WORDS[r["check"]][0] for r in rows if r not in measured and r["check"] in WORDS]
    if not measured:
        sentence = "No check has been made yet."
    elif failed:
        names = ", ".join(dict.fromkeys(WORDS.get(r["check"], (r["check"],))[0] for r in failed))
        sentence = f"\u2717 {len(failed)} of {len(measured)} checks failed in some round: {names}."
    else:
        sentence = f"\u2713 All {len(measured)} checks passed in all {evaluations} checked rounds."
    if left_out:
        sentence += f" Not measured: {', '.join(left_out)}."
    return {"sentence": sentence, "failed": bool(failed), "rows": [_row(r, evaluations) for r in measured]}


def _row(row: Mapping[str, Any], evaluations: int) -> dict[str, Any]:
    about, unit, sign = WORDS.get(row["check"], (row["check"], "", "limit"))
    holds = row["newest"] >= row["newest_limit"] if sign == "at least" else row["newest"] <= row["newest_limit"]
    return {
        "check": row["check"],
        "about": about,
        "newest": with_unit(row["newest"], unit),
        "limit": f"{sign} {with_unit(row['newest_limit'], unit)}",
        "holds": holds,
        "failed": row["failed_rounds"],
        "history": f"failed in {row['failed_rounds']} of {evaluations} rounds, first in round {row['first_failed']}"
        if row["failed_rounds"]
        else f"passed in all {evaluations} rounds",
        "action": row["action"],
    }


def with_unit(value: float, unit: str) -> str:
    """Return a number with three significant digits and its unit; a share as a percentage."""
    if unit == "%":
        return f"{100 * value:.3g}%"
    if unit == "tokens":
        return f"{value:.0f} tokens"
    return f"{value:.3g}" + (f" {unit}" if unit else "")
