"""What several stages share: the fingerprint of a model, the engine, the groups, the cutting into shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any, TypeVar

from ogls import columns
from ogls.config import Pool, SamplingConfig
from ogls.errors import StoreError
from ogls.policy import Policy, load_tokenizer
from ogls.prompts import Prompter
from ogls.records import Problem, Rollout
from ogls.rollout import Sampler, engine_of, make_sampler, requests_for
from ogls.run import Progress, Run, silent
from ogls.verify import Case, Judgement, shared
from ogls.writer import StageWriter

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
_PROBE_TOKENS = 16
PROBE_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.05}  # nats a token between two implementations


def policy_inputs(run: Run) -> dict[str, Any]:
    """What decides the model and its prompts, wherever one runs."""
    config = run.config
    adapter = config.adapter.model_copy(update={"start": run.policy_hash(0)})  # its content, wherever it lies
    return {"model": config.model, "adapter": adapter, "prompts": config.prompts, "seed": config.seed}


def sampler_at(run: Run, round_: int) -> tuple[Sampler, Prompter]:
    """The engine, sampling from the adapter that a round ended with, and the prompter.

    Which weights it has is checked by their hash, and in an engine of its own by what they say (`check_probe`).
    """
    engine = engine_of(run.config)
    policy = run.policy() if engine == "transformers" else None
    sampler = make_sampler(engine, policy, run.config)
    sampler.use(run.adapter(round_))
    if sampler.hash != (trained := run.policy_hash(round_)):
        raise StoreError(f"the engine samples from {sampler.hash}, but round {round_} trained {trained}")
    prompter = run.prompter(policy.tokenizer if policy else load_tokenizer(run.config.model))
    if not policy:
        check_probe(run, sampler, prompter, round_)
    return sampler, prompter


def probe(run: Run, policy: Policy, problem: Problem) -> dict[str, Any]:
    """What a policy says greedily of one problem: by it an engine shows later that it has the same weights."""
    (request,) = requests_for([problem], run.prompter(policy.tokenizer), 1, run.config.seed, "probe")
    (said,) = make_sampler("transformers", policy).sample([request], _greedy(run))
    return {"problem_id": problem.problem_id, "token_ids": said.token_ids, "logprobs": said.logprobs}


def check_probe(run: Run, sampler: Sampler, prompter: Prompter, round_: int) -> None:
    """Raise StoreError unless the engine says what the policy that the round ended with said when it was trained.

    Compared are the log-probs of the greedy tokens, up to the first at which rounding has them take two ways. Rounds
    of before there were probes pass.
    """
    table = "updates" if round_ else "problems"
    manifest = run.records.manifest(table, round_)
    wanted = manifest.metrics.get("probe") if manifest else None
    if not wanted:
        return
    posed = {p.problem_id: p for p in run.problems("train")}
    requests = requests_for([posed[wanted["problem_id"]]], prompter, 1, run.config.seed, "probe")
    (said,) = sampler.sample(requests, _greedy(run))
    pairs = list(zip(wanted["token_ids"], wanted["logprobs"], said.token_ids, said.logprobs, strict=False))
    alike = list(takewhile(lambda pair: pair[0] == pair[2], pairs))
    error = max((abs(a - b) for _, a, _, b in alike), default=float("inf"))
    if error > PROBE_TOLERANCE[run.config.model.dtype]:
        raise StoreError(
            f"the engine has other weights than round {round_} ended with: a greedy answer differs by {error:.3g} nats "
            f"in {len(alike)} of {len(pairs)} tokens; run the training again, or set rollout.engine = transformers"
        )


def _greedy(run: Run) -> SamplingConfig:
    cut = min(_PROBE_TOKENS, run.config.rollout.max_tokens)
    plain = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "max_tokens": cut}
    return run.config.rollout.model_copy(update=plain)


def groups_of(run: Run, round_: int) -> dict[str, list[Rollout]]:
    return columns.rollouts(run.records.read("trajectories", round_), run.records.read("verdicts", round_))


def cached_rollouts(
    run: Run, round_: int, device: Any, progress: Progress = silent
) -> Iterator[tuple[Rollout, Tensor, dict[Pool, Tensor]]]:
    """Every rollout of a taught round with its scored tokens [T] and its cached states [T, D] on a device."""
    import torch

    rollouts = {r.key: r for group in groups_of(run, round_).values() for r in group}
    entries = run.records.shards("teacher_states", round_)
    for done, entry in enumerate(entries, start=1):
        for key, states in columns.unpack_states(run.records.read_shard(entry)).items():
            tokens = torch.tensor(rollouts[key].token_ids[: len(states["base"])], device=device)
            yield rollouts[key], tokens, {p: s.to(device) for p, s in states.items()}
        progress(done, len(entries))


def judge(run: Run, split: str, rows: list[dict[str, Any]], progress: Progress = silent) -> list[Judgement]:
    expected = {p.problem_id: p.answer for p in run.problems(split)}
    cases = [Case(row["text"], row["finish_reason"], expected[row["problem_id"]]) for row in rows]
    return shared(run.config.verify).judge(cases, progress)


def shards(
    items: Sequence[T], size: int, writer: StageWriter, progress: Progress, by: Callable[[T], Any] = lambda _: None
) -> Iterator[tuple[int, Sequence[T]]]:
    """(index, items) of each shard that is not finished yet; a shard holds one value of `by` only."""
    runs: list[list[T]] = []
    for item in items:
        if not runs or len(runs[-1]) == size or by(runs[-1][-1]) != by(item):
            runs.append([])
        runs[-1].append(item)
    done = 0
    for index, part in enumerate(runs):
        if index not in writer.done:
            yield index, part
        done += len(part)
        progress(done, len(items))
