"""Why a rollout has no target, in words: the reason of the teacher's plan, and what it means in this group."""

from __future__ import annotations

from collections.abc import Sequence

from ogls.config import RunConfig
from ogls.distillation.exemplars import ContextPlanner
from ogls.records import Key, Problem, Rollout

NO_TEACHER = "this method has no teacher"


def reasons_without_target(planner: ContextPlanner, problem: Problem, group: Sequence[Rollout]) -> dict[Key, str]:
    """Return why the teacher leaves out rollouts of a group, for those that it leaves out."""
    chosen = planner.choose(problem, group)
    return {
        r.key: _explain(planner.config, reason, r, group) for r in group if isinstance(reason := chosen[r.key], str)
    }


def _explain(config: RunConfig, reason: str, rollout: Rollout, group: Sequence[Rollout]) -> str:
    same = sum(r.outcome == rollout.outcome for r in group)
    if reason == "undecided":
        return "its verdict is undecided, so it is neither correct nor failed"
    if reason == "already_correct":
        return f"correct rollouts are not distilled (train.rollouts = {config.train.rollouts})"
    if reason == "failed":
        return f"failed rollouts are not distilled (train.rollouts = {config.train.rollouts})"
    if reason == "group_not_mixed":
        what = "are correct" if rollout.outcome == "correct" else "failed"
        return f"all decided rollouts of its group {what}, so nothing tells success from failure (train.rollouts)"
    pool = reason.removeprefix("no_").removesuffix("_exemplar")
    kind = config.declared_pools()[pool].kind
    outcome = {"correct": "correct", "incorrect": "failed"}.get(kind, "")
    if outcome and rollout.outcome == outcome and same == 1:
        return (
            f"it is the only {outcome} rollout of its group, and no rollout is its own exemplar: pool {pool} is empty"
        )
    if outcome:
        return f"no rollout of its group is {outcome}, so the pool {pool} is empty"
    return f"the pool {pool} is empty: the problem has no {'reference solution' if kind == 'reference' else kind}"
