"""The groups of a run for the token view: all rollouts of a problem with verdicts, answers and texts."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ogls.analysis.no_target import NO_TEACHER, reasons_without_target
from ogls.analysis.token_numbers import token_texts
from ogls.distillation.exemplars import ContextPlanner
from ogls.errors import UserError
from ogls.records import Key, Problem, Rollout
from ogls.stages.groups import read_groups
from ogls.stages.run import Run
from ogls.store import run_query
from ogls.store.query import quote

GroupId = tuple[int, str]  # (round, problem_id)


class GroupReader:
    """Reads the groups of a run; texts of equal rollouts are decoded once."""

    def __init__(self, run: Run, tokenizer: Any, problems_by_id: Mapping[str, Problem]):
        self.run, self.tokenizer, self.problems_by_id = run, tokenizer, problems_by_id
        self.planner = ContextPlanner(run.config, run.prompter(tokenizer), 0) if run.config.has_teacher else None
        self.texts: dict[tuple[int, ...], list[str]] = {}
        self.recent: dict[int, dict[str, list[Rollout]]] = {}

    def count(self) -> tuple[int, int]:
        """Return the number of verified rollouts of the run, and of their tokens."""
        (row,) = self._query(
            "SELECT count(*) AS n, sum(n_tokens)::BIGINT AS tokens FROM trajectories SEMI JOIN verdicts "
            "USING (run, round, problem_id, sample)"
        )
        return row["n"], row["tokens"] or 0

    def of_round(self, round_: int) -> dict[str, list[Rollout]]:
        """Return the rollouts of a verified round by problem; the two rounds that were read last are kept in memory."""
        if round_ not in self.recent:
            self.recent = dict([*self.recent.items()][-1:]) | {round_: read_groups(self.run, round_)}
        return self.recent[round_]

    def within(self, wanted: Iterable[GroupId], max_tokens: int) -> list[GroupId]:
        """Return the first groups of `wanted` that have at most `max_tokens` tokens together."""
        sql = "SELECT round, problem_id, sum(n_tokens)::BIGINT AS tokens FROM trajectories GROUP BY ALL"
        tokens = {(r["round"], r["problem_id"]): r["tokens"] for r in self._query(sql)}
        kept: list[GroupId] = []
        for group in dict.fromkeys(wanted):
            max_tokens -= tokens[group]
            if max_tokens < 0:
                break
            kept.append(group)
        return kept

    def ids(self) -> list[GroupId]:
        """Return all verified groups of the run."""
        rows = self._query("SELECT DISTINCT round, problem_id FROM verdicts ORDER BY ALL")
        return [(r["round"], r["problem_id"]) for r in rows]

    def read(self, wanted: Collection[GroupId]) -> list[dict[str, Any]]:
        """Return groups in order of round and problem; each has its rollouts in order of samples.

        A rollout has its verdict, its answer, its tokens as texts, the change of log-prob of each token by the run's
        target (`gains`, in nats, None without a target), and why it has no target.
        """
        by_round: dict[int, set[str]] = {}
        for round_, problem_id in wanted:
            by_round.setdefault(round_, set()).add(problem_id)
        found = []
        for round_, names in sorted(by_round.items()):
            groups = self.of_round(round_)
            rows = {(r["problem_id"], r["sample"]): r for r in self._rows(round_, names)}
            for name in sorted(names & groups.keys()):
                reasons = self.reasons(groups[name])
                rollouts = [
                    self._rollout(r, rows[r.key], reasons.get(r.key, "")) for r in groups[name] if r.key in rows
                ]
                rollouts.sort(key=lambda r: r["sample"])
                found.append({"round": round_, "problem_id": name, "rollouts": rollouts})
        return found

    def problems(self, names: Collection[str]) -> dict[str, dict[str, Any]]:
        """Return text and answer of training problems by id."""
        chosen = {n: self.problems_by_id[n] for n in sorted(set(names))}
        return {n: {"problem": p.problem, "expected": p.answer, "solution": p.solution} for n, p in chosen.items()}

    def _rows(self, round_: int, names: Collection[str]) -> list[dict[str, Any]]:
        where = f"round = {int(round_)} AND problem_id IN ({', '.join(map(quote, sorted(names)))})"
        return self._query(f"""
            WITH gains AS (
                SELECT problem_id, sample,
                       list(round(token_target_logprob::DOUBLE - token_base_logprob, 2) ORDER BY position) AS gains
                FROM targets WHERE {where} GROUP BY ALL),
            summed AS (SELECT problem_id, sample, kl, first_mistake FROM steered WHERE {where})
            SELECT problem_id, sample, verdict, answer, gains, kl, first_mistake
            FROM (FROM verdicts WHERE {where}) LEFT JOIN gains USING (problem_id, sample)
            LEFT JOIN summed USING (problem_id, sample)""")

    def reasons(self, group: list[Rollout]) -> dict[Key, str]:
        """Return why rollouts of a group have no target, for those that have none."""
        if self.planner is None:
            return {r.key: NO_TEACHER for r in group}
        return reasons_without_target(self.planner, self.problems_by_id[group[0].problem_id], group)

    def _rollout(self, rollout: Rollout, row: Mapping[str, Any], reason: str) -> dict[str, Any]:
        gains = row["gains"]
        if rollout.token_ids not in self.texts:
            self.texts[rollout.token_ids] = token_texts(self.tokenizer, rollout.token_ids)
        data = {
            "sample": rollout.sample,
            "verdict": row["verdict"],
            "outcome": rollout.outcome,
            "answer": row["answer"],
            "text": self.texts[rollout.token_ids],
        }
        if gains is None:
            return data | {"why": reason or "the round has no targets yet"}
        kl = round(row["kl"], 4) if row["kl"] is not None else None
        return data | {
            "gains": [g or 0 for g in gains] if any(gains) else [],
            "kl": kl,
            "mistake": row["first_mistake"],
        }

    def _query(self, sql: str) -> list[dict[str, Any]]:
        return run_query(self.run.store, sql, self.run.config.name).to_pylist()


def read_completions(run: Run, tokenizer: Any, split: str, round_: int, problem_id: str) -> dict[str, Any]:
    """Return the completions of a benchmark problem in one evaluation as a group; the texts are tokenized again.

    Raises UserError if there are none.
    """
    where = f"benchmark = {quote(split)} AND round = {int(round_)} AND problem_id = {quote(problem_id)}"
    sql = f"SELECT sample, greedy, verdict, answer, text FROM scores WHERE {where} ORDER BY greedy, sample"
    rows = run_query(run.store, sql, run.config.name).to_pylist()
    if not rows:
        raise UserError(
            f"run {run.config.name} has no completions of problem {problem_id} of {split} in round {round_}"
        )
    rollouts = [
        {
            "sample": row["sample"],
            "greedy": row["greedy"],
            "verdict": row["verdict"],
            "outcome": "correct" if row["verdict"] == "correct" else "failed",
            "answer": row["answer"],
            "text": token_texts(tokenizer, tokenizer(row["text"], add_special_tokens=False)["input_ids"]),
            "why": "a completion of an evaluation",
        }
        for row in rows
    ]
    return {"round": round_, "problem_id": problem_id, "rollouts": rollouts}
