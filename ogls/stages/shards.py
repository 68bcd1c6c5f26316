"""Divide the work of a stage into shards, and have the unfinished ones carried out."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar

from ogls.errors import StoreError
from ogls.execution import local
from ogls.execution.work import FinishedShard, Shard, ShardWork
from ogls.progress import Progress
from ogls.stages.run import Run
from ogls.stages.workers import carry_out_on_ray
from ogls.store.manifest import FileEntry
from ogls.store.writer import StageWriter

T = TypeVar("T")
Work = Callable[[Run, int], ShardWork]  # loads the work of a stage for a round; a class or function of a module


def divide(items: Sequence[T], size: int, by: Callable[[T], Any] = lambda _: None) -> list[Shard]:
    """Shards of at most `size` consecutive items, all with the same value of `by`."""
    parts: list[list[T]] = []
    for item in items:
        if not parts or len(parts[-1]) == size or by(parts[-1][-1]) != by(item):
            parts.append([])
        parts[-1].append(item)
    return [Shard(index, part) for index, part in enumerate(parts)]


def divide_files(entries: Sequence[FileEntry], size: int, weigh: Callable[[FileEntry], int]) -> list[Shard]:
    """Shards of consecutive files: the next one begins where the sum of `weigh` reaches a multiple of `size`.

    With size 0, all files are one shard.
    """
    before = accumulate(map(weigh, entries), initial=0)
    number = dict(zip((e.path for e in entries), (n // size if size else 0 for n in before), strict=False))
    return divide(entries, len(entries), by=lambda entry: number[entry.path])


@dataclass(frozen=True)
class Ahead:
    """Shards of the stage `sample` of the next round, to carry out beside those of this one."""

    writer: StageWriter
    shards: Sequence[Shard]


def carry_out_shards(
    run: Run,
    work: Work,
    writer: StageWriter,
    shards: Sequence[Shard],
    size: int,
    progress: Progress,
    ahead: Ahead | None = None,
) -> list[Mapping[str, Any]]:
    """Have every shard that is not finished carried out, where `execution.workers` says. Returns their facts.

    `size` is the number of items per shard. Finished shards of an interrupted attempt are kept if it was the same.
    Those of `ahead` come after the others; the time is divided between the two stages by their tokens.
    """
    writer.divide(size)
    started, writers = time.perf_counter(), {False: writer, **({True: ahead.writer} if ahead else {})}
    every = {shard.key: shard for shard in (*shards, *(ahead.shards if ahead else ()))}
    unfinished = [shard for shard in every.values() if shard.index not in writers[shard.ahead].finished]
    total = sum(len(shard.items) for shard in every.values())
    done = total - sum(len(shard.items) for shard in unfinished)
    facts, tokens = [], Counter[bool]()
    if done:
        progress(done, total)

    def within(shard: Shard, part: int, parts: int) -> None:
        progress(done + len(shard.items) * part // max(parts, 1), total)

    if run.config.execution.workers == "ray":
        finished = carry_out_on_ray(run, work, writer, unfinished)
    else:
        finished = local.carry_out(lambda: work(run, writer.round), writer, unfinished, within)
    with closing(finished):  # an error here ends what is under way
        for shard in finished:
            is_ahead, index = shard.key
            _count(writers[is_ahead], shard)
            writers[is_ahead].record_shard(index, shard.entry)
            tokens[is_ahead] += int(shard.entry.metrics.get("tokens", 0))
            facts.append(shard.facts)
            done += len(every[shard.key].items)
            progress(done, total)
    if len(facts) < len(unfinished):
        raise StoreError(
            f"{len(unfinished) - len(facts)} of {len(unfinished)} shards were not computed; run the same command again"
        )
    if ahead and tokens[True]:
        writer.lend_seconds(ahead.writer, (time.perf_counter() - started) * tokens[True] / tokens.total())
    return facts


def _count(writer: StageWriter, shard: FinishedShard) -> None:
    """Add a shard to what its worker did."""
    if shard.worker:
        nothing = {"device": shard.device, "shards": 0, "seconds": 0.0, "tokens": 0}
        of_worker = writer.workers.setdefault(shard.worker, nothing)
        of_worker["shards"] += 1
        of_worker["seconds"] += shard.seconds
        of_worker["tokens"] += shard.entry.metrics.get("tokens", 0)
