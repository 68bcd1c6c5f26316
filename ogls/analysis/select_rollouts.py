"""Selection of rollouts for the token view: most steered, collapsed, failed and later fixed, correct, failed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from statistics import median
from typing import Any

from ogls.models.policy import Policy
from ogls.records import Problem
from ogls.samplers.choose import create_sampler
from ogls.samplers.requests import build_requests
from ogls.stages.run import Run
from ogls.stages.verify import judge_rows
from ogls.store import named_queries, run_query
from ogls.store.query import quote

SHOW = ("all", "steered", "collapsed", "fixed", "correct", "failed")
_SHORT_SHARE = 0.5  # a rollout is collapsed if it is shorter than this share of the median length in the first round
_MAX_RESAMPLED = 32  # maximum number of failed problems that the newest policy tries again


RolloutId = tuple[int, str, int]  # (round, problem_id, sample)


@dataclass
class SelectedRollout:
    """One rollout to show, with its outcome and the reasons for its selection as tags."""

    id: RolloutId
    tags: set[str] = field(default_factory=set)
    later: dict[str, Any] | None = None  # how the problem was solved later: round, how and, if sampled again, text


class RolloutSelector:
    """Selects rollouts of one run. Without a policy, failed problems are not sampled again."""

    def __init__(self, run: Run, problems_by_id: dict[str, Problem], policy: Policy | None):
        self.run, self.problems_by_id, self.policy = run, problems_by_id, policy

    def select(
        self, rounds: list[int], problem: str, sample: int | None, show: str, max_rollouts: int, per_round: int = 0
    ) -> list[SelectedRollout]:
        """Return the rollouts of `problem`, or at most `max_rollouts` rollouts of the kinds in `show`, newest first.

        `per_round` adds up to that number of correct and of failed rollouts from every round.
        """
        if problem:
            condition = f"problem_id = {quote(problem)}" + ("" if sample is None else f" AND sample = {int(sample)}")
            rows = self._query(f"{self._rollouts_sql(rounds)} AND {condition} ORDER BY round DESC, sample")
            return [SelectedRollout(_rollout_id(r), self._tags(r)) for r in rows]
        kinds = SHOW[1:] if show == "all" else (show,)
        per_kind = max(1, max_rollouts // len(kinds))
        rows = self._candidates(rounds, max(per_kind, per_round))
        selected: dict[RolloutId, SelectedRollout] = {}
        for kind in kinds:
            for rollout in self._fixed(rounds, per_kind) if kind == "fixed" else self._of_kind(kind, rows, per_kind):
                merged = selected.setdefault(rollout.id, rollout)
                merged.tags |= rollout.tags
                merged.later = merged.later or rollout.later
        selected = dict(list(selected.items())[:max_rollouts])
        for kind in ("correct", "failed") if per_round else ():
            for round_ in rounds:
                for rollout in self._of_kind(kind, [r for r in rows if r["round"] == round_], per_round):
                    selected.setdefault(rollout.id, rollout)
        if selected:
            ids = ", ".join(f"({r}, {quote(p)}, {s})" for r, p, s in selected)
            for row in self._query(f"{self._rollouts_sql(rounds)} AND (round, problem_id, sample) IN ({ids})"):
                selected[_rollout_id(row)].tags |= self._tags(row)
        return list(selected.values())

    def _query(self, statement: str) -> list[dict[str, Any]]:
        return run_query(self.run.store, statement, self.run.config.name).to_pylist()

    def _rollouts_sql(self, rounds: list[int]) -> str:
        """Return a SELECT of the rollouts of the rounds that ends in a WHERE clause: append AND and a condition."""
        return f"""
            SELECT round, problem_id, sample, outcome, kl,
                   finish_reason = 'length' OR n_tokens < {self._min_length} AS collapsed
            FROM trajectories JOIN verdicts USING (run, round, problem_id, sample)
            LEFT JOIN steered USING (run, round, problem_id, sample)
            WHERE round IN ({", ".join(map(str, rounds))})"""

    def _candidates(self, rounds: list[int], limit: int) -> list[dict[str, Any]]:
        """Return the candidates of a selection, newest rounds first: at most `limit` of each kind and round.

        Takes at most one rollout per problem, to show more kinds of mistakes in the same number of rollouts.
        """
        return self._query(f"""
            WITH listed AS ({self._rollouts_sql(rounds)}),
            firsts AS (FROM listed QUALIFY 1 = row_number() OVER (
                PARTITION BY round, problem_id, outcome, collapsed ORDER BY sample)),
            limited AS (FROM firsts QUALIFY {limit} >= row_number() OVER (
                PARTITION BY round, outcome, collapsed ORDER BY problem_id)),
            steered_most AS (FROM listed WHERE kl IS NOT NULL
                             ORDER BY kl DESC, round DESC, problem_id, sample LIMIT {limit})
            SELECT DISTINCT * FROM (FROM limited UNION ALL FROM steered_most)
            ORDER BY round DESC, problem_id, sample""")

    def _tags(self, row: dict[str, Any]) -> set[str]:
        return {row["outcome"], "collapsed"} if row["collapsed"] else {row["outcome"]}

    @cached_property
    def _min_length(self) -> float:
        """The length in tokens below which a rollout is collapsed."""
        first = self.run.records.rounds("trajectories")[0]
        return _SHORT_SHARE * float(
            median(self.run.records.read("trajectories", first, ["n_tokens"])["n_tokens"].to_pylist())
        )

    def _of_kind(self, kind: str, rows: list[dict[str, Any]], limit: int) -> Iterable[SelectedRollout]:
        if kind == "steered":
            steered = sorted((r for r in rows if r["kl"] is not None), key=lambda r: -r["kl"])[:limit]
            return [SelectedRollout(_rollout_id(r), {"steered"}) for r in steered]
        first: dict[Any, SelectedRollout] = {}
        for row in rows:
            if kind in self._tags(row):
                first.setdefault((row["round"], row["problem_id"]), SelectedRollout(_rollout_id(row)))
        return list(first.values())[:limit]

    def _fixed(self, rounds: list[int], limit: int) -> list[SelectedRollout]:
        """Return failed rollouts of problems that were solved later: steered ones first, then early ones.

        Either at least half of the next rollouts of the problem are correct, or the newest policy solves it greedily.
        """
        fixed = []
        for row in self._query(named_queries()["failed_then_fixed"]):
            if row["split"] == "train" and row["round"] in rounds:
                later = {"round": row["next_round"], "how": f"{row['next_accuracy']:.0%} of its next rollouts correct"}
                fixed.append(SelectedRollout(_rollout_id(row), {"fixed"}, later))
        if len(fixed) < limit and self.policy:
            known = {rollout.id[1] for rollout in fixed}
            candidates = self._query(f"""
                FROM ({self._rollouts_sql(rounds)} AND outcome = 'failed')
                QUALIFY 1 = row_number() OVER (PARTITION BY problem_id ORDER BY kl IS NULL, round, kl DESC, sample)
                ORDER BY kl IS NULL, round, kl DESC, problem_id LIMIT {_MAX_RESAMPLED + len(known)}""")
            failed = [_rollout_id(row) for row in candidates if row["problem_id"] not in known]
            fixed += self._solved_greedily(failed[:_MAX_RESAMPLED])
        one_each: dict[str, SelectedRollout] = {}  # more problems rather than more rollouts of one
        for rollout in fixed:
            one_each.setdefault(rollout.id[1], rollout)
        return list(one_each.values())[:limit]

    def _solved_greedily(self, failed: list[RolloutId]) -> list[SelectedRollout]:
        """Return the failed rollouts of the problems that the newest policy solves greedily."""
        trained = self.run.records.newest_manifest("updates")
        if not (failed and trained and self.policy):
            return []
        prompter = self.run.prompter(self.policy.tokenizer)
        sampler = create_sampler("transformers", self.policy)
        sampler.use_adapter(self.run.load_adapter(trained.round))
        problems = [self.problems_by_id[problem_id] for _, problem_id, _ in failed]
        requests = build_requests(problems, prompter, 1, self.run.config.seed, "view")
        greedy = self.run.config.rollout.model_copy(update={"temperature": 0.0})
        completions = sampler.sample(requests, greedy)
        rows = [
            {"problem_id": problem_id, "text": c.text, "finish_reason": c.finish_reason}
            for (_, problem_id, _), c in zip(failed, completions, strict=True)
        ]
        verdicts = judge_rows(self.run, "train", rows)
        how = f"the policy of round {trained.round} solves it greedily"
        return [
            SelectedRollout(rollout_id, {"fixed"}, {"round": trained.round, "how": how, "text": row["text"]})
            for rollout_id, row, verdict in zip(failed, rows, verdicts, strict=True)
            if verdict.verdict == "correct" and rollout_id[0] <= trained.round
        ]


def _rollout_id(row: dict[str, Any]) -> RolloutId:
    return row["round"], row["problem_id"], row["sample"]
