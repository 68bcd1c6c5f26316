"""The stage `sample`: sample the rollouts of a round."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

from ogls.execution.work import Shard, ShardOutput, ShardProgress, ShardWork
from ogls.models.load import load_tokenizer
from ogls.problems.splits import select_round_problems
from ogls.progress import Progress, no_progress
from ogls.records import AHEAD, TRAJECTORIES, Completion, Request, StageResult
from ogls.records.schema import to_arrow
from ogls.samplers.base import Sampler
from ogls.samplers.choose import resolve_engine
from ogls.samplers.requests import build_requests
from ogls.stages.engine import sample_shards, sampler_for_round
from ogls.stages.fingerprints import policy_inputs
from ogls.stages.imported import is_imported, make_trajectories
from ogls.stages.run import Run
from ogls.stages.shards import Ahead, carry_out_shards, divide
from ogls.store.writer import StageWriter


def sample(run: Run, round_: int, progress: Progress = no_progress) -> StageResult:
    """Sample the rollouts of a round with the adapter that the round starts from, unless they were imported."""
    if is_imported(run, round_):
        return make_trajectories(run, round_, progress)
    config, size = run.config, run.config.rollout.batch_size

    def work(writer: StageWriter) -> dict[str, Any]:
        shards, groups = _shards(run, round_)
        writer.divide(size)
        if run.records.has_files(AHEAD.name, round_):
            earlier = StageWriter(run.records, AHEAD, round_, writer.fingerprint)
            earlier.divide(size)
            writer.take_over(earlier)
        facts = carry_out_shards(run, SampleWork, writer, shards, size, progress)
        return {
            "policy": run.policy_hash(run.start_point(round_).round),
            "groups": groups,
            "engine": resolve_engine(config),
            **({"seconds_beside": writer.borrowed_seconds} if writer.borrowed_seconds else {}),
            "notice": describe_restarts(facts),
        }

    return run.carry_out("trajectories", round_, _inputs(run, round_), work)


def next_samples(run: Run, round_: int) -> Ahead | None:
    """The shards of `sample` of the round after `round_`, to carry out beside the evaluation of `round_`.

    None where that gains nothing (one process that samples shard by shard) or cannot be: there is no next round, it has
    begun, or it does not start from the policy that `round_` ended with.

    They go to a folder of their own, so that the round is not closed before its health is decided. If that leads to
    another policy, `sample` removes them.
    """
    config, after = run.config, round_ + 1
    on_ray = config.execution.workers == "ray"
    if not config.execution.sample_ahead or not (on_ray or config.rollout.decodes_together(resolve_engine(config))):
        return None
    if after > config.rounds or is_imported(run, after) or run.start_point(after).round != round_:
        return None
    if run.records.has_files("trajectories", after):
        return None
    writer = StageWriter(run.records, AHEAD, after, run.fingerprint("trajectories", _inputs(run, after)))
    writer.divide(config.rollout.batch_size)
    return Ahead(writer, [replace(shard, ahead=True) for shard in _shards(run, after)[0]])


def discard_ahead(run: Run, round_: int) -> None:
    """Remove the rollouts that were sampled ahead for a round, if there are any."""
    if run.records.has_files(AHEAD.name, round_):
        StageWriter(run.records, AHEAD, round_, "").discard()


def _inputs(run: Run, round_: int) -> dict[str, Any]:
    """What decides the rollouts of a round."""
    config = run.config
    return {
        **policy_inputs(run),
        "problems": run.digest("problems", 0),
        "per_round": config.problems.per_round,
        "rollout": config.rollout.model_copy(update={"engine": resolve_engine(config)}),
        "round": round_,
        "policy": run.policy_hash(run.start_point(round_).round),
    }


def _shards(run: Run, round_: int) -> tuple[list[Shard], int]:
    """The requests of a round in shards, and the number of groups."""
    config = run.config
    prompter = run.prompter(load_tokenizer(config.model))
    chosen = select_round_problems(run.problems("train"), config.problems.per_round, round_, config.seed)
    requests = build_requests(chosen, prompter, config.rollout.samples, config.seed, "rollout", round_)
    return divide(requests, config.rollout.batch_size), len(chosen)


class SampleWork(ShardWork):
    """Samples the requests of a shard from the policy that the round starts from."""

    def __init__(self, run: Run, round_: int, sampler: Sampler | None = None):
        """`sampler`: one that samples from this policy; None: it is created."""
        self.run, self.sampling = run, run.config.rollout
        self.sampler = sampler or sampler_for_round(run, run.start_point(round_).round)[0]

    def outputs(self, shards: Sequence[Shard], progress: ShardProgress) -> Generator[tuple[Shard, ShardOutput]]:
        """Rows of the table trajectories."""
        batches = [(shard.items, self.sampling) for shard in shards]
        with closing(sample_shards(self.sampler, shards, batches)) as sampled:
            for shard, completions, restarts in sampled:
                yield shard, self.output(shard.items, completions, restarts)

    def output(self, items: Sequence[Request], completions: Sequence[Completion], restarts: int) -> ShardOutput:
        """The rows of a shard. `restarts` is how often the engine was restarted for it."""
        rows = [trajectory_row(r, c, self.sampler.hash) for r, c in zip(items, completions, strict=True)]
        metrics = {
            "tokens": sum(len(c.token_ids) for c in completions),
            "truncated": sum(c.finish_reason == "length" for c in completions),
        }
        return ShardOutput(to_arrow(TRAJECTORIES, rows), metrics, {"restarts": restarts})

    def close(self) -> None:
        """Release the memory of the engine, and of a kept model."""
        self.sampler.release_memory()
        self.run.release_memory()


def describe_restarts(facts: Sequence[Mapping[str, Any]]) -> str:
    """A notice if engines have died while they sampled shards with these facts; else an empty string."""
    restarts = sum(f["restarts"] for f in facts)
    return f"engine restarts: {restarts}; only unfinished rollouts were sampled again" if restarts else ""


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
