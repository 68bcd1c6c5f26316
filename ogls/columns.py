"""Tensors as Arrow columns and back: cached states, targets, and the items that are trained on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ogls.batching import TrainItem
from ogls.config import Pool, SteerConfig, TrainConfig
from ogls.errors import ModelError
from ogls.losses import group_advantages
from ogls.records import TARGETS, Key, Problem, Rollout
from ogls.schema import enforce
from ogls.steering import Target, combine

if TYPE_CHECKING:
    from torch import Tensor


def problems(table: pa.Table, split: str) -> list[Problem]:
    """The problems of one split, in the order of the table."""
    return [Problem(**row) for row in table.to_pylist() if row["split"] == split]


def rollouts(trajectories: pa.Table, verdicts: pa.Table) -> dict[str, list[Rollout]]:
    """Trajectories joined with their verdicts, by problem, in the order of the table."""
    outcome = {(r["problem_id"], r["sample"]): r["outcome"] for r in verdicts.to_pylist()}
    groups: dict[str, list[Rollout]] = {}
    for row in trajectories.to_pylist():
        rollout = Rollout(
            row["problem_id"],
            row["sample"],
            tuple(row["prompt_ids"]),
            tuple(row["token_ids"]),
            row["text"],
            outcome[row["problem_id"], row["sample"]],
            tuple(row["logprobs"]),
        )
        groups.setdefault(rollout.problem_id, []).append(rollout)
    return groups


def pack_states(states: Tensor, dtype: str) -> dict[str, Any]:
    """`tokens`, `dim`, `dtype` and `states` of a teacher_states row. ModelError where the type overflows."""
    import torch

    packed = states.to(getattr(torch, dtype)).contiguous()
    if not packed.isfinite().all():
        largest = states.abs().max().item()
        raise ModelError(
            f"hidden states do not fit {dtype} (largest {largest:.3g}, finite: {bool(states.isfinite().all())}); "
            "set teacher.state_dtype to bfloat16 or float32, or look for a broken adapter"
        )
    content = packed.view(torch.uint8).numpy().tobytes()
    return {"tokens": packed.shape[0], "dim": packed.shape[1], "dtype": dtype, "states": content}


def unpack_states(table: pa.Table) -> dict[Key, dict[Pool, Tensor]]:
    """Per rollout and pool the cached states [T, D], in the type they were stored in."""
    import torch

    found: dict[Key, dict[Pool, Tensor]] = {}
    for row in table.to_pylist():
        flat = torch.frombuffer(bytearray(row["states"]), dtype=getattr(torch, row["dtype"]))
        found.setdefault((row["problem_id"], row["sample"]), {})[row["pool"]] = flat.reshape(row["tokens"], row["dim"])
    return found


def target_rows(keys: Sequence[Key], token_ids: Sequence[Tensor], target: Target, tokenizer: Any) -> pa.Table:
    """Rollouts' targets, laid end to end, as rows of the targets table."""
    counts = [len(ids) for ids in token_ids]
    flat = np.concatenate([ids.numpy() for ids in token_ids])
    words = {int(i): tokenizer.decode([int(i)]) for i in np.unique(flat)}

    def lists(values: Tensor, half: bool) -> pa.Array:
        rows, width = values.shape
        inner = values.half().float() if half else values.int()
        offsets = pa.array(np.arange(0, rows * width + 1, width, dtype=np.int32))
        return pa.ListArray.from_arrays(offsets, pa.array(inner.cpu().numpy().reshape(-1)))

    def floats(values: Tensor) -> pa.Array:
        return pa.array(values.float().cpu().numpy())

    columns = {
        "problem_id": pa.array(np.repeat([p for p, _ in keys], counts), pa.string()),
        "sample": pa.array(np.repeat(np.array([s for _, s in keys], np.int32), counts)),
        "position": pa.array(np.concatenate([np.arange(n, dtype=np.int32) for n in counts])),
        "token_id": pa.array(flat.astype(np.int32)),
        "token": pa.array([words[int(i)] for i in flat], pa.string()),
        "token_base_logprob": floats(target.token_base_logprob),
        "token_target_logprob": floats(target.token_target_logprob),
        "ids": lists(target.ids, half=False),
        "base_logprobs": lists(target.base_logprobs, half=True),
        "target_logprobs": lists(target.target_logprobs, half=True),
        "tail_mass": floats(target.tail_mass),
        "direction_norm": floats(target.direction_norm),
        "kl": floats(target.kl),
        "base_entropy": floats(target.base_entropy),
        "target_entropy": floats(target.target_entropy),
    }
    return enforce(TARGETS, pa.Table.from_arrays([columns[n] for n in TARGETS.schema.names], schema=TARGETS.schema))


