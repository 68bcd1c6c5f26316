"""The stage `teach`: run the teacher and cache its averaged hidden states."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ogls.distillation import exemplars, teacher
from ogls.models.adapter import Adapter
from ogls.progress import Progress, no_progress
from ogls.records import CONTEXTS, TEACHER_STATES, StageResult
from ogls.records.schema import to_arrow
from ogls.stages import columns
from ogls.stages.fingerprints import policy_inputs
from ogls.stages.groups import read_groups
from ogls.stages.run import Run
from ogls.stages.shards import unfinished_shards
from ogls.store.writer import StageWriter


def teach(run: Run, round_: int, progress: Progress = no_progress) -> StageResult:
    """Cache the hidden states of the teacher for every rollout to train on and every pool, averaged over exemplars."""
    config = run.config
    start = run.start_point(round_).round
    inputs = {
        **policy_inputs(run),
        "teacher": config.teacher,
        "pools": config.pools(),
        "required": config.steer.to_recipe().pools(),
        "chosen": (config.train.rollouts, config.train.tokens),
        "trajectories": run.digest("trajectories", round_),
        "verdicts": run.digest("verdicts", round_),
        "policy": run.policy_hash(start),
        "before": run.digest("updates", start) if config.teacher.weights == "ema" and start else None,
    }

    def work(writer: StageWriter) -> dict[str, Any]:
        policy = run.load_policy()
        weights = {"policy": run.load_adapter(start), "teacher": teacher_adapter(run, start)}
        groups = read_groups(run, round_)
        problems = {p.problem_id: p for p in run.problems("train")}
        planner = exemplars.ContextPlanner(config, run.prompter(policy.tokenizer), policy.context)
        plans = {name: planner.group(problems[name], group) for name, group in groups.items()}
        for index, part in unfinished_shards(list(plans), config.teacher.shard_groups, writer, progress):
            scored = [s for name in part for s in plans[name].scored]
            states: dict[Any, Any] = {}
            for weights_name, adapter in weights.items():
                chosen = [s for s in scored if s.shares[0][0].weights == weights_name]
                if chosen:
                    policy.use_adapter(adapter)
                    states |= teacher.score_rollouts(policy, chosen, config.teacher.batch_tokens)
            rows = [
                {
                    **_scored_key(s),
                    "exemplars": list(s.exemplars),
                    **columns.pack_states(states[s.key, s.pool], config.teacher.state_dtype),
                }
                for s in scored
            ]
            writer.write_shard(index, to_arrow(TEACHER_STATES, rows), {"tokens": sum(r["tokens"] for r in rows)})
        scored = [s for plan in plans.values() for s in plan.scored]
        contexts = [{**_scored_key(s), "exemplars": list(s.exemplars)} for s in scored]
        writer.write_extra(CONTEXTS, to_arrow(CONTEXTS, contexts))
        left_out: Counter[str] = sum((p.left_out for p in plans.values()), Counter())
        kept = len({s.key for s in scored})
        cut = sum(p.cut for p in plans.values())
        notice = f"{cut} exemplars were truncated (teacher.exemplar_tokens, or the context of the model)" if cut else ""
        return {"rollouts": kept, "left_out": dict(left_out), "exemplars_cut": cut, "notice": notice}

    return run.carry_out("teacher_states", round_, inputs, work)


def teacher_adapter(run: Run, start: int) -> Adapter | None:
    """The teacher's adapter in a round that starts from the policy of round `start`; None for the base model.

    A live teacher and an average begin with `adapter.start`.
    """
    kind = run.config.teacher.weights
    if kind == "frozen":
        return None
    if kind == "live" or not start:
        return run.load_adapter(start)
    return Adapter.from_bytes(run.read_attachment(start, "ema.safetensors"))


def _scored_key(scored: exemplars.ScoredRollout) -> dict[str, Any]:
    return {"problem_id": scored.key[0], "sample": scored.key[1], "pool": scored.pool}
