"""The stage `sample`: sample the rollouts of a round."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Any

from ogls.execution.work import Shard, ShardOutput, ShardProgress, ShardWork
from ogls.models.load import load_tokenizer
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
from ogls.stages.shards import carry_out_shards, divide
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
        prompter = run.prompter(load_tokenizer(config.model))
        chosen = select_round_problems(run.problems("train"), config.problems.per_round, round_, config.seed)
        requests = build_requests(chosen, prompter, config.rollout.samples, config.seed, "rollout", round_)
        size = config.rollout.batch_size
        facts = carry_out_shards(run, SampleWork, writer, divide(requests, size), size, progress)
        restarts = sum(f["restarts"] for f in facts)
        restarted = f"engine restarts: {restarts}; only unfinished rollouts were sampled again"
        notice = restarted if restarts else ""
        return {"policy": policy_hash, "groups": len(chosen), "engine": resolve_engine(config), "notice": notice}

    return run.carry_out("trajectories", round_, inputs, work)


class SampleWork(ShardWork):
    """Samples the requests of a shard from the policy that the round starts from."""

    def __init__(self, run: Run, round_: int):
        self.run, self.sampling = run, run.config.rollout
        self.sampler, _ = sampler_for_round(run, run.start_point(round_).round)

    def outputs(self, shards: Sequence[Shard], progress: ShardProgress) -> Generator[tuple[Shard, ShardOutput]]:
        """Rows of the table trajectories. The engine may sample shards together: none waits for another's longest."""
        before = self.sampler.restarts
        batches = [(shard.items, self.sampling) for shard in shards]
        with closing(self.sampler.sample_batches(batches)) as sampled:
            for index, completions in sampled:
                yield shards[index], self._output(shards[index].items, completions, before)
                before = self.sampler.restarts

    def _output(self, items: Sequence[Request], completions: Sequence[Completion], restarts: int) -> ShardOutput:
        """The rows of a shard. `restarts` is what the engine had counted before it."""
        rows = [trajectory_row(r, c, self.sampler.hash) for r, c in zip(items, completions, strict=True)]
        metrics = {
            "tokens": sum(len(c.token_ids) for c in completions),
            "truncated": sum(c.finish_reason == "length" for c in completions),
        }
        return ShardOutput(to_arrow(TRAJECTORIES, rows), metrics, {"restarts": self.sampler.restarts - restarts})

    def close(self) -> None:
        """Release the memory of the engine, and of a kept model."""
        self.sampler.release_memory()
        self.run.release_memory()


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