def stops(trajectories: pa.Table) -> dict[Key, int]:
    """Position of the stop token of every rollout that ended with one."""
    rows = trajectories.to_pylist()
    return {(r["problem_id"], r["sample"]): r["n_tokens"] - 1 for r in rows if r["finish_reason"] == "stop"}


STEERED_FROM = (  # the columns of targets that a row of steered is made from
    *("problem_id", "sample", "position", "token_base_logprob", "token_target_logprob"),
    *("kl", "direction_norm", "base_entropy", "target_entropy"),
)


def steered_rows(targets: pa.Table, stopped_at: Mapping[Key, int]) -> list[dict[str, Any]]:
    """Rows of the table steered from those of targets (STEERED_FROM is enough), whose rollouts lie together.

    `stopped_at` has the position of the stop token of every rollout that ended with one.
    """
    if not len(targets):
        return []
    names, samples = targets["problem_id"].to_pylist(), targets["sample"].to_pylist()
    values = {n: targets[n].to_numpy().astype(np.float64) for n in STEERED_FROM[3:]}
    starts = np.flatnonzero(targets["position"].to_numpy() == 0)
    rows = []
    for start, end in zip(starts, [*starts[1:], len(targets)], strict=True):
        here = {n: v[start:end] for n, v in values.items()}
        key = names[start], samples[start]
        base, target = here["token_base_logprob"], here["token_target_logprob"]
        stop = stopped_at.get(key, len(base))
        stopped = stop < len(base)  # else cut, or its end lies beyond the token cap
        rows.append(
            {
                "problem_id": key[0],
                "sample": key[1],
                "tokens": len(base),
                "kl": here["kl"].mean(),
                "kl_max": here["kl"].max(),
                "kl_max_position": int(here["kl"].argmax()),
                "gain": (target - base).mean(),
                "direction_norm": here["direction_norm"].mean(),
                "direction_max": here["direction_norm"].max(),
                "direction_max_position": int(here["direction_norm"].argmax()),
                "base_entropy": here["base_entropy"].mean(),
                "target_entropy": here["target_entropy"].mean(),
                "stop_base": np.exp(base[stop]) if stopped else None,
                "stop_target": np.exp(target[stop]) if stopped else None,
            }
        )
    return rows


def joined(tables: Sequence[pa.Table]) -> pa.Table:
    """Target tables as one."""
    return pa.concat_tables(tables) if tables else TARGETS.schema.empty_table()


def train_items(
    groups: dict[str, list[Rollout]],
    targets: pa.Table,
    states: Iterable[pa.Table] | None,
    steer: SteerConfig,
    config: TrainConfig,
) -> list[TrainItem]:
    """What a round of distillation trains on: rollouts with a target, and correct ones for their tail.

    With `states` the target is the combined teacher state (full vocabulary), else the stored top-K and tail.
    """
    held: dict[Key, dict[str, Any]] = dict(_stored_targets(targets, config.token_weights))
    if states is not None:
        for table in states:
            for key, pools in unpack_states(table).items():
                if key in held:
                    kept = {name: held[key][name] for name in ("trained", "weights")}
                    held[key] = {"state": combine(pools, steer.resolved(), steer.temperature), **kept}
    return _with_tails((r for group in groups.values() for r in group), held, config)


def policy_items(groups: dict[str, list[Rollout]], config: TrainConfig) -> list[TrainItem]:
    """What a round of GRPO trains on: all decided rollouts of groups that have both outcomes."""
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


def likelihood_items(groups: dict[str, list[Rollout]]) -> list[TrainItem]:
    """What rejection fine-tuning trains on: the whole of every correct rollout, as a tail."""
    correct = (r for group in groups.values() for r in group if r.outcome == "correct")
    return [TrainItem(r.key, r.prompt_ids, r.token_ids, tail=len(r.token_ids)) for r in correct]


def reference_items(
    groups: dict[str, list[Rollout]], posed: dict[str, Problem], tokenizer: Any, stop_id: int, max_tokens: int
) -> list[TrainItem]:
    """What SFT trains on: the reference solutions of the round's problems, each with a stop token."""
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
    """Per rollout its rows of the targets table as tensors; a rollout's rows lie together."""
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
