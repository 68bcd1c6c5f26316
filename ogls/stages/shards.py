"""Divide the work of a stage into shards, and skip the finished ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from ogls.progress import Progress
from ogls.store.writer import StageWriter

T = TypeVar("T")


def unfinished_shards(
    items: Sequence[T], size: int, writer: StageWriter, progress: Progress, by: Callable[[T], Any] = lambda _: None
) -> Iterator[tuple[int, Sequence[T]]]:
    """Yield (index, items) of each shard that is not finished.

    A shard has at most `size` consecutive items, all with the same value of `by`.
    """
    writer.divide(size)
    shards: list[list[T]] = []
    for item in items:
        if not shards or len(shards[-1]) == size or by(shards[-1][-1]) != by(item):
            shards.append([])
        shards[-1].append(item)
    done = 0
    for index, part in enumerate(shards):
        if index not in writer.finished:
            yield index, part
        done += len(part)
        progress(done, len(items))
