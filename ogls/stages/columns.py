"""Convert between tensors and Arrow tables: cached states and targets; problems and rollouts from rows."""

from __future__ import annotations

import json
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
    rows = [row for row in table.to_pylist() if row["split"] == split]
    return [Problem(**{**row, "columns": json.loads(row["columns"] or "{}")}) for row in rows]


def to_rollouts(trajectories: pa.Table, verdicts: pa.Table) -> dict[str, list[Rollout]]:
    """Rollouts with their outcomes, grouped by problem, in the order of the table."""
    judged = {(r["problem_id"], r["sample"]): r for r in verdicts.to_pylist()}
    groups: dict[str, list[Rollout]] = {}
    for row in trajectories.to_pylist():
        rollout = Rollout(
            row["problem_id"],
            row["sample"],
            tuple(row["prompt_ids"]),
            tuple(row["token_ids"]),
            row["text"],
            judged[row["problem_id"], row["sample"]]["outcome"],
            tuple(row["logprobs"]),
            judged[row["problem_id"], row["sample"]]["reward"],
            judged[row["problem_id"], row["sample"]]["feedback"] or "",
        )
        groups.setdefault(rollout.problem_id, []).append(rollout)
    return groups


def pack_states(states: Tensor, dtype: str) -> dict[str, Any]:
    """The columns `tokens`, `dim`, `dtype` and `states` of a teacher_states row.

    `states` [T, D] are converted to `dtype` and stored as raw bytes. Raises ModelError if a value is not finite after
    the conversion.
    """
    import torch

    packed = states.to(getattr(torch, dtype)).contiguous()
    if not packed.isfinite().all():
        largest = states.abs().max().item()
        raise ModelError(
            f"hidden states do not fit {dtype} (largest {largest:.3g}, finite: {bool(states.isfinite().all())}); "
            "in a new run, set teacher.state_dtype to bfloat16 or float32; or check the adapter"
        )
    content = packed.view(torch.uint8).numpy().tobytes()
    return {"tokens": packed.shape[0], "dim": packed.shape[1], "dtype": dtype, "states": content}


def unpack_states(table: pa.Table) -> dict[Key, dict[Pool, Tensor]]:
    """The cached states [T, D] by rollout and pool, in their stored type."""
    import torch

    states_by_key: dict[Key, dict[Pool, Tensor]] = {}
    for row in table.to_pylist():
        flat = torch.frombuffer(bytearray(row["states"]), dtype=getattr(torch, row["dtype"]))
        states = flat.reshape(row["tokens"], row["dim"])
        states_by_key.setdefault((row["problem_id"], row["sample"]), {})[row["pool"]] = states
    return states_by_key


def target_rows(keys: Sequence[Key], token_ids: Sequence[Tensor], target: Target, tokenizer: Any) -> pa.Table:
    """Rows of the table targets, one per token.

    `target` has the targets of all rollouts, concatenated; `keys` and `token_ids` [T] have one entry per rollout.
    Log-probs [T, K] are rounded to float16 before they are stored.
    """
    counts = [len(ids) for ids in token_ids]
    flat = np.concatenate([ids.numpy() for ids in token_ids])
    texts = {int(i): tokenizer.decode([int(i)]) for i in np.unique(flat)}

    def list_column(values: Tensor, half: bool) -> pa.Array:
        rows, width = values.shape
        inner = values.half().float() if half else values.int()
        offsets = pa.array(np.arange(0, rows * width + 1, width, dtype=np.int32))
        return pa.ListArray.from_arrays(offsets, pa.array(inner.cpu().numpy().reshape(-1)))

    def float_column(values: Tensor) -> pa.Array:
        return pa.array(values.float().cpu().numpy())

    columns = {
        "problem_id": pa.array(np.repeat([p for p, _ in keys], counts), pa.string()),
        "sample": pa.array(np.repeat(np.array([s for _, s in keys], np.int32), counts)),
        "position": pa.array(np.concatenate([np.arange(n, dtype=np.int32) for n in counts])),
        "token_id": pa.array(flat.astype(np.int32)),
        "token": pa.array([texts[int(i)] for i in flat], pa.string()),
        "token_base_logprob": float_column(target.token_base_logprob),
        "token_target_logprob": float_column(target.token_target_logprob),
        "ids": list_column(target.ids, half=False),
        "base_logprobs": list_column(target.base_logprobs, half=True),
        "target_logprobs": list_column(target.target_logprobs, half=True),
        "tail_mass": float_column(target.tail_mass),
        "direction_norm": float_column(target.direction_norm),
        "kl": float_column(target.kl),
        "base_entropy": float_column(target.base_entropy),
        "target_entropy": float_column(target.target_entropy),
    }
    return check_schema(
        TARGETS, pa.Table.from_arrays([columns[n] for n in TARGETS.schema.names], schema=TARGETS.schema)
    )


