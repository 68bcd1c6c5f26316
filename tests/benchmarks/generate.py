"""A store of as many generated rollouts as one likes, written by the stages' own writer: for measuring queries.

    python tests/benchmarks/generate.py ROOT ROLLOUTS

Rounds of 128 problems x 8 rollouts of some 30 tokens, every one distilled, K = 8; shards as the stages cut them by
default; runs of 49 rounds. Numbers are drawn from one seed and look like the tiny world's.
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
Draw = np.random.Generator


def generate(root: str, rollouts: int) -> Store:
    """Write a store of at least so many rollouts."""
    store, draw = Store(root), np.random.default_rng(0)
    rounds = -(-rollouts // (GROUPS * SAMPLES))
    for number in range(-(-rounds // ROUNDS)):
        config = load_config("deployments/runs/tiny.toml", [f"root={root}", f"name=run{number:02d}"])
        run = store.run(config.name)
        run.open(config)
        names = [f"p{i:05d}" for i in range(4 * GROUPS)]
        problems = [_problem(name) for name in names]
        _stage(run, PROBLEMS, 0, [to_arrow(PROBLEMS, problems)])
        for round_ in range(1, min(ROUNDS, rounds - number * ROUNDS) + 1):
            _round(run, round_, names, draw)
    return store


def _problem(name: str) -> dict[str, object]:
    return {"problem_id": name, "split": "train", "problem": f"{name}?", "solution": None, "answer": "1"}


def _round(run: RunStore, round_: int, names: list[str], draw: Draw) -> None:
    posed = draw.choice(len(names), GROUPS, replace=False)
    ids = np.repeat([names[i] for i in posed], SAMPLES)
    samples = np.tile(np.arange(SAMPLES, dtype=np.int32), GROUPS)
    lengths = draw.integers(24, 37, len(ids)).astype(np.int32)
    skill = 0.5 + 0.4 * round_ / ROUNDS
    right = draw.random(len(ids)) < np.repeat(np.clip(draw.normal(skill, 0.25, GROUPS), 0, 1), SAMPLES)
    cut = draw.random(len(ids)) < 0.02
    verdict = np.where(right & ~cut, "correct", np.where(cut, "truncated", "incorrect"))
    rollouts = _trajectories(ids, samples, lengths, cut, draw)
    _stage(run, TRAJECTORIES, round_, [rollouts.slice(i, BATCH) for i in range(0, len(ids), BATCH)])
    verdicts = {
        "verdict": verdict,
        "outcome": np.where(verdict == "correct", "correct", "failed"),
        "answer": [None if c else str(a) for c, a in zip(cut, draw.integers(0, 10, len(ids)), strict=True)],
    }
    _stage(run, VERDICTS, round_, [_table(VERDICTS, {"problem_id": ids, "sample": samples, **verdicts})])
    states = _states(ids, samples, lengths)
    read = states.select(CONTEXTS.schema.names).cast(CONTEXTS.schema)
    shards = [states.slice(i, 3 * SHARD) for i in range(0, len(states), 3 * SHARD)]
    _stage(run, TEACHER_STATES, round_, shards, [(CONTEXTS, read)])
    targets = [_targets(ids, samples, lengths, draw)]  # a round of this size is one shard of `steer`
    steered = columns.steered_rows(pa.concat_tables(targets), columns.stop_positions(rollouts))
    _stage(run, TARGETS, round_, targets, [(STEERED, to_arrow(STEERED, steered))])
    _watched(run, round_, skill, draw)


def _trajectories(ids: np.ndarray, samples: np.ndarray, lengths: np.ndarray, cut: np.ndarray, draw: Draw) -> pa.Table:
    total = int(lengths.sum())
    words = np.array(WORDS)[draw.integers(0, 320, total)]
    ends = np.cumsum(lengths)
    prompts = np.full(len(ids) * 20, 7, np.int32)
    return _table(
        TRAJECTORIES,
        {
            "problem_id": ids,
            "sample": samples,
            "prompt_ids": _lists(prompts, np.full(len(ids), 20)),
            "token_ids": _lists(draw.integers(0, 320, total).astype(np.int32), lengths),
            "logprobs": _lists(-draw.exponential(0.3, total).astype(np.float32), lengths),
            "n_tokens": lengths,
            "text": ["".join(words[e - n : e]) for e, n in zip(ends, lengths, strict=True)],
            "finish_reason": np.where(cut, "length", "stop"),
            "policy": ["0123456789abcdef"] * len(ids),
            "seed": draw.integers(0, 2**62, len(ids)),
        },
    )


def _states(ids: np.ndarray, samples: np.ndarray, lengths: np.ndarray) -> pa.Table:
    """Three pools a rollout; the states themselves are left out, for no query reads them."""
    count = 3 * len(ids)
    exemplars = _lists(np.tile(np.arange(3, dtype=np.int32), count), np.full(count, 3))
    plain = {"tokens": np.repeat(lengths, 3), "dim": np.full(count, 96, np.int32), "dtype": ["float16"] * count}
    pools = np.tile(["base", "correct", "incorrect"], len(ids))
    keys = {"problem_id": np.repeat(ids, 3), "sample": np.repeat(samples, 3), "pool": pools}
    return _table(TEACHER_STATES, {**keys, "exemplars": exemplars, **plain, "states": [b""] * count})


def _targets(ids: np.ndarray, samples: np.ndarray, lengths: np.ndarray, draw: Draw) -> pa.Table:
    total = int(lengths.sum())
    token = draw.integers(0, 320, total).astype(np.int32)
    logprobs = -draw.exponential(0.4, (total, SUPPORT)).astype(np.float32)
    halves = logprobs.astype(np.float16).astype(np.float32).reshape(-1)
    sizes = np.full(total, SUPPORT)

    def some(scale: float) -> np.ndarray:
        return draw.exponential(scale, total).astype(np.float32)

    return _table(
        TARGETS,
        {
            "problem_id": np.repeat(ids, lengths),
            "sample": np.repeat(samples, lengths),
            "position": np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]),
            "token_id": token,
            "token": np.array(WORDS)[token],
            "token_base_logprob": -some(0.3),
            "token_target_logprob": -some(0.25),
            "ids": _lists(draw.integers(0, 320, total * SUPPORT).astype(np.int32), sizes),
            "base_logprobs": _lists(halves, sizes),
            "target_logprobs": _lists(halves, sizes),
            "tail_mass": some(0.01),
            "direction_norm": some(3.0),
            "kl": some(0.05),
            "base_entropy": some(0.3),
            "target_entropy": some(0.2),
        },
    )


def _watched(run: RunStore, round_: int, skill: float, draw: Draw) -> None:
    """The small tables of a round: 200 problems x 4 scores, a summary, updates, style, health."""
    scores = [
        {
            "benchmark": "tiny",
            "problem_id": f"t{i:03d}",
            "sample": sample,
            "greedy": greedy,
            "verdict": "correct" if draw.random() < skill else "incorrect",
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
    _stage(run, SCORES, round_, [to_arrow(SCORES, scores)], [(SUMMARIES, to_arrow(SUMMARIES, [summary]))])
    for table in (UPDATES, STYLE, HEALTH):
        row = {f.name: _some(f.type) for f in table.schema}
        _stage(run, table, round_, [to_arrow(table, [row])])


def _some(type_: pa.DataType) -> object:
    return "warn" if type_ == pa.string() else False if type_ == pa.bool_() else 1


def _lists(flat: np.ndarray, lengths: np.ndarray) -> pa.Array:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))


def _table(table: Table, values: dict[str, object]) -> pa.Table:
    arrays = [
        pa.array(values[f.name], f.type) if not isinstance(values[f.name], pa.Array) else values[f.name]
        for f in table.schema
    ]
    return pa.Table.from_arrays(arrays, schema=table.schema)


def _stage(
    run: RunStore, table: Table, round_: int, shards: list[pa.Table], more: Sequence[tuple[Table, pa.Table]] = ()
) -> None:
    writer = StageWriter(run, table, round_, "generated")
    for index, shard in enumerate(shards):
        writer.write_shard(index, shard, {"tokens": len(shard)})
    for other, rows in more:
        writer.write_extra(other, rows)
    metrics = {"seconds": 1.0, "policy": "0123456789abcdef", "state": "ok", "accuracy": {}}
    writer.commit(table.stage, metrics)


if __name__ == "__main__":
    generate(sys.argv[1], int(sys.argv[2]))
