"""What several stages share: the fingerprint of a model, the engine, the groups, the cutting into shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from ogls import columns
from ogls.config import Pool
from ogls.errors import StoreError
from ogls.prompts import Prompter
from ogls.records import Rollout
from ogls.rollout import Sampler, make_sampler
from ogls.run import Progress, Run, silent
from ogls.verify import Case, Judgement, shared
from ogls.writer import StageWriter

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


def policy_inputs(run: Run) -> dict[str, Any]:
    """What decides the model and its prompts, wherever one runs."""
    config = run.config
    adapter = config.adapter.model_copy(update={"start": run.policy_hash(0)})  # its content, wherever it lies
    return {"model": config.model, "adapter": adapter, "prompts": config.prompts, "seed": config.seed}


def sampler_at(run: Run, round_: int) -> tuple[Sampler, Prompter]:
    """The engine, sampling from the adapter that a round ended with (its hash checked), and the prompter."""
    policy = run.policy()
    sampler = make_sampler(run.config.rollout.engine, policy)
    sampler.use(run.adapter(round_))
    if sampler.hash != (trained := run.policy_hash(round_)):
        raise StoreError(f"the engine samples from {sampler.hash}, but round {round_} trained {trained}")
    return sampler, run.prompter(policy.tokenizer)


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
