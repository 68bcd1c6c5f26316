"""The protocol between a stage and what carries out its shards.

A stage divides its items into shards that do not depend on who carries them out. What is computed for a shard depends
on the run, the round and the items of the shard alone, so any process that reads the store can do it, and do it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol
from uuid import uuid4

import pyarrow as pa

from ogls.config import RunConfig
from ogls.progress import Progress
from ogls.store.manifest import FileEntry
from ogls.store.writer import ShardWriter


@dataclass(frozen=True)
class Shard:
    """A part of the work of a stage: its number, and its items, which can be pickled."""

    index: int
    items: Sequence[Any]


@dataclass(frozen=True)
class ShardOutput:
    """What a shard gives: rows, metrics that are added up over the shards, and facts for the notice of the stage.

    Rows may be several tables, computed while they are written: each becomes a row group.
    """

    data: pa.Table | Iterable[pa.Table]
    metrics: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)  # not stored; a resumed stage has those of its own shards


@dataclass(frozen=True)
class FinishedShard:
    """A shard that is in the store, the facts of its output, and the worker (host/process) that computed it."""

    index: int
    entry: FileEntry
    facts: Mapping[str, Any]
    worker: str = ""  # empty: this process, which says nothing of its device and its time
    device: str = ""
    seconds: float = 0.0  # to compute and to write


class ShardWork(Protocol):
    """What a stage computes for a shard. It has loaded what all shards of the stage need."""

    def compute(self, items: Sequence[Any], progress: Progress) -> ShardOutput:
        """The output of a shard. It depends on the items and not on the shards before it."""
        ...

    def compute_all(self, shards: Sequence[Shard]) -> Iterator[tuple[Shard, ShardOutput]] | None:
        """The outputs of all shards, in any order, if it is faster to work on them together; else None."""
        ...

    def close(self) -> None:
        """Release memory that is not needed until the next stage."""
        ...


@dataclass(frozen=True)
class Job:
    """The work of one stage, for a worker in another process. Everything in it can be pickled.

    `open_work(config, round, kept)` loads the work; `kept` is a dict of the worker that outlives the stage, for models.
    `epoch` is that of the lease of the process that holds the run, 0 without one.
    """

    config: RunConfig
    round: int
    table: str
    epoch: int
    open_work: Callable[[RunConfig, int, dict[str, Any]], ShardWork]
    together: bool = False  # whether a worker gets several shards at a time, because its engine batches by itself
    id: str = field(default_factory=lambda: uuid4().hex)  # two attempts at a stage differ


def write_shards(
    work: ShardWork,
    writer: ShardWriter,
    shards: Sequence[Shard],
    progress: Callable[[Shard, int, int], None] = lambda shard, done, total: None,
    before_write: Callable[[], None] = lambda: None,
) -> Iterator[FinishedShard]:
    """Compute shards, one after the other or together, and yield each when it is in the store.

    `progress(shard, done, total)` is called within a shard. `before_write` raises an error if nothing must be written
    any more.
    """
    together = work.compute_all(shards) if len(shards) > 1 else None
    for shard, output in together or _in_turn(work, shards, progress):
        data = output.data
        if isinstance(data, pa.Table):
            before_write()
        else:
            data = _then(data, before_write)
        yield FinishedShard(shard.index, writer.write(shard.index, data, output.metrics), output.facts)


def _in_turn(
    work: ShardWork, shards: Sequence[Shard], progress: Callable[[Shard, int, int], None]
) -> Iterator[tuple[Shard, ShardOutput]]:
    for shard in shards:
        yield shard, work.compute(shard.items, partial(progress, shard))


def _then(tables: Iterable[pa.Table], before_write: Callable[[], None]) -> Iterator[pa.Table]:
    """The tables, then `before_write`: a file gets its name only after the last of them."""
    yield from tables
    before_write()
