"""The sampler of a round: create it, load the adapter into it, and check its weights."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Any

from ogls.errors import StoreError
from ogls.execution.work import Shard
from ogls.models.load import load_tokenizer
from ogls.models.policy import Policy
from ogls.problems.prompts import Prompter
from ogls.records import Completion, Problem
from ogls.samplers.base import Batch, Sampler
from ogls.samplers.choose import create_sampler, resolve_engine
from ogls.samplers.probe import PROBLEMS, compare_probe, probe_sampling, take_probe
from ogls.samplers.requests import build_requests
from ogls.stages.run import Run


def sampler_for_round(run: Run, round_: int) -> tuple[Sampler, Prompter]:
    """A sampler that uses the adapter that a round ended with, and the prompter.

    Raises StoreError if the hash of its weights is wrong, or if a separate engine fails the probe (`check_probe`).
    """
    engine = resolve_engine(run.config)
    policy = run.load_policy() if engine == "transformers" else None
    sampler = create_sampler(engine, policy, run.config)
    sampler.use_adapter(run.load_adapter(round_))
    if sampler.hash != (trained := run.policy_hash(round_)):
        raise StoreError(f"the sampler has the adapter {sampler.hash}, but round {round_} trained {trained}")
    prompter = run.prompter(policy.tokenizer if policy else load_tokenizer(run.config.model))
    if not policy:
        check_probe(run, sampler, prompter, round_)
    return sampler, prompter


def sample_shards(
    sampler: Sampler, shards: Sequence[Shard], batches: Sequence[Batch]
) -> Generator[tuple[Shard, list[Completion], int]]:
    """Yield each shard with the completions of its batch, and how often the engine was restarted meanwhile.

    The engine may sample shards together: none waits for another's longest completion.
    """
    before = sampler.restarts
    with closing(sampler.sample_batches(batches)) as sampled:
        for index, completions in sampled:
            restarts, before = sampler.restarts - before, sampler.restarts
            yield shards[index], completions, restarts


def check_engine(run: Run, policy: Policy) -> None:
    """Raise ModelError if the engine of the run cannot take its adapters. Called before the first rollout.

    A server is given an untrained adapter, because it does not tell the rank and the modules that it takes.
    """
    engine = resolve_engine(run.config)
    if engine != "transformers":
        sampler = create_sampler(engine, None, run.config)
        if engine == "server":
            sampler.use_adapter(policy.initial_adapter())
            sampler.use_adapter(None)


def record_probe(
    run: Run, policy: Policy, problems: Sequence[Problem], start: int | None = None
) -> list[dict[str, Any]]:
    """Greedy completions of a few training problems, for the manifest. An engine with the same weights reproduces them.

    `start` is the round whose weights the training started from, which the engine must not have; None: no training. See
    `take_probe` for the keys.
    """
    requests = build_requests(problems[:PROBLEMS], run.prompter(policy.tokenizer), 1, run.config.seed, "probe")
    before = [] if start is None else [run.load_adapter(start)]
    return take_probe(policy, requests, run.config.rollout, before)


def check_probe(run: Run, sampler: Sampler, prompter: Prompter, round_: int) -> None:
    """Raise StoreError unless the engine reproduces the probe that was recorded when the round was trained.

    A round without a recorded probe passes, because releases before 0.2.0 recorded none.
    """
    manifest = run.records.manifest("updates" if round_ else "problems", round_)
    recorded = manifest.metrics.get("probe") if manifest else None
    if not recorded:
        return
    probe = [recorded] if isinstance(recorded, dict) else recorded  # 0.2.0 recorded one completion
    by_id = {p.problem_id: p for p in run.problems("train")}
    problems = [by_id[entry["problem_id"]] for entry in probe]
    requests = build_requests(problems, prompter, 1, run.config.seed, "probe")
    result = compare_probe(probe, sampler.sample(requests, probe_sampling(run.config.rollout)))
    if reason := result.mismatch(run.config.model.dtype):
        raise StoreError(
            f"the engine has other weights than round {round_} ended with: {reason}; "
            "run the training again, or, in a new run, set rollout.engine = transformers"
        )
