"""The numbers of every round, and the summary of rounds, from which tables and curves of a long run are read.

The manifests are the record. The summary repeats their numbers in files of `_PER_FILE` rounds (`rounds/0000.json`), so
that a table of rounds costs one read for many rounds, and adding a round rewrites one file of bounded size. A row that
is missing or damaged, or that another release wrote in another form, is read from the manifests. Only a process that
holds the run writes the summary; `ogls check` compares all of it with the manifests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ogls.config.fingerprint import fingerprint
from ogls.records import TABLES
from ogls.records.stages import STAGES
from ogls.stages.summaries import read_first_summary
from ogls.store import RunStore

FOLDER = "rounds"  # in the run's folder
_PER_FILE = 50
_STARTED = ("trajectories", "updates", "scores")  # tables of which every round has one
_TABLES = tuple(stage.table for stage in STAGES if stage.table != "problems")
_IN_ROUNDS = tuple(stage.table for stage in STAGES if stage.in_rounds)


@dataclass(frozen=True)
class RoundRow:
    """Numbers of one round; a number is None if its stage is not complete. `digests` are those of its manifests."""

    round: int
    summary: dict[str, Any] | None
    groups: int | None
    mixed_groups: int | None
    kl: float | None
    loss: float | None
    seconds: dict[str, float]
    style: dict[str, float]
    tokens: dict[str, float]
    health: dict[str, Any]
    loss_metrics: dict[str, float]
    padding: float | None  # share of padding in the batches of training
    digests: dict[str, str]


def read_round(run: RunStore, round_: int) -> RoundRow:
    """Read a round from its manifests and the summary of the first benchmark."""
    manifests = {t: m for t in _TABLES if (m := run.manifest(t, round_))}
    metrics = {t: m.metrics for t, m in manifests.items()}
    return RoundRow(
        round_,
        read_first_summary(run, round_) if "scores" in manifests else None,
        metrics.get("verdicts", {}).get("groups"),
        metrics.get("verdicts", {}).get("mixed_groups"),
        metrics.get("targets", {}).get("kl"),
        metrics.get("updates", {}).get("loss"),
        {TABLES[t].stage: float(m.get("seconds", 0)) for t, m in metrics.items()},
        metrics.get("style", {}).get("numbers", {}),
        {TABLES[t].stage: float(m["tokens"]) for t, m in metrics.items() if "tokens" in m},
        {name: value for name, value in metrics.get("health", {}).items() if name != "settings"},
        metrics.get("updates", {}).get("loss_metrics", {}),
        metrics.get("updates", {}).get("padding"),
        {t: m.digest for t, m in manifests.items()},
    )


def read_rounds(run: RunStore, last: int | None = None, first: int = 0) -> list[RoundRow]:
    """Read the rounds from `first` to `last` with at least one complete stage.

    The newest round is read from its manifests, because its stages may still change.
    """
    started = _started_rounds(run)
    wanted = [n for n in started if n >= first and (last is None or n <= last)]
    stored = {n: row for index in sorted({n // _PER_FILE for n in wanted}) for n, row in _read_file(run, index).items()}
    rows = [(n < started[-1] and stored.get(n)) or read_round(run, n) for n in wanted]
    return [row for row in rows if any(table in row.digests for table in _IN_ROUNDS)]


def record_round(run: RunStore, round_: int) -> None:
    """Write the row of a round from its manifests. Files of earlier rounds that are missing are written too."""
    names = run.storage.list_names(f"{run.name}/{FOLDER}")
    for index in range(round_ // _PER_FILE):
        if _file_name(index) not in names:
            _write_file(run, index, {row.round: row for row in _rows_of(run, index)})
    index = round_ // _PER_FILE
    stored = _read_file(run, index)
    rows = stored or {row.round: row for row in _rows_of(run, index)}
    row = read_round(run, round_)
    if not stored or round_ not in stored or _differ(row, stored[round_]):
        _write_file(run, index, {**rows, round_: row})


def find_summary_damage(run: RunStore) -> dict[str, str]:
    """What is wrong with each file of the summary, by its path. Reads the manifests of all rounds."""
    found = {}
    for name in run.storage.list_names(f"{run.name}/{FOLDER}"):
        index = int(name.removesuffix(".json"))
        stored = _read_file(run, index)
        differing = [n for n, row in stored.items() if _differ(row, read_round(run, n))]
        if not stored:
            found[f"{FOLDER}/{name}"] = "cannot be read"
        elif differing:
            found[f"{FOLDER}/{name}"] = f"differs from the manifests in round {', '.join(map(str, differing))}"
    return found


def rebuild_file(run: RunStore, path: str) -> None:
    """Write a file of the summary again from the manifests."""
    index = int(path.removeprefix(f"{FOLDER}/").removesuffix(".json"))
    _write_file(run, index, {row.round: row for row in _rows_of(run, index)})


def _rows_of(run: RunStore, index: int) -> list[RoundRow]:
    """The rows of the rounds of a file, from the manifests."""
    rows = [read_round(run, n) for n in _started_rounds(run) if n // _PER_FILE == index]
    return [row for row in rows if row.digests]


def _started_rounds(run: RunStore) -> list[int]:
    """The rounds that have begun, sorted."""
    return sorted({n for table in _STARTED for n in run.started_rounds(table)})


def _differ(row: RoundRow, other: RoundRow) -> bool:
    """Whether two rows have other numbers. Numbers that are not a number are equal here."""
    return fingerprint(asdict(row)) != fingerprint(asdict(other))


def _file_name(index: int) -> str:
    return f"{index:04d}.json"


def _read_file(run: RunStore, index: int) -> dict[int, RoundRow]:
    """The rows of a file by round; empty if it is missing, damaged, or of another form."""
    content = run.read_json(f"{FOLDER}/{_file_name(index)}") or {}
    rows = content.get("rounds")
    if not isinstance(rows, dict) or content.get("checksum") != fingerprint(rows):
        return {}
    names = {field.name for field in fields(RoundRow)}
    return {int(n): RoundRow(**row) for n, row in rows.items() if row.keys() == names}


def _write_file(run: RunStore, index: int, rows: Mapping[int, RoundRow]) -> None:
    content = {str(n): asdict(row) for n, row in sorted(rows.items())}
    run.write_json(f"{FOLDER}/{_file_name(index)}", {"checksum": fingerprint(content), "rounds": content})
