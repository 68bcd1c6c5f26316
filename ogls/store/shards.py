"""Parts of a shard: the row groups that have some rows. Of a large file, nothing else is read."""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from ogls.errors import StoreError
from ogls.records import TABLES
from ogls.records.schema import upgrade_schema
from ogls.store.manifest import FileEntry

if TYPE_CHECKING:
    from ogls.store.run_store import RunStore


def read_rows(run: RunStore, entry: FileEntry, rows: Sequence[int]) -> pa.Table:
    """Some rows of a shard, by their positions in ascending order. Reads only the row groups that have them.

    Raises StoreError if the file is missing or damaged, or if a newer release wrote it.
    """
    with _open(run, entry) as file:
        counts = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
        ends = list(accumulate(counts))
        groups = sorted({bisect_right(ends, row) for row in rows})
        present = [row for group in groups for row in range(ends[group] - counts[group], ends[group])]
        position = {row: i for i, row in enumerate(present)}
        arrow = file.read_row_groups(groups).take([position[row] for row in rows])
    return upgrade_schema(TABLES[entry.table], arrow)


def count_row_groups(run: RunStore, entry: FileEntry) -> int:
    """The number of row groups of a shard. Reads the end of the file. Raises as `read_rows`."""
    with _open(run, entry) as file:
        return int(file.metadata.num_row_groups)


def _open(run: RunStore, entry: FileEntry) -> contextlib.AbstractContextManager[pq.ParquetFile]:
    return opened(run, entry, run.storage.open_file(f"{run.name}/{entry.path}"))


@contextlib.contextmanager
def opened(run: RunStore, entry: FileEntry, source: Any) -> Iterator[pq.ParquetFile]:
    """A shard as pyarrow reads it from `source`. Raises StoreError if it is missing (`source` is None) or damaged."""
    if source is None:
        raise StoreError(f"{run.url(entry.path)} is missing; run the training again to redo its stage")
    try:
        with source, pq.ParquetFile(source) as file:
            yield file
    except (pa.ArrowInvalid, OSError) as error:
        raise StoreError(
            f"{run.url(entry.path)} is damaged ({error}); run the training again to redo its stage"
        ) from None
