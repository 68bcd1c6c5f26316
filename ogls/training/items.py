"""Building the training items of a round for each objective: distillation, GRPO, rejection fine-tuning, SFT."""

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
    """Return the items of distillation: rollouts with a target, and correct rollouts with a tail NLL.

    `targets` is the table targets. With `states` (key and combined teacher states [T, D] of each rollout) the targets
    cover the whole vocabulary; without, they are the stored top-K log-probs and tail mass.
    """
    fields_by_key: dict[Key, dict[str, Any]] = dict(_stored_targets(targets, config.token_weights))
    if states is not None:
        for key, state in states:
            if key in fields_by_key:
                common = {name: fields_by_key[key][name] for name in ("trained", "weights")}
                fields_by_key[key] = {"state": state, **common}
    return _with_tails((r for group in groups.values() for r in group), fields_by_key, config)


def policy_gradient_items(groups: dict[str, list[Rollout]], config: TrainConfig) -> list[TrainItem]:
    """Return the items of GRPO: decided rollouts of groups with both outcomes, and correct rollouts with a tail NLL.

    The reward is 1 for a correct rollout and 0 for a failed one.
    """
    import torch

    fields_by_key: dict[Key, dict[str, Any]] = {}
    decided = [[r for r in group if r.outcome != "undecided"] for group in groups.values()]
    for group in decided:
        rewards = [float(r.outcome == "correct") for r in group]
        if len(set(rewards)) == 2:
            for rollout, advantage in zip(group, group_advantages(rewards, config.grpo.normalise_std), strict=True):
                logprobs = torch.tensor(rollout.logprobs)
                fields_by_key[rollout.key] = {
                    "trained": len(rollout.token_ids),
                    "old_logprobs": logprobs,
                    "advantage": advantage,
                }
    return _with_tails((r for group in decided for r in group), fields_by_key, config)


def correct_rollout_items(groups: dict[str, list[Rollout]]) -> list[TrainItem]:
    """Return the items of rejection fine-tuning: every correct rollout, with the NLL on all of its tokens."""
    correct = (r for group in groups.values() for r in group if r.outcome == "correct")
    return [TrainItem(r.key, r.prompt_ids, r.token_ids, tail=len(r.token_ids)) for r in correct]


def reference_items(
    groups: dict[str, list[Rollout]],
    problems_by_id: dict[str, Problem],
    tokenizer: Any,
    stop_id: int,
    max_tokens: int,
) -> list[TrainItem]:
    """Return the items of SFT: the reference solution of each problem of the round, with the NLL on all of its tokens.

    A solution is truncated to `max_tokens` - 1 tokens and ends with the stop token. Problems without a solution have
    no item.
    """
    items = []
    for problem_id, group in groups.items():
        if solution := problems_by_id[problem_id].solution:
            # A control token that the text spells stays text: it is no stop token.
            encoded = tokenizer(solution, add_special_tokens=False, split_special_tokens=True)
            ids = encoded["input_ids"][: max_tokens - 1]
            tokens = (*ids, stop_id)
            items.append(TrainItem((problem_id, -1), group[0].prompt_ids, tokens, tail=len(tokens)))
    return items


def _with_tails(
    rollouts: Iterable[Rollout], fields_by_key: dict[Key, dict[str, Any]], config: TrainConfig
) -> list[TrainItem]:
    """Return the items of rollouts that have fields of TrainItem in `fields_by_key`, a tail NLL, or both."""
    items = []
    for rollout in rollouts:
        has_tail = rollout.outcome == "correct" and config.tail_weight > 0
        tail = min(config.tail_tokens, len(rollout.token_ids)) if has_tail else 0
        if tail or rollout.key in fields_by_key:
            target = fields_by_key.get(rollout.key, {})
            items.append(TrainItem(rollout.key, rollout.prompt_ids, rollout.token_ids, tail=tail, **target))
    return items


def _stored_targets(table: pa.Table, token_weights: str) -> Iterable[tuple[Key, dict[str, Any]]]:
    """Yield (key, fields of TrainItem) of each rollout in the table targets.

    The rows of a rollout are contiguous and start at position 0. Weights are the column that train.token_weights
    selects, or 1.
    """
    import torch

    if not len(table):
        return
    table = table.combine_chunks()

    def matrix(name: str) -> Tensor:
        flat = table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return torch.from_numpy(flat.reshape(len(table), -1).copy())

    ids, logprobs = matrix("ids").long(), matrix("target_logprobs")
    tail = torch.from_numpy(table["tail_mass"].to_numpy().copy())
    weight_column = {"kl": "kl", "direction": "direction_norm"}.get(token_weights)
    weights = torch.from_numpy(table[weight_column].to_numpy().copy()) if weight_column else torch.ones(len(table))
    starts = np.flatnonzero(table["position"].to_numpy() == 0)
    problem_ids, samples = table["problem_id"].to_pylist(), table["sample"].to_pylist()
    for start, end in zip(starts, [*starts[1:], len(table)], strict=True):
        part = slice(int(start), int(end))
        yield (
            (problem_ids[start], samples[start]),
            {
                "trained": int(end - start),
                "weights": weights[part],
                "ids": ids[part],
                "logprobs": logprobs[part],
                "tail_mass": tail[part],
            },
        )