def stop_positions(trajectories: pa.Table) -> dict[Key, int]:
    """The position of the stop token of every rollout that ends with one."""
    rows = trajectories.to_pylist()
    return {(r["problem_id"], r["sample"]): r["n_tokens"] - 1 for r in rows if r["finish_reason"] == "stop"}


STEERED_COLUMNS = (  # the columns of targets that the table steered is computed from
    *("problem_id", "sample", "position", "token_base_logprob", "token_target_logprob"),
    *("kl", "direction_norm", "base_entropy", "target_entropy"),
)


def steered_rows(targets: pa.Table, stopped_at: Mapping[Key, int], mistake_nats: float = 1.0) -> list[dict[str, Any]]:
    """Rows of the table steered, one per rollout, from rows of targets (STEERED_COLUMNS).

    The rows of a rollout must be contiguous. `stopped_at` has the position of the stop token of every rollout that ends
    with one. A mistake is a token whose log-prob the target lowers by at least `mistake_nats`.
    """
    if not len(targets):
        return []
    names, samples = targets["problem_id"].to_pylist(), targets["sample"].to_pylist()
    values = {n: targets[n].to_numpy().astype(np.float64) for n in STEERED_COLUMNS[3:]}
    starts = np.flatnonzero(targets["position"].to_numpy() == 0)
    rows = []
    for start, end in zip(starts, [*starts[1:], len(targets)], strict=True):
        rollout = {n: v[start:end] for n, v in values.items()}
        key = names[start], samples[start]
        base, target = rollout["token_base_logprob"], rollout["token_target_logprob"]
        stop = stopped_at.get(key, len(base))
        stopped = stop < len(base)  # else the rollout was cut, or ends after the token cap
        rows.append(
            {
                "problem_id": key[0],
                "sample": key[1],
                "tokens": len(base),
                "kl": rollout["kl"].mean(),
                "kl_max": rollout["kl"].max(),
                "kl_max_position": int(rollout["kl"].argmax()),
                "gain": (target - base).mean(),
                "direction_norm": rollout["direction_norm"].mean(),
                "direction_max": rollout["direction_norm"].max(),
                "direction_max_position": int(rollout["direction_norm"].argmax()),
                "base_entropy": rollout["base_entropy"].mean(),
                "target_entropy": rollout["target_entropy"].mean(),
                "first_mistake": first_mistake(base, target, mistake_nats),
                "stop_base": np.exp(base[stop]) if stopped else None,
                "stop_target": np.exp(target[stop]) if stopped else None,
            }
        )
    return rows


def first_mistake(base: Any, target: Any, nats: float) -> int | None:
    """The position of the first token whose log-prob [T] the target lowers by at least `nats`; None without one."""
    lowered = np.flatnonzero(np.asarray(base) - np.asarray(target) >= nats)
    return int(lowered[0]) if len(lowered) else None


def concat_targets(tables: Sequence[pa.Table]) -> pa.Table:
    """The concatenated tables; an empty table with the schema of targets if there are none."""
    return pa.concat_tables(tables) if tables else TARGETS.schema.empty_table()
