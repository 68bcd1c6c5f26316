"""The record store: the only place that spells a path.

    <root>/<run>/<table>/round=003/part-0000.parquet    shards, written to a temporary name and renamed
    <root>/<run>/<table>/round=003/manifest.json        written last: the only proof that a stage is done
    <root>/<run>/<table>/round=003/partial.json         the shards of a stage that is under way

`root` is a directory or any fsspec URL. Object stores publish an object whole or not at all, so there the
rename is left out.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from ogls.config import RunConfig
from ogls.configfile import canonical, differences, without_secrets
from ogls.errors import StoreAway, StoreError
from ogls.filesystem import open_root
from ogls.manifest import DROPPABLE, FileEntry, Manifest, Status, now, parse
from ogls.records import TABLES
from ogls.revision import code
from ogls.runlock import hold, holder
from ogls.schema import upgrade


class Store:
    """All runs under one root."""

    def __init__(self, root: str):
        self.root = root
        self.fs, self.path = open_root(root)
        self.local = isinstance(self.fs, LocalFileSystem)

    def run(self, name: str) -> RunStore:
        return RunStore(self, name)

    def runs(self) -> list[RunStore]:
        """The runs, oldest first."""
        names = self.names_in("")
        found = [(about["created"], name) for name in names if (about := self.run(name).about())]
        return [self.run(name) for _, name in sorted(found)]

    def sql(self, statement: str, run: str | None = None) -> pa.Table:
        """The answer to one SELECT over the tables of all runs or one, as an Arrow table.

        `.to_pandas()` and `polars.from_arrow()` make data frames of it. Raises UserError for anything but one SELECT.
        """
        from ogls.query import query

        return query(self, statement, run)

    def read_bytes(self, path: str) -> bytes | None:
        """A file's content, or None if there is none. Raises StoreAway if a remote store does not answer."""
        full = f"{self.path}/{path}"
        try:
            content: bytes = Path(full).read_bytes() if self.local else self.fs.cat_file(full)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except OSError as error:
            raise self._failure("read", full, error) from error
        return content

    def write_bytes(self, path: str, data: bytes | pa.Buffer) -> None:
        """Publish a file whole or not at all.

        Raises StoreError if the disk is full or may not be written, StoreAway if a remote store does not answer.
        """
        full = f"{self.path}/{path}"
        try:
            if not self.local:
                self.fs.pipe_file(full, bytes(data))
                return
            self.fs.makedirs(os.path.dirname(full), exist_ok=True)
            temporary = f"{full}.tmp"
            try:
                with open(temporary, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, full)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
                raise
        except OSError as error:
            raise self._failure("write", full, error) from error

    def remove(self, path: str) -> None:
        full = f"{self.path}/{path}"
        try:
            self.fs.rm_file(full)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise self._failure("remove", full, error) from error

    def names_in(self, path: str) -> list[str]:
        """Names in a folder, sorted; none if there is no folder."""
        full = f"{self.path}/{path}".rstrip("/")
        try:
            if self.local:
                return sorted(os.listdir(full))
            return sorted(Path(p).name for p in self.fs.ls(full, detail=False, refresh=True))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise self._failure("list", full, error) from error

    def _failure(self, what: str, path: str, error: OSError) -> StoreError:
        """The error to raise: a local disk's is the user's to mend, a remote store may answer again."""
        if self.local or isinstance(error, FileNotFoundError | PermissionError):
            return StoreError(_local_failure(what, path, error))
        first = " ".join(str(error).split())[:300]
        return StoreAway(f"cannot {what} {self.fs.unstrip_protocol(path)}: {first}; what was finished is kept")


def _local_failure(what: str, path: str, error: OSError) -> str:
    advice = {
        errno.ENOSPC: "the disk is full: free some space",
        errno.EDQUOT: "the disk quota is used up: free some space",
        errno.EROFS: "the file system is read-only: set root to a folder that can be written",
        errno.EACCES: "permission denied: set root to a folder that can be written",
        errno.EPERM: "permission denied: set root to a folder that can be written",
        errno.ENOTDIR: "a file stands where a folder is needed: set root to another folder",
        errno.EEXIST: "a file stands where a folder is needed: set root to another folder",
    }.get(error.errno or 0, str(error))
    return f"cannot {what} {path}: {advice}, then run the same command again; what was finished is kept"


