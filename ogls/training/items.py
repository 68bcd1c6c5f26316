"""What a round trains on, by objective: rollouts with their targets, advantages or tails."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ogls.config import TrainConfig
from ogls.records import Key, Problem, Rollout
from ogls.training.batching import TrainItem
from ogls.training.losses import group_advantages

if TYPE_CHECKING:
    from torch import Tensor


def distillation_items(
    groups: dict[str, list[Rollout]],
    targets: pa.Table,
    states: Iterable[tuple[Key, Tensor]] | None,
    config: TrainConfig,
) -> list[TrainItem]:
    """The items of distillation: rollouts with a target, and correct rollouts for their tail.

    With `states` ([T, D] a rollout, the pools combined by the recipe) the target is the full vocabulary, else the
    stored top-K and tail.
    """
    held: dict[Key, dict[str, Any]] = dict(_stored_targets(targets, config.token_weights))
    if states is not None:
        for key, state in states:
            if key in held:
                kept = {name: held[key][name] for name in ("trained", "weights")}
                held[key] = {"state": state, **kept}
    return _with_tails((r for group in groups.values() for r in group), held, config)


def policy_gradient_items(groups: dict[str, list[Rollout]], config: TrainConfig) -> list[TrainItem]:
    """The items of GRPO: all decided rollouts of groups with both outcomes."""
    import torch

    held: dict[Key, dict[str, Any]] = {}
    decided = [[r for r in group if r.outcome != "undecided"] for group in groups.values()]
    for group in decided:
        rewards = [float(r.outcome == "correct") for r in group]
        if len(set(rewards)) == 2:
            for rollout, advantage in zip(group, group_advantages(rewards, config.grpo.normalise_std), strict=True):
                logprobs = torch.tensor(rollout.logprobs)
                held[rollout.key] = {"trained": len(logprobs), "old_logprobs": logprobs, "advantage": advantage}
    return _with_tails((r for group in decided for r in group), held, config)


def correct_rollout_items(groups: dict[str, list[Rollout]]) -> list[TrainItem]:
    """The items of rejection fine-tuning: every correct rollout, all of it as tail."""
    correct = (r for group in groups.values() for r in group if r.outcome == "correct")
    return [TrainItem(r.key, r.prompt_ids, r.token_ids, tail=len(r.token_ids)) for r in correct]


def reference_items(
    groups: dict[str, list[Rollout]], posed: dict[str, Problem], tokenizer: Any, stop_id: int, max_tokens: int
) -> list[TrainItem]:
    """The items of SFT: the reference solutions of the round's problems, each with a stop token."""
    items = []
    for name, group in groups.items():
        if solution := posed[name].solution:
            ids = tokenizer(solution, add_special_tokens=False)["input_ids"][: max_tokens - 1]
            tokens = (*ids, stop_id)
            items.append(TrainItem((name, -1), group[0].prompt_ids, tokens, tail=len(tokens)))
    return items


def _with_tails(rollouts: Iterable[Rollout], held: dict[Key, dict[str, Any]], config: TrainConfig) -> list[TrainItem]:
    items = []
    for rollout in rollouts:
        ends = rollout.outcome == "correct" and config.tail_weight > 0
        tail = min(config.tail_tokens, len(rollout.token_ids)) if ends else 0
        if tail or rollout.key in held:
            target = held.get(rollout.key, {})
            items.append(TrainItem(rollout.key, rollout.prompt_ids, rollout.token_ids, tail=tail, **target))
    return items


def _stored_targets(table: pa.Table, token_weights: str) -> Iterable[tuple[Key, dict[str, Any]]]:
    """For each rollout its rows of the table targets as tensors; the rows of a rollout are contiguous."""
    import torch

    if not len(table):
        return
    table = table.combine_chunks()

    def matrix(name: str) -> Tensor:
        flat = table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return torch.from_numpy(flat.reshape(len(table), -1).copy())

    ids, logprobs = matrix("ids").long(), matrix("target_logprobs")
    tail = torch.from_numpy(table["tail_mass"].to_numpy().copy())
    by = {"kl": "kl", "direction": "direction_norm"}.get(token_weights)
    weights = torch.from_numpy(table[by].to_numpy().copy()) if by else torch.ones(len(table))
    starts = np.flatnonzero(table["position"].to_numpy() == 0)
    names, samples = table["problem_id"].to_pylist(), table["sample"].to_pylist()
    for start, end in zip(starts, [*starts[1:], len(table)], strict=True):
        part = slice(int(start), int(end))
        yield (
            (names[start], samples[start]),
            {
                "trained": int(end - start),
                "weights": weights[part],
                "ids": ids[part],
                "logprobs": logprobs[part],
                "tail_mass": tail[part],
            },
        )
