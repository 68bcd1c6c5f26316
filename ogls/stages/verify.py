"""The stage `verify`: give every rollout a verdict."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ogls.progress import Progress, no_progress
from ogls.records import VERDICTS, StageResult
from ogls.records.schema import to_arrow
from ogls.stages.imported import apply_labels, is_imported
from ogls.stages.run import Run
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
    config = run.config.verify
    declared = run.config.declared_pools()
    reads_feedback = any(declared[name].kind == "feedback" for name in run.config.pools())
    inputs = {
        "verify": run.identity.verify,
        "trajectories": run.digest("trajectories", round_),
        "problems": run.digest("problems", 0),
        **({"feedback": True} if reads_feedback else {}),
    }

    def work(writer: StageWriter) -> dict[str, Any]:
        names = ["problem_id", "sample", "text", "finish_reason"]
        rows = run.records.read("trajectories", round_, names).to_pylist()
        judgements = judge_rows(run, "train", rows, progress)
        notices = []
        if is_imported(run, round_):
            judgements, differing = apply_labels(run, rows, judgements)
            notices += [f"round {round_}: {differing}"] if differing else []
        outcomes: dict[str, set[str]] = {}
        verdict_rows = []
        for row, judgement in zip(rows, judgements, strict=True):
            failed = "failed" if judgement.verdict in config.failed else "undecided"
            outcome = "correct" if judgement.verdict == "correct" else failed
            outcomes.setdefault(row["problem_id"], set()).add(outcome)
            key = {"problem_id": row["problem_id"], "sample": row["sample"]}
            verdict_rows.append(
                {
                    **key,
                    "verdict": judgement.verdict,
                    "outcome": outcome,
                    "answer": judgement.answer,
                    "reward": judgement.reward,
                    "feedback": judgement.feedback if reads_feedback else None,
                }
            )
        writer.write_shard(0, to_arrow(VERDICTS, verdict_rows))
        mixed = sum({"correct", "failed"} <= o for o in outcomes.values())
        verdicts = dict(Counter(j.verdict for j in judgements))
        if raised := [j.raised for j in judgements if j.raised]:
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
