"""The sampler of a round: create it, load the adapter into it, and check its weights."""

from __future__ import annotations

from typing import Any

from ogls.errors import StoreError
from ogls.models.load import load_tokenizer
from ogls.models.policy import Policy
from ogls.problems.prompts import Prompter
from ogls.records import Problem
from ogls.samplers.base import Sampler
from ogls.samplers.choose import create_sampler, resolve_engine
from ogls.samplers.probe import TOLERANCE, compare_probe, greedy_sampling, take_probe
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


def record_probe(run: Run, policy: Policy, problem: Problem) -> dict[str, Any]:
    """The greedy completion of one problem, for the manifest. An engine with the same weights must reproduce it.

    See `take_probe` for the keys.
    """
    (request,) = build_requests([problem], run.prompter(policy.tokenizer), 1, run.config.seed, "probe")
    return take_probe(policy, request, run.config.rollout)


def check_probe(run: Run, sampler: Sampler, prompter: Prompter, round_: int) -> None:
    """Raise StoreError unless the engine reproduces the probe that was recorded when the round was trained.

    The log-probs may differ by TOLERANCE nats. A round without a recorded probe passes, because releases before 0.2.0
    recorded none.
    """
    manifest = run.records.manifest("updates" if round_ else "problems", round_)
    probe = manifest.metrics.get("probe") if manifest else None
    if not probe:
        return
    problems = {p.problem_id: p for p in run.problems("train")}
    requests = build_requests([problems[probe["problem_id"]]], prompter, 1, run.config.seed, "probe")
    (completion,) = sampler.sample(requests, greedy_sampling(run.config.rollout))
    error, equal, total = compare_probe(probe, completion)
    if error > TOLERANCE[run.config.model.dtype]:
        raise StoreError(
            f"the engine has other weights than round {round_} ended with: of a greedy answer the first {equal} of "
            f"{total} tokens are equal, with log-probs up to {error:.3g} nats apart; "
            "run the training again, or set rollout.engine = transformers"
        )
