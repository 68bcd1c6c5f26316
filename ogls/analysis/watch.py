"""What a run is doing now, read from its store alone: so of a run on any machine that uses the store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from ogls.analysis.rounds import with_verdicts
from ogls.config import RunConfig
from ogls.records import AHEAD, TABLES
from ogls.records.stages import STAGES, STAGES_BY_NAME
from ogls.stages.rounds import read_rounds
from ogls.stages.run import Run
from ogls.stages.status import Status, run_status
from ogls.store import RunStore
from ogls.store.manifest import FileEntry

_COLUMNS = ["problem_id", "sample", "text", "n_tokens"]
_BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class StageNow:
    """A stage of the round in progress. `rows` are stored so far, of about `expected` (0: not known)."""

    name: str
    done: bool
    seconds: float | None  # wall time: of the finished stage, or since the stage before it ended
    rows: int = 0
    expected: int = 0
    before: float | None = None  # seconds that this stage took in an earlier round
    tokens: float | None = None  # tokens per second of the finished stage


@dataclass(frozen=True)
class Snapshot:
    """A run at one moment. `accuracies` has (round, accuracy of the first benchmark); `health` is the newest notice."""

    run: str
    status: Status
    holder: str | None
    round: int
    rounds: int
    stages: tuple[StageNow, ...]
    accuracies: tuple[tuple[int, float], ...]
    health: str
    rollouts: tuple[dict[str, Any], ...]
    shard: str = ""  # the digest of the shard that `rollouts` are from


def read_snapshot(run: Run, previous: Snapshot | None = None, count: int = 3) -> Snapshot:
    """What the run is doing, with its last `count` rollouts. `previous`, of the same run, saves reading it again."""
    records, config = run.records, run.config
    round_ = _current_round(records, config)
    known = previous.accuracies if previous else ()
    evaluated = records.newest_manifest("scores")
    first, last = (known[-1][0] + 1 if known else 0), (evaluated.round if evaluated else -1)
    added = read_rounds(records, last, first) if first <= last else []
    health = records.newest_manifest("health")
    shard, rollouts = _last_rollouts(records, round_, previous, count)
    return Snapshot(
        config.name,
        run_status(records),
        records.describe_holder(),
        round_,
        config.rounds,
        tuple(_stages(records, config, round_)),
        (*known, *((row.round, float(row.summary["accuracy"])) for row in added if row.summary)),
        health.metrics["notice"] if health else "",
        rollouts,
        shard,
    )


def _current_round(records: RunStore, config: RunConfig) -> int:
    """The round in progress; of a run with nothing left to do, the last one."""
    trained, judged = records.newest_manifest("updates"), records.newest_manifest("health")
    newest = trained.round if trained else 0
    is_done = (judged.round if judged else -1) >= newest or not _is_evaluated(config, newest)
    return newest + 1 if is_done and newest < config.rounds else newest


def _is_evaluated(config: RunConfig, round_: int) -> bool:
    return round_ % config.evaluate.every == 0 or round_ == config.rounds


def _stage_names(config: RunConfig, round_: int) -> list[str]:
    """The stages of a round, in order."""
    absent = {"prepare"} if round_ else {s.name for s in STAGES} - {"prepare", "evaluate", "health"}
    absent |= set() if config.has_teacher else {"teach", "steer", "style"}
    absent |= set() if config.style.enabled else {"style"}
    absent |= set() if _is_evaluated(config, round_) else {"evaluate", "health"}
    return [s.name for s in STAGES if s.name not in absent]


def _stages(records: RunStore, config: RunConfig, round_: int) -> list[StageNow]:
    """The stages of a round. Only the first one that is not done has seconds and rows so far."""
    stages: list[StageNow] = []
    began = ""  # when the last finished stage ended
    waiting = False
    for name in _stage_names(config, round_):
        table = STAGES_BY_NAME[name].table
        if manifest := records.manifest(table, round_):
            seconds = float(manifest.metrics.get("seconds", 0))
            tokens = float(manifest.metrics["tokens"]) / seconds if manifest.metrics.get("tokens") and seconds else None
            stages.append(StageNow(name, True, seconds, manifest.rows, manifest.rows, tokens=tokens))
            began = manifest.written
        elif waiting:
            stages.append(StageNow(name, False, None))
        else:
            waiting = True
            stages.append(_unfinished(records, config, name, round_, began))
    return stages


def _unfinished(records: RunStore, config: RunConfig, name: str, round_: int, began: str) -> StageNow:
    """The stage in progress: what it has stored, and how long it took before."""
    table = STAGES_BY_NAME[name].table
    if not began and (last := records.manifest("health", round_ - 1) or records.manifest("updates", round_ - 1)):
        began = last.written
    seconds = (datetime.now(UTC) - datetime.fromisoformat(began)).total_seconds() if began else None
    rows = sum(entry.rows for entry in _stored(records, table, round_))
    ahead = _stored(records, AHEAD.name, round_ + 1) if name == "evaluate" else []  # sampled beside it
    before = next((m for n in range(round_ - 1, -1, -1) if (m := records.manifest(table, n))), None)
    expected = config.problems.per_round * config.rollout.samples if name in ("sample", "verify") else 0
    expected = before.rows if before else expected
    if ahead and expected:
        rows += sum(entry.rows for entry in ahead)
        expected += config.problems.per_round * config.rollout.samples
    took = float(before.metrics["seconds"]) if before and "seconds" in before.metrics else None
    return StageNow(name, False, seconds, rows, expected, took)


def _stored(records: RunStore, table: str, round_: int) -> list[FileEntry]:
    """The finished shards of a stage that is not done."""
    owner = TABLES[table].manifest_table if table in TABLES else table
    partial = records.read_json(f"{records.folder(owner, round_)}/partial.json") or {}
    return [FileEntry(**entry) for _, entry in sorted(partial.get("shards", {}).items(), key=lambda e: int(e[0]))]


def _last_rollouts(
    records: RunStore, round_: int, previous: Snapshot | None, count: int
) -> tuple[str, tuple[dict[str, Any], ...]]:
    """(digest, rollouts) of the newest shard of trajectories: of the round in progress, or of the round before it."""
    for n in range(round_, max(round_ - 2, 0), -1):
        done = records.manifest("trajectories", n)
        if shards := done.files_of("trajectories") if done else _stored(records, "trajectories", n):
            digest = f"{shards[-1].sha256} {bool(records.manifest('verdicts', n))}"
            if previous and previous.shard == digest:
                return digest, previous.rollouts
            rows = records.read_shard(shards[-1], _COLUMNS).to_pylist()
            last = {row["problem_id"]: row for row in rows}  # one rollout of a problem
            return digest, tuple(with_verdicts(records, n, list(last.values())[-count:]))
    return "", ()


def sparkline(values: Sequence[float]) -> str:
    """Numbers as a line of bars, from the lowest to the highest one; equal numbers are bars of half height."""
    if not values:
        return ""
    low, high = min(values), max(values)
    if high == low:
        return _BARS[3] * len(values)
    return "".join(_BARS[round((v - low) / (high - low) * (len(_BARS) - 1))] for v in values)
