"""Search over all rollouts of a run, and its problems over rounds, for the token view."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ogls.errors import UserError
from ogls.stages.run import Run
from ogls.store import run_query
from ogls.store.query import quote

_MAX_CELLS = 40_000  # problems times rounds of the history in a page; of more problems, those that changed most


@dataclass(frozen=True)
class Search:
    """A search over the rollouts of a run; an empty field does not restrict it. `pages/rollouts.js` does the same."""

    text: str = ""  # in the completion, the problem id or the answer, without regard to case
    verdict: str = ""  # a verdict
    round: str = ""  # a number
    group: str = ""  # mixed, correct or failed: the outcomes of the group
    target: str = ""  # with or without
    sort: str = "newest"  # an entry of _ORDERS

    @classmethod
    def parse(cls, values: Mapping[str, str]) -> Search:
        """Return the search of a query string. Raises UserError for an unknown field or value."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise UserError(f"unknown search field {unknown[0]}; fields: {', '.join(sorted(known))}")
        search = cls(**values)
        if search.round and not search.round.isdecimal():
            raise UserError(f"the round of a search is a number, not {search.round!r}")
        for name, allowed in (("group", _GROUPS), ("target", _TARGETS), ("sort", _ORDERS)):
            if (value := getattr(search, name)) and value not in allowed:
                raise UserError(f"unknown {name} {value!r} of a search; choices: {', '.join(allowed)}")
        return search


_GROUPS = {
    "mixed": "correct > 0 AND failed > 0",
    "correct": "correct > 0 AND failed = 0",
    "failed": "failed > 0 AND correct = 0",
}
_TARGETS = {"with": "kl IS NOT NULL", "without": "kl IS NULL"}
_ORDERS = {
    "newest": "round DESC, problem_id, sample",
    "oldest": "round, problem_id, sample",
    "kl": "kl DESC NULLS LAST, round, problem_id, sample",
    "longest": "n_tokens DESC, round, problem_id, sample",
    "shortest": "n_tokens, round, problem_id, sample",
}


def search_rollouts(run: Run, search: Search, offset: int = 0, limit: int = 100) -> dict[str, Any]:
    """Return the number of rollouts that a search finds, and `limit` of them from `offset` on."""
    text = quote(search.text)
    conditions = [
        f"contains(lower(concat_ws(' ', problem_id, answer, text)), lower({text}))" if search.text else "",
        f"verdict = {quote(search.verdict)}" if search.verdict else "",
        f"round = {int(search.round)}" if search.round else "",
        _GROUPS.get(search.group, ""),
        _TARGETS.get(search.target, ""),
    ]
    where = " AND ".join(c for c in conditions if c) or "true"
    rows = run_query(
        run.store,
        f"""WITH counted AS (
            SELECT *, count(*) FILTER (outcome = 'correct') OVER grouped AS correct,
                   count(*) FILTER (outcome = 'failed') OVER grouped AS failed
            FROM verdicts WINDOW grouped AS (PARTITION BY run, round, problem_id)),
        found AS (
            SELECT round, problem_id, sample, verdict, outcome, answer, n_tokens, kl
            FROM counted JOIN trajectories USING (run, round, problem_id, sample)
            LEFT JOIN (SELECT run, round, problem_id, sample, kl FROM steered) USING (run, round, problem_id, sample)
            WHERE {where})
        SELECT *, count(*) OVER () AS total FROM found ORDER BY {_ORDERS[search.sort]}
        LIMIT {int(limit)} OFFSET {int(offset)}""",
        run.config.name,
    ).to_pylist()
    total = rows[0]["total"] if rows else 0
    return {"total": total, "rows": [{k: v for k, v in row.items() if k != "total"} for row in rows]}


def read_history(run: Run) -> list[dict[str, Any]]:
    """Return problems over rounds by split: how many of the samples of each round were correct, and greedy decoding.

    `train` has the problems that were sampled in more than one round. A cell is [correct, samples, greedy correct],
    with None for greedy decoding where there was none; a round that did not try the problem has the cell None.
    """
    rows = run_query(
        run.store,
        """WITH tried AS (
            SELECT 'train' AS split, problem_id, round, verdict = 'correct' AS correct, false AS greedy FROM verdicts
            UNION ALL SELECT benchmark, problem_id, round, verdict = 'correct', greedy FROM scores),
        cells AS (
            SELECT split, problem_id, round, count(*) FILTER (correct AND NOT greedy) AS correct,
                   count(*) FILTER (NOT greedy) AS samples, bool_or(correct) FILTER (greedy) AS greedy
            FROM tried GROUP BY split, problem_id, round
            QUALIFY split <> 'train' OR 1 < count(*) OVER (PARTITION BY split, problem_id))
        SELECT cells.*, problem, answer FROM cells JOIN (SELECT split, problem_id, problem, answer FROM problems)
        USING (split, problem_id) ORDER BY split, problem_id, round""",
        run.config.name,
    ).to_pylist()
    splits = []
    for split in dict.fromkeys(r["split"] for r in rows):
        of_split = [r for r in rows if r["split"] == split]
        rounds = sorted({r["round"] for r in of_split})
        problems: dict[str, dict[str, Any]] = {}
        for r in of_split:
            empty = {"id": r["problem_id"], "problem": r["problem"], "expected": r["answer"]}
            problem = problems.setdefault(r["problem_id"], empty | {"cells": [None] * len(rounds)})
            problem["cells"][rounds.index(r["round"])] = [r["correct"], r["samples"], r["greedy"]]
        ordered = sorted(problems.values(), key=_change, reverse=True)
        kept = ordered[: max(1, _MAX_CELLS // len(rounds))]
        splits.append({"split": split, "rounds": rounds, "total": len(ordered), "problems": kept})
    return splits


def _change(problem: Mapping[str, Any]) -> float:
    """Return the accuracy in the last round that tried a problem, minus that in the first."""
    shares = [c[0] / c[1] for c in problem["cells"] if c and c[1]]
    return shares[-1] - shares[0] if shares else 0.0
