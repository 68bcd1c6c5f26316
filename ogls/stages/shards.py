"""Cutting the work of a stage into shards, and skipping the finished ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from ogls.progress import Progress
from ogls.store.writer import StageWriter

T = TypeVar("T")


def unfinished_shards(
    items: Sequence[T], size: int, writer: StageWriter, progress: Progress, by: Callable[[T], Any] = lambda _: None
) -> Iterator[tuple[int, Sequence[T]]]:
    """(index, items) of each shard that is not finished yet; a shard holds one value of `by` only."""
    runs: list[list[T]] = []
    for item in items:
        if not runs or len(runs[-1]) == size or by(runs[-1][-1]) != by(item):
            runs.append([])
        runs[-1].append(item)
    done = 0
    for index, part in enumerate(runs):
        if index not in writer.finished:
            yield index, part
        done += len(part)
        progress(done, len(items))
