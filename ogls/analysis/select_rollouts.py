"""Selecting rollouts to look at: most steered, collapsed, failed and later fixed, correct, failed."""

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

SHOW = ("all", "steered", "collapsed", "fixed", "correct", "failed")
_SHORT = 0.5  # collapsed: shorter than this share of the median length in the first round
_RESAMPLED = 32  # failed problems that are sampled again to see whether they are fixed


RolloutPlace = tuple[int, str, int]  # (round, problem_id, sample)


@dataclass
class SelectedRollout:
    """One rollout to show, and the reasons."""

    place: RolloutPlace
    tags: set[str] = field(default_factory=set)
    later: dict[str, Any] | None = None


class RolloutSelector:
    """Selects rollouts of one run. Without a policy, no failed problem is sampled again."""

    def __init__(self, run: Run, posed: dict[str, Problem], policy: Policy | None):
        self.run, self.posed, self.policy = run, posed, policy

    def choose(
        self, rounds: list[int], problem: str, sample: int | None, show: str, most: int, each: int = 0
    ) -> list[SelectedRollout]:
        """The rollouts of `problem`, or about `most` rollouts over the kinds in `show`, newest first."""
        if problem:
            asked = f"problem_id = {_quoted(problem)}" + ("" if sample is None else f" AND sample = {int(sample)}")
            rows = self._sql(f"{self._listed(rounds)} AND {asked} ORDER BY round DESC, sample")
            return [SelectedRollout(_place_of(r), self._tags(r)) for r in rows]
        kinds = SHOW[1:] if show == "all" else (show,)
        few = max(1, most // len(kinds))
        rows = self._candidates(rounds, max(few, each))
        found: dict[RolloutPlace, SelectedRollout] = {}
        for kind in kinds:
            for choice in self._fixed(rounds, few) if kind == "fixed" else self._of_kind(kind, rows, few):
                there = found.setdefault(choice.place, choice)
                there.tags |= choice.tags
                there.later = there.later or choice.later
        for kind in ("correct", "failed") if each else ():
            for round_ in rounds:
                for choice in self._of_kind(kind, [r for r in rows if r["round"] == round_], each):
                    found.setdefault(choice.place, choice)
        places = ", ".join(f"({r}, {_quoted(p)}, {s})" for r, p, s in found)
        for row in self._sql(f"{self._listed(rounds)} AND (round, problem_id, sample) IN ({places})") if found else ():
            found[_place_of(row)].tags |= self._tags(row)
        return list(found.values())

    def _sql(self, statement: str) -> list[dict[str, Any]]:
        return run_query(self.run.store, statement, self.run.config.name).to_pylist()

    def _listed(self, rounds: list[int]) -> str:
        """A SELECT of the rollouts of the rounds with the columns that the selection needs; conditions can be
        appended."""
        return f"""
            SELECT round, problem_id, sample, outcome, kl,
                   finish_reason = 'length' OR n_tokens < {self._short} AS collapsed
            FROM trajectories JOIN verdicts USING (run, round, problem_id, sample)
            LEFT JOIN steered USING (run, round, problem_id, sample)
            WHERE round IN ({", ".join(map(str, rounds))})"""

    def _candidates(self, rounds: list[int], most: int) -> list[dict[str, Any]]:
        """The candidates of a selection, newest rounds first: at most `most` of each kind and round.

        At most one a problem, which shows more kinds of mistakes in the same number of rollouts.
        """
        return self._sql(f"""
            WITH listed AS ({self._listed(rounds)}),
            firsts AS (FROM listed QUALIFY 1 = row_number() OVER (
                PARTITION BY round, problem_id, outcome, collapsed ORDER BY sample)),
            few AS (FROM firsts QUALIFY {most} >= row_number() OVER (
                PARTITION BY round, outcome, collapsed ORDER BY problem_id)),
            pushed AS (FROM listed WHERE kl IS NOT NULL ORDER BY kl DESC, round DESC, problem_id, sample LIMIT {most})
            SELECT DISTINCT * FROM (FROM few UNION ALL FROM pushed) ORDER BY round DESC, problem_id, sample""")

    def _tags(self, row: dict[str, Any]) -> set[str]:
        return {row["outcome"], "collapsed"} if row["collapsed"] else {row["outcome"]}

    @cached_property
    def _short(self) -> float:
        """The length in tokens below which a rollout counts as collapsed."""
        first = self.run.records.rounds("trajectories")[0]
        return _SHORT * float(
            median(self.run.records.read("trajectories", first, ["n_tokens"])["n_tokens"].to_pylist())
        )

    def _of_kind(self, kind: str, rows: list[dict[str, Any]], most: int) -> Iterable[SelectedRollout]:
        if kind == "steered":
            steered = sorted((r for r in rows if r["kl"] is not None), key=lambda r: -r["kl"])[:most]
            return [SelectedRollout(_place_of(r), {"steered"}) for r in steered]
        first: dict[Any, SelectedRollout] = {}
        for row in rows:
            if kind in self._tags(row):
                first.setdefault((row["round"], row["problem_id"]), SelectedRollout(_place_of(row)))
        return list(first.values())[:most]

    def _fixed(self, rounds: list[int], most: int) -> list[SelectedRollout]:
        """Failed rollouts whose problem was solved later: by its next rollouts, or greedily by the newest policy."""
        found = []
        for row in self._sql(named_queries()["failed_then_fixed"]):
            if row["round"] in rounds:
                later = {"round": row["next_round"], "how": f"{row['next_accuracy']:.0%} of its next rollouts correct"}
                found.append(SelectedRollout(_place_of(row), {"fixed"}, later))
        if len(found) < most and self.policy:
            known = {c.place for c in found}
            failed = f"verdicts WHERE outcome = 'failed' AND round IN ({', '.join(map(str, rounds))})"
            earliest = self._sql(f"""
                FROM (SELECT *, max(round) OVER (PARTITION BY problem_id) AS latest FROM {failed})
                QUALIFY 1 = row_number() OVER (PARTITION BY problem_id ORDER BY round, sample)
                ORDER BY latest DESC, problem_id DESC LIMIT {_RESAMPLED + len(known)}""")
            found += self._sampled_again([p for p in map(_place_of, earliest) if p not in known][:_RESAMPLED])
        return found[:most]

    def _sampled_again(self, failed: list[RolloutPlace]) -> list[SelectedRollout]:
        """The failed rollouts whose problem the newest policy solves greedily."""
        trained = self.run.records.newest_manifest("updates")
        if not (failed and trained and self.policy):
            return []
        prompter = self.run.prompter(self.policy.tokenizer)
        sampler = create_sampler("transformers", self.policy)
        sampler.use_adapter(self.run.load_adapter(trained.round))
        requests = build_requests([self.posed[p[1]] for p in failed], prompter, 1, self.run.config.seed, "view")
        greedy = self.run.config.rollout.model_copy(update={"temperature": 0.0})
        answers = sampler.sample(requests, greedy)
        asked = zip(failed, answers, strict=True)
        rows = [{"problem_id": p[1], "text": a.text, "finish_reason": a.finish_reason} for p, a in asked]
        judged = judge_rows(self.run, "train", rows)
        how = f"the policy of round {trained.round} solves it greedily"
        return [
            SelectedRollout(place, {"fixed"}, {"round": trained.round, "how": how, "text": row["text"]})
            for place, row, judgement in zip(failed, rows, judged, strict=True)
            if judgement.verdict == "correct" and place[0] <= trained.round
        ]


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _place_of(row: dict[str, Any]) -> RolloutPlace:
    return row["round"], row["problem_id"], row["sample"]
