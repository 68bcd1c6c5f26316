"""Building the training items of a round for each objective: distillation, GRPO, rejection fine-tuning, SFT."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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
    states: Iterable[tuple[Key, Tensor | Callable[[], Tensor]]] | None,
    config: TrainConfig,
    ends: Mapping[Key, int] | None = None,
) -> list[TrainItem]:
    """Return the items of distillation: rollouts with a target, and correct rollouts with a tail NLL.

    `targets` is the table targets. With `states` (key and combined teacher states [T, D] of each rollout, or a function
    that reads them when they are trained on) the targets cover the whole vocabulary; without, they are the stored top-K
    log-probs and tail mass. `ends` has the number of tokens to distil of rollouts that are not distilled to the end.
    """
    fields_by_key: dict[Key, dict[str, Any]] = dict(_stored_targets(targets, config.token_weights))
    if states is not None:
        for key, state in states:
            if key in fields_by_key:
                common = {name: fields_by_key[key][name] for name in ("trained", "weights")}
                fields_by_key[key] = {"state": state, **common}
    if config.group_weights == "frontier":
        weight_of = {rollout.key: _frontier(group) for group in groups.values() for rollout in group}
        for key, fields in fields_by_key.items():
            fields["weights"] = fields["weights"] * weight_of[key]
    for key in fields_by_key.keys() & (ends or {}).keys():
        end = (ends or {})[key]
        cut = {name: v if name == "state" else v[:end] for name, v in fields_by_key[key].items() if name != "trained"}
        fields_by_key[key] = {"trained": end, **cut}
    return _with_tails(groups, fields_by_key, config)


def policy_gradient_items(groups: dict[str, list[Rollout]], config: TrainConfig) -> list[TrainItem]:
    """Return the items of GRPO: decided rollouts of groups with both outcomes, and correct rollouts with a tail NLL.

    The reward is that of the checker, else 1 for a correct rollout and 0 for a failed one.
    """
    import torch

    fields_by_key: dict[Key, dict[str, Any]] = {}
    decided = [[r for r in group if r.outcome != "undecided"] for group in groups.values()]
    for group in decided:
        rewards = [float(r.outcome == "correct") if r.reward is None else r.reward for r in group]
        if len(set(rewards)) > 1:
            for rollout, advantage in zip(group, group_advantages(rewards, config.grpo.normalise_std), strict=True):
                logprobs = torch.tensor(rollout.logprobs)
                fields_by_key[rollout.key] = {
                    "trained": len(rollout.token_ids),
                    "old_logprobs": logprobs,
                    "advantage": advantage,
                }
    return _with_tails({str(i): group for i, group in enumerate(decided)}, fields_by_key, config)


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

    A solution ends with the stop token. One that does not fit into `max_tokens` with it is cut there and has none:
    with a stop token at the cut, the model would learn to stop in the middle. Problems without a solution have no item.
    """
    items = []
    for problem_id, group in groups.items():
        if solution := problems_by_id[problem_id].solution:
            # A control token that the text spells stays text: it is no stop token.
            encoded = tokenizer(solution, add_special_tokens=False, split_special_tokens=True)
            tokens = (*encoded["input_ids"], stop_id)[:max_tokens]
            items.append(TrainItem((problem_id, -1), group[0].prompt_ids, tokens, tail=len(tokens)))
    return items


def _with_tails(
    groups: Mapping[str, Sequence[Rollout]], fields_by_key: dict[Key, dict[str, Any]], config: TrainConfig
) -> list[TrainItem]:
    """Return the items of rollouts that have fields of TrainItem in `fields_by_key`, a tail NLL, or both."""
    items = []
    for group in groups.values():
        lengths = sorted(len(r.token_ids) for r in group if r.outcome == "correct")
        longest = lengths[(len(lengths) - 1) // 2] if lengths and config.tail_rollouts == "short_correct" else None
        for rollout in group:
            has_tail = rollout.outcome == "correct" and config.tail_weight > 0
            has_tail = has_tail and (longest is None or len(rollout.token_ids) <= longest)
            tail = min(config.tail_tokens, len(rollout.token_ids)) if has_tail else 0
            if tail or rollout.key in fields_by_key:
                target = fields_by_key.get(rollout.key, {})
                items.append(TrainItem(rollout.key, rollout.prompt_ids, rollout.token_ids, tail=tail, **target))
    return items


def _token_weights(table: pa.Table, kind: str) -> Tensor:
    """The weights of tokens, fp32 [T], from the columns of the table targets."""
    import torch

    def values(name: str) -> Tensor:
        return torch.from_numpy(table[name].to_numpy().copy())

    if kind == "entropy_gap":
        return (values("target_entropy") - values("base_entropy")).abs()
    column = {"kl": "kl", "direction": "direction_norm"}.get(kind)
    return values(column) if column else torch.ones(len(table))


def _frontier(group: Sequence[Rollout]) -> float:
    """The weight of a group with the share p of correct rollouts among the decided ones: 4 p (1 - p)."""
    decided = [r.outcome == "correct" for r in group if r.outcome != "undecided"]
    share = sum(decided) / max(len(decided), 1)
    return 4 * share * (1 - share)


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
    weights = _token_weights(table, token_weights)
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
