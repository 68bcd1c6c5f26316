"""The stage `sample`: sample the rollouts of a round."""

from __future__ import annotations

from typing import Any

from ogls.problems.splits import select_round_problems
from ogls.progress import Progress, no_progress
from ogls.records import TRAJECTORIES, Completion, Request, StageResult
from ogls.records.schema import to_arrow
from ogls.samplers.choose import resolve_engine
from ogls.samplers.requests import build_requests
from ogls.stages.engine import sampler_for_round
from ogls.stages.fingerprints import policy_inputs
from ogls.stages.imported import is_imported, make_trajectories
from ogls.stages.run import Run
from ogls.stages.shards import unfinished_shards
from ogls.store.writer import StageWriter


def sample(run: Run, round_: int, progress: Progress = no_progress) -> StageResult:
    """Sample the rollouts of a round with the adapter that the round starts from, unless they were imported."""
    if is_imported(run, round_):
        return make_trajectories(run, round_, progress)
    config = run.config
    start = run.start_point(round_).round
    policy_hash = run.policy_hash(start)
    inputs = {
        **policy_inputs(run),
        "problems": run.digest("problems", 0),
        "per_round": config.problems.per_round,
        "rollout": config.rollout.model_copy(update={"engine": resolve_engine(config)}),
        "round": round_,
        "policy": policy_hash,
    }

    def work(writer: StageWriter) -> dict[str, Any]:
        sampler, prompter = sampler_for_round(run, start)
        chosen = select_round_problems(run.problems("train"), config.problems.per_round, round_, config.seed)
        requests = build_requests(chosen, prompter, config.rollout.samples, config.seed, "rollout", round_)
        for index, part in unfinished_shards(requests, config.rollout.batch_size, writer, progress):
            completions = sampler.sample(part, config.rollout)
            rows = [trajectory_row(r, c, sampler.hash) for r, c in zip(part, completions, strict=True)]
            tokens = sum(len(c.token_ids) for c in completions)
            truncated = sum(c.finish_reason == "length" for c in completions)
            writer.write_shard(index, to_arrow(TRAJECTORIES, rows), {"tokens": tokens, "truncated": truncated})
        sampler.release_memory()
        restarted = f"engine restarts: {sampler.restarts}; only the interrupted batches were sampled again"
        notice = restarted if sampler.restarts else ""
        return {"policy": policy_hash, "groups": len(chosen), "engine": resolve_engine(config), "notice": notice}

    return run.carry_out("trajectories", round_, inputs, work)


def trajectory_row(request: Request, completion: Completion, policy: str) -> dict[str, Any]:
    """A row of the table trajectories; `policy` is the hash of the adapter."""
    return {
        "problem_id": request.problem_id,
        "sample": request.sample,
        "prompt_ids": list(request.prompt_ids),
        "token_ids": list(completion.token_ids),
        "logprobs": list(completion.logprobs),
        "n_tokens": len(completion.token_ids),
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "policy": policy,
        "seed": request.seed,
    }
