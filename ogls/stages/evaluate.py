"""The stage `evaluate`: sample and verify completions of the benchmarks."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Any

from ogls.config import SamplingConfig
from ogls.evaluation.metrics import ends_in_loop, summarize
from ogls.execution.work import Shard, ShardOutput, ShardProgress, ShardWork
from ogls.models.load import load_tokenizer
from ogls.progress import Progress, no_progress
from ogls.records import SCORES, SUMMARIES, Completion, Request, StageResult
from ogls.records.schema import to_arrow
from ogls.samplers.base import Batch
from ogls.samplers.choose import resolve_engine
from ogls.samplers.requests import build_requests
from ogls.stages.base_model import BaseModel
from ogls.stages.engine import sample_shards, sampler_for_round
from ogls.stages.fingerprints import policy_inputs
from ogls.stages.run import Run
from ogls.stages.sample import SampleWork, describe_restarts, next_samples, trajectory_row
from ogls.stages.shards import carry_out_shards, divide
from ogls.stages.verify import judge_rows
from ogls.store.writer import StageWriter
from ogls.verifiers.pool import Judgement

_Job = tuple[str, bool, Request]  # benchmark, greedy, request


def evaluate(run: Run, round_: int, progress: Progress = no_progress, ahead: bool = False) -> StageResult:
    """Sample the benchmarks with the policy that the round ended with (0: the base model); verify the completions.

    With `ahead`, the rollouts of the next round are sampled beside them, where that keeps devices busy.
    """
    config = run.config
    sampling = config.evaluate
    inputs = {
        **policy_inputs(run),
        "evaluate": sampling.model_copy(update={"benchmarks": ()}),
        "verify": run.identity.verify,
        "engine": resolve_engine(config),
        "problems": run.digest("problems", 0),
        "policy": run.policy_hash(round_),
    }

    def work(writer: StageWriter) -> dict[str, Any]:
        prompter = run.prompter(load_tokenizer(config.model))
        jobs: list[_Job] = []
        names = [*(b.name for b in sampling.benchmarks), *(["holdout"] if config.problems.holdout else [])]
        for name in names:
            problems = run.problems(name)
            requests = build_requests(problems, prompter, sampling.samples, config.seed, "evaluate", name)
            jobs += [(name, False, r) for r in requests] + [(name, True, r) for r in requests if r.sample == 0]
        jobs.sort(key=lambda job: job[1])  # one shard has one temperature
        shards = divide(jobs, sampling.batch_size, by=lambda job: job[1])
        beside = next_samples(run, round_) if ahead else None
        facts = carry_out_shards(run, EvaluateWork, writer, shards, sampling.batch_size, progress, beside)
        rows = [row for _, e in sorted(writer.finished.items()) for row in run.records.read_shard(e).to_pylist()]
        seed = run.seed("bootstrap")
        summaries = [
            summarize([r for r in rows if r["benchmark"] == name], name, index, sampling.bootstrap, seed)
            for index, name in enumerate(names)
        ]
        writer.write_extra(SUMMARIES, to_arrow(SUMMARIES, summaries))
        accuracy = {s["benchmark"]: s["accuracy"] for s in summaries}
        notices = [describe_restarts(facts), "" if round_ else _warning(sampling)]
        return {"policy": run.policy_hash(round_), "accuracy": accuracy, "notice": "; ".join(filter(None, notices))}

    return run.carry_out("scores", round_, inputs, work)


class EvaluateWork(ShardWork):
    """Samples completions of the benchmarks with the policy that the round ended with, and verifies them."""

    def __init__(self, run: Run, round_: int):
        self.run, self.sampling = run, run.config.evaluate
        self.sampler, _ = sampler_for_round(run, round_)
        self.base = BaseModel(run, self.sampler) if self.sampling.base_kl else None
        self.rollouts = SampleWork(run, round_ + 1, self.sampler)

    def outputs(self, shards: Sequence[Shard], progress: ShardProgress) -> Generator[tuple[Shard, ShardOutput]]:
        """Rows of the table scores, or of trajectories for a shard of the next round."""
        waiting = []
        with closing(sample_shards(self.sampler, shards, [self._batch(shard) for shard in shards])) as sampled:
            for shard, completions, restarts in sampled:
                if shard.ahead:
                    yield shard, self.rollouts.output(shard.items, completions, restarts)
                elif self.base and self.base.takes_turns:
                    waiting.append((shard, completions, restarts))
                else:
                    yield shard, self._output(shard.items, completions, restarts)
        # The base model takes the memory of an engine on the same GPU, which then must be done with all shards.
        for shard, completions, restarts in waiting:
            yield shard, self._output(shard.items, completions, restarts)

    def _batch(self, shard: Shard) -> Batch:
        """The requests of a shard, and how to sample them."""
        if shard.ahead:
            return shard.items, self.rollouts.sampling
        greedy = self.sampling.model_copy(update={"temperature": 0.0})
        return [r for _, _, r in shard.items], greedy if shard.items[0][1] else self.sampling

    def _output(self, items: Sequence[_Job], completions: Sequence[Completion], restarts: int) -> ShardOutput:
        rows = _scores(self.run, items, completions, self.sampler.hash, self.base)
        return ShardOutput(to_arrow(SCORES, rows), {"tokens": sum(r["n_tokens"] for r in rows)}, {"restarts": restarts})

    def close(self) -> None:
        """Release the memory of the engine, and of kept models."""
        self.sampler.release_memory()
        self.run.release_memory()


def _warning(sampling: SamplingConfig) -> str:
    """A warning if the completions are not samples of the policy's own distribution; else an empty string."""
    if sampling.temperature == 1 and sampling.top_p == 1 and not sampling.top_k and not sampling.min_p:
        return ""
    return (
        "evaluate.temperature, top_p, top_k or min_p change the distribution that completions are sampled from: "
        "entropy and kl_base are means over these completions of log-probs at temperature 1, no estimates of the "
        "policy's entropy and KL; compare them between rounds only"
    )


def _scores(
    run: Run,
    part: Sequence[_Job],
    completions: Sequence[Completion],
    policy: str,
    base: BaseModel | None,
) -> list[dict[str, Any]]:
    """Rows of the table scores, with verdicts; `base` computes `base_logprob`, which is null without it."""
    rows = []
    base_logprobs: list[float | None] = [None] * len(part)
    if base:
        prompts, tokens = [r.prompt_ids for _, _, r in part], [c.token_ids for c in completions]
        base_logprobs = list(base.logprobs(prompts, tokens))
    for (name, greedy, request), completion, base_logprob in zip(part, completions, base_logprobs, strict=True):
        row = trajectory_row(request, completion, policy)
        copied = ("problem_id", "sample", "n_tokens", "text", "finish_reason", "policy", "seed")
        sums = {"logprob": sum(completion.logprobs), "base_logprob": base_logprob}
        end = {"last_logprob": completion.logprobs[-1], "repeated": ends_in_loop(completion.token_ids)}
        rows.append({"benchmark": name, "greedy": greedy, **sums, **end, **{n: row[n] for n in copied}})
    judgements: list[Judgement] = []
    for name in dict.fromkeys(row["benchmark"] for row in rows):
        judgements += judge_rows(run, name, [row for row in rows if row["benchmark"] == name])
    return [{**row, "verdict": j.verdict, "answer": j.answer} for row, j in zip(rows, judgements, strict=True)]