class RunStore:
    """One run's folder."""

    def __init__(self, store: Store, name: str):
        self.store = store
        self.name = name

    # --- the run itself -------------------------------------------------------------------------

    def about(self) -> dict[str, Any] | None:
        """`created`, `config` (resolved, whole) and `canonical` (what decides results); None for no run."""
        return _json(self.store.read_bytes(f"{self.name}/run.json"))

    def open(self, config: RunConfig) -> str:
        """Start the run, or go on with it; returns a notice if this is not the version of the code that began it.

        Raises StoreError if the run was started with another configuration, or with another version where
        `execution.other_version` refuses that.
        """
        about, mine = self.about(), code()["version"]
        if about and (changes := differences(about["canonical"], config.model_copy(update={"name": self.name}))):
            raise StoreError(
                f"run {self.name} exists with another configuration; take another name, or undo:\n  "
                + "\n  ".join(changes)
            )
        notice = ""
        if about and about["version"] != mine:
            notice = f"run {self.name} was last carried out by ogls-sd {about['version']}, and this is {mine}"
            if config.execution.other_version == "refuse":
                raise StoreError(f"{notice}; install that one, take another run name, or set other_version = accept")
            notice += ": finished stages stay as they are, the rest is this version's (execution.other_version)"
        self.write_json(
            "run.json",
            {
                "created": about["created"] if about else now(),
                **code(),
                "config": json.loads(without_secrets(config.model_dump_json())),
                "canonical": json.loads(canonical(config))[0],
            },
        )
        return notice

    @contextlib.contextmanager
    def lock(self, purpose: str) -> Iterator[None]:
        """Hold the run for this process. Raises RunLocked, saying who holds it, if another live one does."""
        with hold(self.store, self.name, purpose):
            yield

    def holder(self) -> str | None:
        """Who holds the run, in words; None if nobody does."""
        return holder(self.store, self.name)

    def read_json(self, name: str) -> dict[str, Any] | None:
        return _json(self.store.read_bytes(f"{self.name}/{name}"))

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        self.store.write_bytes(f"{self.name}/{name}", json.dumps(value, indent=1).encode())

    # --- stages ---------------------------------------------------------------------------------

    def folder(self, table: str, round_: int) -> str:
        """Folder of a table's round, relative to the run's."""
        return f"{table}/round={round_:03d}"

    def url(self, path: str) -> str:
        """Where a path of the run is, for whoever reads it without this store."""
        full = f"{self.store.path}/{self.name}/{path}"
        return full if self.store.local else self.store.fs.unstrip_protocol(full)

    def manifest(self, table: str, round_: int) -> Manifest | None:
        """The manifest of the stage that writes `table`; None if the stage is not done."""
        owner = TABLES[table].manifest_table
        data = _json(self.store.read_bytes(f"{self.name}/{self.folder(owner, round_)}/manifest.json"))
        return parse(data) if data else None

    def rounds(self, table: str) -> list[int]:
        """Rounds in which the stage that writes `table` has a manifest."""
        return [m.round for m in self.manifests(table)]

    def manifests(self, table: str) -> list[Manifest]:
        """The manifests of the stage that writes `table`, by round."""
        return [m for n in self._folders(table) if (m := self.manifest(table, n))]

    def newest(self, table: str) -> Manifest | None:
        """The manifest of the last round in which the stage that writes `table` was done."""
        found = (self.manifest(table, n) for n in reversed(self._folders(table)))
        return next(filter(None, found), None)

    def _folders(self, table: str) -> list[int]:
        """Rounds that have a folder of the table's."""
        names = self.store.names_in(f"{self.name}/{TABLES[table].manifest_table}")
        return sorted(int(n.removeprefix("round=")) for n in names if n.startswith("round="))

    def status(self, table: str, round_: int, wanted: str) -> Status:
        """Whether the stage is done for this fingerprint, all its files there and undamaged."""
        owner = TABLES[table].manifest_table
        raw = self.store.read_bytes(f"{self.name}/{self.folder(owner, round_)}/manifest.json")
        if raw is None:
            return Status("missing")
        data = _json(raw)
        if data is None:
            return Status("damaged", "its manifest cannot be read")
        manifest = parse(data)
        if manifest.fingerprint != wanted:
            return Status("changed", "its configuration or input has changed")
        for entry in manifest.there:
            if problem := self.damage(entry):
                return Status("damaged", f"{entry.path} {problem}")
        return Status("done", manifest=manifest)

    def damage(self, entry: FileEntry) -> str:
        """What is wrong with a file, or an empty string."""
        return self.checked(entry)[1]

    def checked(self, entry: FileEntry) -> tuple[bytes, str]:
        """A file's content, and what is wrong with it (an empty string for nothing)."""
        content = self.store.read_bytes(f"{self.name}/{entry.path}")
        if content is None:
            return b"", "is missing"
        if len(content) != entry.bytes:
            return content, f"has {len(content)} bytes instead of {entry.bytes}"
        return content, "" if hashlib.sha256(content).hexdigest() == entry.sha256 else "has another checksum"

    def shards(self, table: str, round_: int) -> list[FileEntry]:
        """The files of a table of a finished round. Raises StoreError if its stage is not done."""
        manifest = self.manifest(table, round_)
        if manifest is None:
            stage = TABLES[table].stage
            raise StoreError(f"run {self.name} round {round_}: {table} is not there; run the stage {stage} first")
        if manifest.dropped and table == DROPPABLE:
            raise StoreError(
                f"run {self.name} round {round_}: {table} were dropped to save space on {manifest.dropped[:10]} "
                f"(storage.keep_states, ogls gc); remove {self.url(self.folder(table, round_))} to have them made again"
            )
        return manifest.of(table)

    def read(self, table: str, round_: int, columns: list[str] | None = None) -> pa.Table:
        """A table of a finished round. Raises StoreError if its stage is not done or a file is unreadable."""
        shards = [self.read_shard(entry, columns) for entry in self.shards(table, round_)]
        schema = TABLES[table].schema
        empty = (schema if columns is None else pa.schema([schema.field(c) for c in columns])).empty_table()
        return pa.concat_tables(shards) if shards else empty

    def read_shard(self, entry: FileEntry, columns: list[str] | None = None) -> pa.Table:
        """One shard of a table, with the columns of this release whichever wrote it."""
        content = self.store.read_bytes(f"{self.name}/{entry.path}")
        if content is None:
            raise StoreError(f"{self.url(entry.path)} is missing; run the same training again to have it redone")
        try:
            file = pq.ParquetFile(pa.BufferReader(content))
            there = file.schema_arrow.names
            arrow = file.read(None if columns is None else [c for c in columns if c in there])
        except (pa.ArrowInvalid, OSError) as error:
            raise StoreError(f"{self.url(entry.path)} is damaged ({error}); run the training again") from None
        return upgrade(TABLES[entry.table], arrow, columns)


def _json(raw: bytes | None) -> dict[str, Any] | None:
    """Parsed JSON object; None for no file or a torn one."""
    try:
        value = json.loads(raw) if raw else None
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
