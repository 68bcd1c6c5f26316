"""Writes the output of a stage: its shards, and its manifest last."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from ogls import __version__
from ogls.records.schema import RESULT_VERSION, Table, check_schema
from ogls.store.manifest import FileEntry, Manifest, utc_now
from ogls.store.run_store import RunStore


@dataclass(frozen=True)
class Checkpoint:
    """How far a shard had come when its stage was interrupted: `state` is JSON, `files` are entries by name."""

    state: dict[str, Any]
    files: dict[str, FileEntry]


class ShardWriter:
    """Writes the files of one stage, under the epoch of the process that holds the run (0 on a local disk)."""

    def __init__(self, run: RunStore, table: Table, round_: int, epoch: int = 0):
        self.run, self.table, self.round = run, table, round_
        self._epoch = epoch

    @property
    def epoch(self) -> int:
        """The epoch of the lease under which files are written; 0 on a local disk."""
        return self._epoch

    def write(
        self, index: int, data: pa.Table | Iterable[pa.Table], metrics: Mapping[str, float] | None = None
    ) -> FileEntry:
        """Write shard `index`. Returns its entry, which only the process that holds the run records.

        Of several tables, each becomes a row group, and only one is in memory at a time.
        """
        return self._parquet(f"part-{index:04d}", self.table, data, metrics)

    def _parquet(
        self, name: str, table: Table, data: pa.Table | Iterable[pa.Table], metrics: Mapping[str, float] | None
    ) -> FileEntry:
        names = [leaf for f in table.schema for leaf in _leaves(f)]
        split = [leaf for leaf in names if leaf.split(".")[0] in table.float_lists]
        plain = {leaf for leaf in names if leaf.split(".")[0] in table.opaque}
        options: dict[str, Any] = {
            "compression": {leaf: "NONE" if leaf in plain else "ZSTD" for leaf in names},
            "use_dictionary": [leaf for leaf in names if leaf not in plain and leaf not in split],
            "use_byte_stream_split": split or False,
            "write_statistics": [leaf for leaf in names if leaf not in plain],
        }
        if isinstance(data, pa.Table):
            sink = pa.BufferOutputStream()
            pq.write_table(check_schema(table, data).cast(table.stored_schema), sink, **options)
            return self._put(f"{name}.parquet", table.name, len(data), sink.getvalue(), metrics)
        rows = 0

        def write(file: BinaryIO) -> None:
            nonlocal rows
            with pq.ParquetWriter(file, table.stored_schema, **options) as writer:
                for group in data:
                    writer.write_table(check_schema(table, group).cast(table.stored_schema), len(group))
                    rows += len(group)

        path = self._path(f"{name}.parquet", table.name)
        size, checksum = self.run.storage.write_file(f"{self.run.name}/{path}", write)
        return FileEntry(path, table.name, rows, size, checksum, dict(metrics or {}))

    def _put(
        self, name: str, table: str, rows: int, content: bytes | pa.Buffer, metrics: Mapping[str, float] | None
    ) -> FileEntry:
        path = self._path(name, table)
        self.run.storage.write_bytes(f"{self.run.name}/{path}", content)
        checksum = hashlib.sha256(content).hexdigest()
        return FileEntry(path, table, rows, len(content), checksum, dict(metrics or {}))

    def _path(self, name: str, table: str) -> str:
        """The path of a file to write."""
        folder = self.run.folder(table, self.round)
        return f"{folder}/e{self.epoch}/{name}" if self.epoch else f"{folder}/{name}"


class StageWriter(ShardWriter):
    """Writes the shards of one stage and, last, its manifest.

    Keeps undamaged shards of an interrupted attempt with the same fingerprint: `finished` maps the index of a shard to
    its entry, `checkpoint` is the newest one within a shard. `commit` removes all other files in the folder and records
    `numerics`, the numerics settings. In an object store, files are in a folder of the epoch of the lease
    (`e7/part-0000.parquet`), so that no two holders of the run write the same file.
    """

    def __init__(
        self, run: RunStore, table: Table, round_: int, fingerprint: str, numerics: Mapping[str, Any] | None = None
    ):
        super().__init__(run, table, round_)
        self.fingerprint = fingerprint
        self.numerics = dict(numerics or {})
        self._shard_size: int | None = None
        self.folder = run.folder(table.name, round_)
        self.finished: dict[int, FileEntry] = {}
        self.workers: dict[str, dict[str, Any]] = {}  # what each worker (host/process) did
        self.borrowed_seconds = 0.0  # for which its shards were computed beside another stage; negative in that one
        self.notices: list[str] = []  # what happened to workers
        self.checkpoint: Checkpoint | None = None
        self._extra: list[FileEntry] = []
        partial = run.read_json(f"{self.folder}/partial.json")
        run.void(f"{self.folder}/manifest.json")
        # Another release may split a stage into different shards.
        if partial and partial.get("fingerprint") == fingerprint and partial.get("version") == __version__:
            entries = {int(i): FileEntry(**entry) for i, entry in partial["shards"].items()}
            self.finished = {i: entry for i, entry in entries.items() if not run.find_damage(entry)}
            self._shard_size = partial.get("shard_size")
            self.workers, self.borrowed_seconds = partial.get("workers", {}), partial.get("borrowed_seconds", 0.0)
            self.checkpoint = self._read_checkpoint(partial.get("checkpoint"))
        self.kept = len(self.finished)  # shards of the interrupted attempt

    def divide(self, shard_size: int) -> None:
        """Declare the number of items per shard. Discards the shards of an attempt that used another number."""
        if self._shard_size != shard_size:
            self.finished.clear()
            self.workers.clear()
            self.kept, self.borrowed_seconds, self._shard_size = 0, 0.0, shard_size

    def write_shard(
        self, index: int, data: pa.Table | Iterable[pa.Table], metrics: Mapping[str, float] | None = None
    ) -> None:
        """Write shard `index` and record it as finished. `summed_metrics` adds up `metrics` over the shards."""
        self.record_shard(index, self.write(index, data, metrics))

    def record_shard(self, index: int, entry: FileEntry) -> None:
        """Record a shard that is in the store as finished."""
        self.finished[index] = entry
        self._write_partial()

    def lend_seconds(self, other: StageWriter, seconds: float) -> None:
        """Count `seconds` of this stage as those of another one, which was carried out beside it."""
        self.borrowed_seconds -= seconds
        other.borrowed_seconds += seconds
        other._write_partial()

    def take_over(self, other: StageWriter) -> None:
        """Take the finished shards of `other`, which has the same fingerprint and schema, and remove them there."""
        self.borrowed_seconds = self.borrowed_seconds or other.borrowed_seconds
        self.workers = self.workers or other.workers
        for index in sorted(other.finished.keys() - self.finished.keys()):
            entry = other.finished[index]
            content, damage = self.run.read_verified(entry)
            if not damage:
                name = f"part-{index:04d}.parquet"
                self.finished[index] = self._put(name, self.table.name, entry.rows, content, entry.metrics)
        self._write_partial()
        other.discard()

    def discard(self) -> None:
        """Remove all files of the stage."""
        self.run.void(f"{self.folder}/partial.json")
        self._remove_unlisted(set())

    def write_checkpoint(self, kind: str, state: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
        """Record how far the current shard has come, in place of the checkpoint before.

        `state` is JSON and has a number `step` that grows; `files` become `kind/round=.../checkpoint-STEP-NAME`.
        """
        before = self.checkpoint
        names = {name: f"checkpoint-{state['step']:06d}-{name}" for name in files}
        self.checkpoint = Checkpoint(
            dict(state), {name: self._put(names[name], kind, 0, content, None) for name, content in files.items()}
        )
        self._write_partial()
        for entry in before.files.values() if before else ():
            self.run.storage.remove(f"{self.run.name}/{entry.path}")

    def _read_checkpoint(self, recorded: Mapping[str, Any] | None) -> Checkpoint | None:
        """The checkpoint that partial.json records; None without one, or if a file of it is damaged."""
        if not recorded:
            return None
        files = {name: FileEntry(**entry) for name, entry in recorded["files"].items()}
        return None if any(map(self.run.find_damage, files.values())) else Checkpoint(recorded["state"], files)

    def _write_partial(self) -> None:
        partial = {
            "fingerprint": self.fingerprint,
            "version": __version__,
            "shard_size": self._shard_size,
            "workers": self.workers,
            "borrowed_seconds": self.borrowed_seconds,
            "shards": {str(i): asdict(entry) for i, entry in sorted(self.finished.items())},
        }
        if self.checkpoint:
            partial["checkpoint"] = asdict(self.checkpoint)
        self.run.write_json(f"{self.folder}/partial.json", partial)

    def write_extra(self, table: Table, data: pa.Table) -> None:
        """Write an additional small table (one file) that the manifest of this stage lists."""
        self._extra.append(self._parquet("part-0000", table, data, None))

    def attach_file(self, kind: str, name: str, content: bytes) -> None:
        """Write a file that is not a table (an adapter, optimizer state) as `kind/round=.../name`."""
        self._extra.append(self._put(name, kind, 0, content, None))

    def summed_metrics(self) -> dict[str, float]:
        """The sum of each metric over the finished shards."""
        sums: dict[str, float] = {}
        for _, entry in sorted(self.finished.items()):
            for name, value in entry.metrics.items():
                sums[name] = sums.get(name, 0) + value
        return sums

    def commit(self, stage: str, metrics: Mapping[str, Any]) -> Manifest:
        """Write the manifest, which makes the stage done, and remove files that it does not list."""
        shards = [entry for _, entry in sorted(self.finished.items())]
        manifest = Manifest(
            stage=stage,
            round=self.round,
            fingerprint=self.fingerprint,
            files=(*shards, *self._extra),
            rows=sum(entry.rows for entry in shards),
            metrics={**self.summed_metrics(), **metrics},
            written=utc_now(),
            version=__version__,
            result_version=RESULT_VERSION,
            numerics=self.numerics,
        )
        # The manifest first: a process that has lost the run fails here, and removes nothing.
        self.run.write_json(f"{self.folder}/manifest.json", asdict(manifest))
        self._remove_unlisted({entry.path for entry in manifest.files})
        self.run.void(f"{self.folder}/partial.json")
        return manifest

    def _remove_unlisted(self, keep: set[str]) -> None:
        """Remove the files of this stage that its manifest does not list, except those of a later epoch."""
        owners = (self.table.name, *(entry.table for entry in self._extra))
        for folder in {self.run.folder(owner, self.round) for owner in owners}:
            for name in self.run.storage.list_files(f"{self.run.name}/{folder}"):
                kept = f"{folder}/{name}" in keep or name in ("manifest.json", "partial.json")
                if not kept and _epoch_of(name) <= self.epoch:
                    self.run.storage.remove(f"{self.run.name}/{folder}/{name}")

    @property
    def epoch(self) -> int:
        """The epoch under which this process holds the run; 0 on a local disk."""
        return self.run.lease.epoch if self.run.lease else 0

    def _path(self, name: str, table: str) -> str:
        """The path of a file to write. Raises RunLocked if this process has lost the run."""
        if lease := self.run.lease:
            lease.check()
        return super()._path(name, table)


def _epoch_of(name: str) -> int:
    """The epoch of a file from its path in the folder of a round (`e7/part-0000.parquet`: 7); 0 without one."""
    folder = name.partition("/")[0]
    return int(folder[1:]) if "/" in name and folder[:1] == "e" and folder[1:].isdigit() else 0


def _leaves(column: pa.Field) -> list[str]:
    """Parquet leaf paths of a column: the values of a list, the keys and values of a map."""
    if pa.types.is_map(column.type):
        return [f"{column.name}.key_value.{part}" for part in ("key", "value")]
    return [f"{column.name}.list.element"] if pa.types.is_list(column.type) else [column.name]
