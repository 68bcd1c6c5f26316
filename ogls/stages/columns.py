"""Tensors as Arrow columns and back: cached states, targets, and the items that are trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ogls.config import Pool
from ogls.distillation.steering import Target
from ogls.errors import ModelError
from ogls.records import TARGETS, Key, Problem, Rollout
from ogls.records.schema import check_schema

if TYPE_CHECKING:
    from torch import Tensor


def to_problems(table: pa.Table, split: str) -> list[Problem]:
    """The problems of one split, in the order of the table."""
    return [Problem(**row) for row in table.to_pylist() if row["split"] == split]


def to_rollouts(trajectories: pa.Table, verdicts: pa.Table) -> dict[str, list[Rollout]]:
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
    return check_schema(
        TARGETS, pa.Table.from_arrays([columns[n] for n in TARGETS.schema.names], schema=TARGETS.schema)
    )


def stop_positions(trajectories: pa.Table) -> dict[Key, int]:
    """Position of the stop token of every rollout that ended with one."""
    rows = trajectories.to_pylist()
    return {(r["problem_id"], r["sample"]): r["n_tokens"] - 1 for r in rows if r["finish_reason"] == "stop"}


STEERED_COLUMNS = (  # the columns of targets that a row of steered is made from
    *("problem_id", "sample", "position", "token_base_logprob", "token_target_logprob"),
    *("kl", "direction_norm", "base_entropy", "target_entropy"),
)


def steered_rows(targets: pa.Table, stopped_at: Mapping[Key, int]) -> list[dict[str, Any]]:
    """Rows of the table steered from those of targets (STEERED_COLUMNS is enough), whose rollouts lie together.

    `stopped_at` has the position of the stop token of every rollout that ended with one.
    """
    if not len(targets):
        return []
    names, samples = targets["problem_id"].to_pylist(), targets["sample"].to_pylist()
    values = {n: targets[n].to_numpy().astype(np.float64) for n in STEERED_COLUMNS[3:]}
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


def concat_targets(tables: Sequence[pa.Table]) -> pa.Table:
    """Target tables as one."""
    return pa.concat_tables(tables) if tables else TARGETS.schema.empty_table()
