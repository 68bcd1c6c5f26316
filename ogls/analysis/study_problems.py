"""A study by problem: how often each problem is solved, gains since before the training, and differences of methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ogls.evaluation.metrics import bootstrap_interval
from ogls.seeds import derive_seed
from ogls.stages.run import Run
from ogls.stages.summaries import read_first_summary

_RESAMPLES = 2000
DECODINGS = ("sampled", "greedy")
Solved = dict[str, list[bool]]  # whether each completion of a problem is correct, by problem


def read_solved(run: Run, round_: int) -> dict[str, Solved]:
    """Return what an evaluation of the first benchmark solved, by decoding."""
    benchmark = read_first_summary(run.records, round_)["benchmark"]
    solved: dict[str, Solved] = {decoding: {} for decoding in DECODINGS}
    columns = ["benchmark", "problem_id", "greedy", "verdict"]
    for row in run.records.read("scores", round_, columns).to_pylist():
        if row["benchmark"] == benchmark:
            solved[DECODINGS[row["greedy"]]].setdefault(row["problem_id"], []).append(row["verdict"] == "correct")
    return solved


def gain_rows(
    before: Mapping[tuple[str, int], Mapping[str, Solved]],
    after: Mapping[tuple[str, int], Mapping[str, Solved]],
    references: Mapping[str, str],
) -> list[dict[str, Any]]:
    """Return two rows a method, sampled and greedy: its gain, and the difference of its last round from its reference.

    `before` and `after` have the first and the last evaluation by (method, seed). A problem's accuracy is its mean over
    completions and seeds (for a difference, the seeds that both methods have). Gains and differences are paired by
    problem; their 95% intervals are bootstrap intervals over problems, for these seeds.
    """
    rows = []
    for method, reference in references.items():
        seeds = [s for m, s in after if m == method]
        shared = [s for m, s in after if m == reference and s in seeds]
        for decoding in DECODINGS:
            first, last = (_by_problem([of[method, s][decoding] for s in seeds]) for of in (before, after))
            row: dict[str, Any] = {"method": method, "decoding": decoding, "problems": len(last)}
            row |= {"before": _mean(first), "after": _mean(last), "gain": _difference(last, first, method)}
            row["difference"] = None
            if method != reference and shared:
                ours, theirs = (_by_problem([after[m, s][decoding] for s in shared]) for m in (method, reference))
                row["difference"] = _difference(ours, theirs, method)
            rows.append(row)
    return rows


def _by_problem(seeds: list[Solved]) -> dict[str, float]:
    """The accuracy of each problem that all seeds have evaluated."""
    problems = sorted(set.intersection(*map(set, seeds)))
    return {p: float(np.mean([np.mean(solved[p]) for solved in seeds])) for p in problems}


def _mean(accuracies: Mapping[str, float]) -> float:
    return float(np.mean([*accuracies.values()]))


def _difference(
    ours: Mapping[str, float], theirs: Mapping[str, float], method: str
) -> tuple[float, float, float] | None:
    """The mean difference over the problems of both, and its interval; None if they share none."""
    differences = np.array([ours[p] - theirs[p] for p in ours if p in theirs])
    if not len(differences):
        return None
    return float(differences.mean()), *bootstrap_interval(differences, _RESAMPLES, derive_seed(0, "study", method))


def gains_markdown(rows: list[dict[str, Any]], reference: str) -> str:
    """Return the table of `gain_rows`: a line a method, with the columns of its two rows in their order."""
    cells: dict[str, list[str]] = {}
    for r in rows:
        of_method = cells.setdefault(r["method"], [r["method"]])
        of_method += [
            digits(r["before"]),
            digits(r["after"]),
            difference_cell(r["gain"]),
            difference_cell(r["difference"]),
        ]
    names = ["before", "after", "gain", f"difference from {reference}"]
    lines = [["method", *names, *(f"greedy: {name}" for name in names)], ["---"] * 9, *cells.values()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def digits(share: float) -> str:
    """Three digits. Means of the same numbers, added in another order, have the same."""
    return f"{round(share, 9):.3f}"


def difference_cell(values: tuple[float, float, float] | None) -> str:
    """A difference and its interval, or a dash."""
    return "{:+.3f} ({:+.3f} .. {:+.3f})".format(*values) if values else "-"
