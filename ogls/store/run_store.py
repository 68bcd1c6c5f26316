"""The folder of one run: its configuration, which stages are done, and reading its tables."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from ogls.config import RunConfig
from ogls.config.fingerprint import canonical_json, differences, flatten, numerics
from ogls.config.redact import redact_credentials
from ogls.errors import StoreError
from ogls.records import TABLES
from ogls.records.schema import RESULT_VERSION, upgrade_schema
from ogls.records.stages import STAGES
from ogls.revision import code_version
from ogls.store.holder import parse_object
from ogls.store.lease import Lease, held_lease
from ogls.store.lock import find_holder, hold_run
from ogls.store.manifest import DROPPABLE, FileEntry, Manifest, Status, parse_manifest, utc_now
from ogls.store.shards import opened
from ogls.store.storage import Storage


class RunStore:
    """The folder of one run; paths are relative to it."""

    def __init__(self, storage: Storage, name: str):
        self.storage = storage
        self.name = name

    # --- the run --------------------------------------------------------------------------------

    def read_info(self) -> dict[str, Any] | None:
        """run.json: `created`, `config` (all settings), `canonical` (the settings that identify the run, with contents
        in place of paths), `contents` and `files` (see `ogls.stages.contents`).

        None if the run does not exist.
        """
        return _json(self.storage.read_bytes(f"{self.name}/run.json"))

    def open(self, config: RunConfig, identity: RunConfig | None = None, **facts: Any) -> str:
        """Start or resume the run.

        `identity` is the configuration with contents in place of paths, and `facts` are kept in run.json. Returns a
        notice if the numerics settings have changed, or if another version of ogls-sd carried out the run last; else an
        empty string. A run without a finished stage accepts any configuration.

        Raises StoreError if the run was started with another configuration, or by another version and
        `execution.other_version` is `refuse`.
        """
        info, version = self.read_info(), code_version()["version"]
        if changes := self.changes(config, identity or config):
            if self.manifest("problems", 0):
                listed = "\n  ".join(changes)
                raise StoreError(
                    f"run {self.name} exists with another configuration; choose another name, or undo these changes:\n"
                    f"  {listed}"
                )
            info = None
        notices = []
        if info and info["version"] != version:
            notice = f"run {self.name} was last carried out by ogls-sd {info['version']}, and this is {version}"
            if config.execution.other_version == "refuse":
                raise StoreError(
                    f"{notice}; install that version, choose another run name, or set execution.other_version = accept"
                )
            notices.append(
                f"{notice}: finished stages are kept, this version runs the others (execution.other_version)"
            )
        if info and (changes := _changed_numerics(info["config"], config)):
            notices.append(f"run {self.name} goes on with other numerics settings: {', '.join(changes)}")
        self.write_json(
            "run.json",
            {
                "created": info["created"] if info else utc_now(),
                **code_version(),
                "config": json.loads(redact_credentials(config.model_dump_json())),
                "canonical": json.loads(canonical_json(identity or config))[0],
                **facts,
            },
        )
        return "; ".join(notices)

    def changes(self, config: RunConfig, identity: RunConfig) -> list[str]:
        """The identity settings in which a configuration differs from that of the run, a line each.

        `identity` is `config` with contents in place of paths. A run of a release before 0.3.0 recorded paths.
        """
        info = self.read_info()
        if info is None:
            return []
        compared = identity if "contents" in info else config
        return differences(info["canonical"], compared.model_copy(update={"name": self.name}))

    @contextlib.contextmanager
    def lock(self, purpose: str) -> Iterator[None]:
        """Hold the run for this process. Raises RunLocked, naming the holder, if another live process holds it."""
        with hold_run(self.storage, self.name, purpose):
            yield

    def describe_holder(self) -> str | None:
        """The process that holds the run, as one line; None if the run is free."""
        return find_holder(self.storage, self.name)

    def read_json(self, name: str) -> dict[str, Any] | None:
        """A JSON object of the run; None if the file does not exist or is incomplete."""
        return _json(self.storage.read_bytes(f"{self.name}/{name}"))

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON object. Raises RunLocked if this process has lost the run to another one (`lease.py`)."""
        if lease := self.lease:
            lease.write(name, value)
        else:
            self.storage.write_bytes(f"{self.name}/{name}", json.dumps(value, indent=1).encode())

    def void(self, name: str) -> None:
        """Remove a JSON object; in an object store, empty it, because a removal cannot be conditional."""
        if lease := self.lease:
            lease.write(name, {})
        else:
            self.storage.remove(f"{self.name}/{name}")

    @property
    def lease(self) -> Lease | None:
        """The lease by which this process holds the run in an object store; None on a local disk or without a lock."""
        return held_lease(self.storage, self.name)

    # --- stages ---------------------------------------------------------------------------------

    def folder(self, table: str, round_: int) -> str:
        """The folder of a round of a table, relative to the run's folder."""
        return f"{table}/round={round_:03d}"

    def url(self, path: str) -> str:
        """The absolute path or URL of `path`, a path relative to the run's folder."""
        return f"{self.storage.url}/{self.name}/{path}"

    def manifest(self, table: str, round_: int) -> Manifest | None:
        """The manifest of the stage that writes `table`; None if the stage is not done."""
        owner = TABLES[table].manifest_table
        data = _json(self.storage.read_bytes(f"{self.name}/{self.folder(owner, round_)}/manifest.json"))
        return parse_manifest(data) if data else None

    def rounds(self, table: str) -> list[int]:
        """Rounds in which the stage that writes `table` is done, sorted."""
        return [m.round for m in self.manifests(table)]

    def manifests(self, table: str) -> list[Manifest]:
        """The manifests of the stage that writes `table`, by round."""
        return [m for n in self.started_rounds(table) if (m := self.manifest(table, n))]

    def newest_manifest(self, table: str) -> Manifest | None:
        """The manifest of the newest round in which the stage that writes `table` is done; None without one."""
        manifests = (self.manifest(table, n) for n in reversed(self.started_rounds(table)))
        return next(filter(None, manifests), None)

    def has_files(self, table: str, round_: int) -> bool:
        """Whether the folder of a round of a table has files, of a finished stage or not."""
        return bool(self.storage.list_names(f"{self.name}/{self.folder(table, round_)}"))

    def started_rounds(self, table: str) -> list[int]:
        """Rounds for which the table has a folder, sorted. Reads no manifest."""
        names = self.storage.list_names(f"{self.name}/{TABLES[table].manifest_table}")
        return sorted(int(n.removeprefix("round=")) for n in names if n.startswith("round="))

    def status(self, table: str, round_: int, fingerprint: str, hash_states: bool = True) -> Status:
        """Whether the stage is done for this fingerprint, with all its files present and undamaged.

        Without `hash_states`, only the sizes of teacher states are compared: no stage reads them any more.

        Fingerprints of an older version cannot be compared. What it finished stays done, unless an earlier stage of the
        round was redone since.
        """
        owner = TABLES[table].manifest_table
        raw = self.storage.read_bytes(f"{self.name}/{self.folder(owner, round_)}/manifest.json")
        data = _json(raw)
        if data is None:
            void = raw is None or parse_object(raw).keys() == {"epoch"}
            return Status("missing") if void else Status("damaged", "its manifest cannot be read")
        manifest = parse_manifest(data)
        older = manifest.result_version < RESULT_VERSION
        if self._has_newer_input(manifest) if older else manifest.fingerprint != fingerprint:
            return Status("changed", "its configuration or input has changed")
        for entry in manifest.present_files:
            is_state = entry.table == DROPPABLE
            if problem := self.find_damage(entry) if hash_states or not is_state else self._find_other_size(entry):
                return Status("damaged", f"{entry.path} {problem}")
        return Status("done", manifest=manifest)

    def _has_newer_input(self, manifest: Manifest) -> bool:
        """Whether an earlier stage of the same round was finished after this one."""
        names = [stage.name for stage in STAGES]
        earlier = [s for s in STAGES[: names.index(manifest.stage)] if not s.diagnostic]
        inputs = (self.manifest(stage.table, manifest.round) for stage in earlier)
        return any(m is not None and m.written > manifest.written for m in inputs)

    def find_damage(self, entry: FileEntry) -> str:
        """Describe the damage of a file; an empty string if it is undamaged."""
        return self.read_verified(entry)[1]

    def _find_other_size(self, entry: FileEntry) -> str:
        """Describe the damage of a file that its size shows; an empty string without one. Does not read the file."""
        size = self.storage.size(f"{self.name}/{entry.path}")
        if size is None:
            return "is missing"
        return "" if size == entry.bytes else f"has {size} bytes instead of {entry.bytes}"

    def is_intact(self, table: str, round_: int) -> bool:
        """Whether the stage that writes `table` has a manifest, and all its files are present and undamaged."""
        manifest = self.manifest(table, round_)
        return manifest is not None and not any(self.find_damage(entry) for entry in manifest.present_files)

    def read_verified(self, entry: FileEntry) -> tuple[bytes, str]:
        """The content of a file, and a description of its damage (an empty string if it is undamaged)."""
        content = self.storage.read_bytes(f"{self.name}/{entry.path}")
        if content is None:
            return b"", "is missing"
        if len(content) != entry.bytes:
            return content, f"has {len(content)} bytes instead of {entry.bytes}"
        return content, "" if hashlib.sha256(content).hexdigest() == entry.sha256 else "has another checksum"

    def list_shards(self, table: str, round_: int) -> list[FileEntry]:
        """The files of a table in a finished round.

        Raises StoreError if its stage is not done or its states were dropped.
        """
        manifest = self.manifest(table, round_)
        if manifest is None:
            stage = TABLES[table].stage
            raise StoreError(f"run {self.name} round {round_}: {table} does not exist; run the stage {stage} first")
        if manifest.dropped and table == DROPPABLE:
            raise StoreError(
                f"run {self.name} round {round_}: {table} were dropped to save space on {manifest.dropped[:10]} "
                f"(storage.keep_states, ogls gc); remove {self.url(self.folder(table, round_))} to compute them again"
            )
        return manifest.files_of(table)

    def read(self, table: str, round_: int, columns: list[str] | None = None) -> pa.Table:
        """The rows of a table in a finished round; `columns` selects columns.

        Raises StoreError if its stage is not done, its states were dropped, or a file is missing or damaged.
        """
        shards = [self.read_shard(entry, columns) for entry in self.list_shards(table, round_)]
        schema = TABLES[table].schema
        empty = (schema if columns is None else pa.schema([schema.field(c) for c in columns])).empty_table()
        return pa.concat_tables(shards) if shards else empty

    def read_shard(self, entry: FileEntry, columns: list[str] | None = None) -> pa.Table:
        """One shard of a table, with the columns of this release even if an older release wrote it.

        Raises StoreError if the file is missing or damaged, or if a newer release wrote it.
        """
        content = self.storage.read_bytes(f"{self.name}/{entry.path}")
        with opened(self, entry, None if content is None else pa.BufferReader(content)) as file:
            stored = file.schema_arrow.names
            arrow = file.read(None if columns is None else [c for c in columns if c in stored])
        return upgrade_schema(TABLES[entry.table], arrow, columns)


def _changed_numerics(before: Mapping[str, Any], config: RunConfig) -> list[str]:
    """`key old -> new` of each numerics setting with another value than in a stored configuration."""
    old = dict(flatten(before))
    now = numerics(config)
    return [f"{key} {old[key]} -> {value}" for key, value in now.items() if key in old and old[key] != value]


def _json(raw: bytes | None) -> dict[str, Any] | None:
    """The parsed JSON object; None if there is no file, or it is incomplete or void (nothing but an epoch)."""
    value = parse_object(raw or b"")
    return value if value.keys() - {"epoch"} else None
