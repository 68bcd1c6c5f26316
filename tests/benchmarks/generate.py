"""Generate a store with a given number of rollouts, to measure queries. It is written by the writer of the stages.

    python tests/benchmarks/generate.py ROOT ROLLOUTS

Runs of 49 rounds; rounds of 128 problems x 8 rollouts of about 30 tokens, with targets (K = 8) for every rollout, and
shards of the default size. The values are random with a fixed seed and similar to those of the tiny world.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from ogls.config import load_config
from ogls.evaluation.metrics import summarize
from ogls.records import (
    CONTEXTS,
    HEALTH,
    PROBLEMS,
    SCORES,
    STEERED,
    STYLE,
    SUMMARIES,
    TARGETS,
    TEACHER_STATES,
    TRAJECTORIES,
    UPDATES,
    VERDICTS,
)
from ogls.records.schema import Table, to_arrow
from ogls.stages import columns
from ogls.store import RunStore, Store
from ogls.store.writer import StageWriter

GROUPS, SAMPLES, ROUNDS, SUPPORT = 128, 8, 49, 8
BATCH, SHARD = 256, 64  # rollouts a shard: rollout.batch_size, and teacher.shard_groups x samples
WORDS = [str(n) for n in range(10)] + [f" w{n}" for n in range(310)]
Rng = np.random.Generator


def generate(root: str, rollouts: int) -> Store:
    """Write a store with at least this number of rollouts, rounded up to whole rounds. Returns the store."""
    store, rng = Store(root), np.random.default_rng(0)
    rounds = -(-rollouts // (GROUPS * SAMPLES))
    for number in range(-(-rounds // ROUNDS)):
        config = load_config("deployments/runs/tiny.toml", [f"root={root}", f"name=run{number:02d}"])
        run = store.run(config.name)
        run.open(config)
        names = [f"p{i:05d}" for i in range(4 * GROUPS)]
        problems = [_problem(name) for name in names]
        _write_stage(run, PROBLEMS, 0, [to_arrow(PROBLEMS, problems)])
        for round_ in range(1, min(ROUNDS, rounds - number * ROUNDS) + 1):
            _write_round(run, round_, names, rng)
    return store


_NO_SOLUTION = {"solution": None, "answer": "1", "columns": None}


def _problem(name: str) -> dict[str, object]:
    return {"problem_id": name, "split": "train", "problem": f"{name}?", **_NO_SOLUTION}


def _write_round(run: RunStore, round_: int, names: list[str], rng: Rng) -> None:
    chosen = rng.choice(len(names), GROUPS, replace=False)
    ids = np.repeat([names[i] for i in chosen], SAMPLES)
    samples = np.tile(np.arange(SAMPLES, dtype=np.int32), GROUPS)
    lengths = rng.integers(24, 37, len(ids)).astype(np.int32)
    skill = 0.5 + 0.4 * round_ / ROUNDS
    correct = rng.random(len(ids)) < np.repeat(np.clip(rng.normal(skill, 0.25, GROUPS), 0, 1), SAMPLES)
    truncated = rng.random(len(ids)) < 0.02
    verdict = np.where(correct & ~truncated, "correct", np.where(truncated, "truncated", "incorrect"))
    rollouts = _trajectories(ids, samples, lengths, truncated, rng)
    _write_stage(run, TRAJECTORIES, round_, [rollouts.slice(i, BATCH) for i in range(0, len(ids), BATCH)])
    verdicts = {
        "verdict": verdict,
        "outcome": np.where(verdict == "correct", "correct", "failed"),
        "answer": [None if c else str(a) for c, a in zip(truncated, rng.integers(0, 10, len(ids)), strict=True)],
    }
    _write_stage(run, VERDICTS, round_, [_table(VERDICTS, {"problem_id": ids, "sample": samples, **verdicts})])
    states = _states(ids, samples, lengths)
    contexts = states.select(CONTEXTS.schema.names).cast(CONTEXTS.schema)
    shards = [states.slice(i, 3 * SHARD) for i in range(0, len(states), 3 * SHARD)]
    _write_stage(run, TEACHER_STATES, round_, shards, [(CONTEXTS, contexts)])
    targets = [_targets(ids, samples, lengths, rng)]  # `steer` writes a round of this size as one shard
    steered = columns.steered_rows(pa.concat_tables(targets), columns.stop_positions(rollouts))
    _write_stage(run, TARGETS, round_, targets, [(STEERED, to_arrow(STEERED, steered))])
    _write_small_tables(run, round_, skill, rng)


def _trajectories(
    ids: np.ndarray, samples: np.ndarray, lengths: np.ndarray, truncated: np.ndarray, rng: Rng
) -> pa.Table:
    total = int(lengths.sum())
    words = np.array(WORDS)[rng.integers(0, 320, total)]
    ends = np.cumsum(lengths)
    prompts = np.full(len(ids) * 20, 7, np.int32)
    return _table(
        TRAJECTORIES,
        {
            "problem_id": ids,
            "sample": samples,
            "prompt_ids": _lists(prompts, np.full(len(ids), 20)),
            "token_ids": _lists(rng.integers(0, 320, total).astype(np.int32), lengths),
            "logprobs": _lists(-rng.exponential(0.3, total).astype(np.float32), lengths),
            "n_tokens": lengths,
            "text": ["".join(words[e - n : e]) for e, n in zip(ends, lengths, strict=True)],
            "finish_reason": np.where(truncated, "length", "stop"),
            "policy": ["0123456789abcdef"] * len(ids),
            "seed": rng.integers(0, 2**62, len(ids)),
        },
    )


def _states(ids: np.ndarray, samples: np.ndarray, lengths: np.ndarray) -> pa.Table:
    """Teacher states of three pools per rollout. The states are empty, because no query reads them."""
    count = 3 * len(ids)
    exemplars = _lists(np.tile(np.arange(3, dtype=np.int32), count), np.full(count, 3))
    shapes = {"tokens": np.repeat(lengths, 3), "dim": np.full(count, 96, np.int32), "dtype": ["float16"] * count}
    pools = np.tile(["base", "correct", "incorrect"], len(ids))
    keys = {"problem_id": np.repeat(ids, 3), "sample": np.repeat(samples, 3), "pool": pools}
    return _table(TEACHER_STATES, {**keys, "exemplars": exemplars, **shapes, "states": [b""] * count})


def _targets(ids: np.ndarray, samples: np.ndarray, lengths: np.ndarray, rng: Rng) -> pa.Table:
    total = int(lengths.sum())
    token = rng.integers(0, 320, total).astype(np.int32)
    logprobs = -rng.exponential(0.4, (total, SUPPORT)).astype(np.float32)
    halves = logprobs.astype(np.float16).astype(np.float32).reshape(-1)
    sizes = np.full(total, SUPPORT)

    def random_values(scale: float) -> np.ndarray:
        return rng.exponential(scale, total).astype(np.float32)

    return _table(
        TARGETS,
        {
            "problem_id": np.repeat(ids, lengths),
            "sample": np.repeat(samples, lengths),
            "position": np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]),
            "token_id": token,
            "token": np.array(WORDS)[token],
            "token_base_logprob": -random_values(0.3),
            "token_target_logprob": -random_values(0.25),
            "ids": _lists(rng.integers(0, 320, total * SUPPORT).astype(np.int32), sizes),
            "base_logprobs": _lists(halves, sizes),
            "target_logprobs": _lists(halves, sizes),
            "tail_mass": random_values(0.01),
            "direction_norm": random_values(3.0),
            "kl": random_values(0.05),
            "base_entropy": random_values(0.3),
            "target_entropy": random_values(0.2),
        },
    )


def _write_small_tables(run: RunStore, round_: int, skill: float, rng: Rng) -> None:
    """Write scores (50 problems, each with 4 samples and a greedy one), the summary, updates, style and health."""
    scores = [
        {
            "benchmark": "tiny",
            "problem_id": f"t{i:03d}",
            "sample": sample,
            "greedy": greedy,
            "verdict": "correct" if rng.random() < skill else "incorrect",
            "answer": "1",
            "n_tokens": 30,
            "finish_reason": "stop",
            "logprob": -9.0,
            "base_logprob": -10.0,
            "last_logprob": -0.1,
            "repeated": False,
            "text": "so \\boxed{1}",
            "policy": "0123456789abcdef",
            "seed": 1,
        }
        for i in range(50)
        for greedy, sample in [(False, s) for s in range(4)] + [(True, 0)]
    ]
    summary = summarize(scores, "tiny", 0, 100, 0)
    _write_stage(run, SCORES, round_, [to_arrow(SCORES, scores)], [(SUMMARIES, to_arrow(SUMMARIES, [summary]))])
    for table in (UPDATES, STYLE, HEALTH):
        row = {f.name: _placeholder(f.type) for f in table.schema}
        _write_stage(run, table, round_, [to_arrow(table, [row])])


def _placeholder(type_: pa.DataType) -> object:
    if pa.types.is_map(type_):
        return [("agreement", 1.0)]
    return "warn" if type_ == pa.string() else False if type_ == pa.bool_() else 1


def _lists(flat: np.ndarray, lengths: np.ndarray) -> pa.Array:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))


def _table(table: Table, values: dict[str, object]) -> pa.Table:
    """A table of columns; a nullable column that is not given has no values."""
    size = len(next(iter(values.values())))  # type: ignore[arg-type]
    given = {f.name: pa.nulls(size, f.type) for f in table.schema if f.nullable} | values
    arrays = [v if isinstance(v := given[f.name], pa.Array) else pa.array(v, f.type) for f in table.schema]
    return pa.Table.from_arrays(arrays, schema=table.schema)


def _write_stage(
    run: RunStore, table: Table, round_: int, shards: list[pa.Table], extra: Sequence[tuple[Table, pa.Table]] = ()
) -> None:
    writer = StageWriter(run, table, round_, "generated")
    for index, shard in enumerate(shards):
        writer.write_shard(index, shard, {"tokens": len(shard)})
    for other, rows in extra:
        writer.write_extra(other, rows)
    metrics = {"seconds": 1.0, "policy": "0123456789abcdef", "state": "ok", "accuracy": {}}
    writer.commit(table.stage, metrics)


if __name__ == "__main__":
    generate(sys.argv[1], int(sys.argv[2]))
