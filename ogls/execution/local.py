"""Carrying out the shards of a stage in this process: one after the other, or together where the work can do that."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

from ogls.execution.work import FinishedShard, Shard, ShardProgress, ShardWork, write_shards
from ogls.store.writer import ShardWriter


def carry_out(
    open_work: Callable[[], ShardWork],
    writer: ShardWriter,
    shards: Sequence[Shard],
    progress: ShardProgress,
) -> Generator[FinishedShard]:
    """Yield each shard when it is in the store. `progress(shard, done, total)` is called within a shard."""
    if not shards:
        return
    work = open_work()
    yield from write_shards(work, writer, shards, progress)
    work.close()
