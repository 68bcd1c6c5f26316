"""The protocol between a stage and what carries out its shards.

A stage divides its items into shards that do not depend on who carries them out. What is computed for a shard depends
on the run, the round and the items of the shard alone, so any process that reads the store can do it, and do it again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from uuid import uuid4

import pyarrow as pa

from ogls.config import RunConfig
from ogls.progress import Progress
from ogls.records import AHEAD
from ogls.store.manifest import FileEntry
from ogls.store.writer import ShardWriter


@dataclass(frozen=True)
class Shard:
    """A part of the work of a stage: its number, and its items, which can be pickled.

    `ahead`: it is a shard of the stage `sample` of the next round, carried out beside those of this stage.
    """

    index: int
    items: Sequence[Any]
    ahead: bool = False

    @property
    def key(self) -> tuple[bool, int]:
        """What no other shard of the same work has."""
        return self.ahead, self.index


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

    key: tuple[bool, int]  # of the shard
    entry: FileEntry
    facts: Mapping[str, Any]
    worker: str = ""  # empty: this process, which says nothing of its device and its time
    device: str = ""
    seconds: float = 0.0  # to compute and to write, without loading a model


ShardProgress = Callable[[Shard, int, int], None]  # (shard, done, total), within a shard


class ShardWork(ABC):
    """What a stage computes for its shards. It has loaded what all of them need."""

    @abstractmethod
    def outputs(self, shards: Sequence[Shard], progress: ShardProgress) -> Generator[tuple[Shard, ShardOutput]]:
        """Yield each shard with its output, in any order. An output depends on the items of its shard alone.

        The only exception is an engine that decodes several shards together: then its rounding may depend on them.
        """

    @abstractmethod
    def close(self) -> None:
        """Release memory that is not needed until the next stage."""


class OneByOne(ShardWork):
    """Work that computes one shard after the other."""

    @abstractmethod
    def compute(self, items: Sequence[Any], progress: Progress) -> ShardOutput:
        """The output of a shard with these items."""

    def outputs(self, shards: Sequence[Shard], progress: ShardProgress) -> Generator[tuple[Shard, ShardOutput]]:
        """Yield each shard with its output, in order."""
        for shard in shards:
            yield shard, self.compute(shard.items, partial(progress, shard))


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
    together: bool = False  # whether a worker gets several shards at once, because its engine decodes them together
    id: str = field(default_factory=lambda: uuid4().hex)  # two attempts at a stage differ


def write_shards(
    work: ShardWork,
    writer: ShardWriter,
    shards: Sequence[Shard],
    progress: ShardProgress = lambda shard, done, total: None,
    before_write: Callable[[], None] = lambda: None,
) -> Generator[FinishedShard]:
    """Compute shards, and yield each when it is in the store.

    `before_write` raises an error if nothing must be written any more.
    """
    with closing(work.outputs(shards, progress)) as outputs:
        for shard, output in outputs:
            data = output.data
            if isinstance(data, pa.Table):
                before_write()
            else:
                data = _then(data, before_write)
            target = ShardWriter(writer.run, AHEAD, writer.round + 1, writer.epoch) if shard.ahead else writer
            yield FinishedShard(shard.key, target.write(shard.index, data, output.metrics), output.facts)


def _then(tables: Iterable[pa.Table], before_write: Callable[[], None]) -> Iterator[pa.Table]:
    """The tables, then `before_write`: a file gets its name only after the last of them."""
    yield from tables
    before_write()
