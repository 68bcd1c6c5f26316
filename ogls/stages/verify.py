"""The stage `verify`: give every rollout a verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from ogls.execution.work import OneByOne, ShardOutput
from ogls.progress import Progress, no_progress
from ogls.records import VERDICTS, StageResult
from ogls.records.schema import to_arrow
from ogls.stages.imported import apply_labels, is_imported
from ogls.stages.run import Run
from ogls.stages.shards import carry_out_shards, divide_files
from ogls.store.manifest import FileEntry
from ogls.store.writer import StageWriter
from ogls.verifiers.pool import Case, Judgement, shared_verifier


def judge_rows(run: Run, split: str, rows: list[dict[str, Any]], progress: Progress = no_progress) -> list[Judgement]:
    """Verdicts of rows with problem_id, text and finish_reason; `split` has the expected answers."""
    expected = {p.problem_id: p.answer for p in run.problems(split)}
    cases = [Case(row["text"], row["finish_reason"], expected[row["problem_id"]]) for row in rows]
    return shared_verifier(run.config.verify).judge(cases, progress)


def verify(run: Run, round_: int, progress: Progress = no_progress) -> StageResult:
    """Give every rollout of the round a verdict and an outcome: correct, failed or undecided.

    The label of an imported rollout is its verdict.
    """
    inputs = {
        "verify": run.identity.verify,
        "trajectories": run.digest("trajectories", round_),
        "problems": run.digest("problems", 0),
        **({"feedback": True} if _reads_feedback(run) else {}),
    }

    def work(writer: StageWriter) -> dict[str, Any]:
        entries, size = run.records.list_shards("trajectories", round_), run.config.verify.shard_rollouts
        shards = divide_files(entries, size, lambda entry: entry.rows)
        facts = carry_out_shards(run, VerifyWork, writer, shards, size, progress)
        names = ["problem_id", "verdict", "outcome"]
        written = [run.records.read_shard(e, names).to_pylist() for _, e in sorted(writer.finished.items())]
        rows = [row for shard in written for row in shard]
        outcomes: dict[str, set[str]] = {}
        for row in rows:
            outcomes.setdefault(row["problem_id"], set()).add(row["outcome"])
        mixed = sum({"correct", "failed"} <= o for o in outcomes.values())
        verdicts = dict(Counter(row["verdict"] for row in rows))
        notices = [f"round {round_}: {f['differing']}" for f in facts if f["differing"]]
        if raised := [r for f in facts for r in f["raised"]]:
            notices.append(
                f"round {round_}: verify.checker raised an exception for {len(raised)} of {len(rows)} answers, which "
                f"are undecided; the first: {raised[0]}"
            )
        if not mixed:
            notices.append(
                f"round {round_}: 0 of {len(outcomes)} groups are mixed ({verdicts.get('correct', 0)} of {len(rows)} "
                "rollouts are correct): there is no direction; in a new run, raise rollout.samples, or use "
                + ("easier problems" if not verdicts.get("correct") else "harder problems")
            )
        return {"groups": len(outcomes), "mixed_groups": mixed, "verdicts": verdicts, "notice": "; ".join(notices)}

    return run.carry_out("verdicts", round_, inputs, work)


class VerifyWork(OneByOne):
    """Judges the rollouts of some files of trajectories."""

    def __init__(self, run: Run, round_: int):
        self.run, self.round = run, round_

    def compute(self, items: Sequence[FileEntry], progress: Progress) -> ShardOutput:
        """Rows of the table verdicts. The facts are the exceptions of a checker, and labels that it disagrees with."""
        run, names = self.run, ["problem_id", "sample", "text", "finish_reason"]
        rows = [row for entry in items for row in run.records.read_shard(entry, names).to_pylist()]
        judgements, differing = judge_rows(run, "train", rows, progress), ""
        if is_imported(run, self.round):
            judgements, differing = apply_labels(run, rows, judgements)
        reads_feedback = _reads_feedback(run)
        verdicts = [
            {
                "problem_id": row["problem_id"],
                "sample": row["sample"],
                "verdict": judgement.verdict,
                "outcome": self._outcome(judgement),
                "answer": judgement.answer,
                "reward": judgement.reward,
                "feedback": judgement.feedback if reads_feedback else None,
            }
            for row, judgement in zip(rows, judgements, strict=True)
        ]
        facts = {"differing": differing, "raised": [j.raised for j in judgements if j.raised]}
        return ShardOutput(to_arrow(VERDICTS, verdicts), {}, facts)

    def _outcome(self, judgement: Judgement) -> str:
        failed = "failed" if judgement.verdict in self.run.config.verify.failed else "undecided"
        return "correct" if judgement.verdict == "correct" else failed

    def close(self) -> None:
        """Does nothing: the verifier keeps its processes."""


def _reads_feedback(run: Run) -> bool:
    """Whether a pool reads the feedback on failed rollouts."""
    declared = run.config.declared_pools()
    return any(declared[name].kind == "feedback" for name in run.config.pools())
