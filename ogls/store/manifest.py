"""The manifest of a finished stage: written last, and the only proof that the stage is done."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from ogls.config.fingerprint import fingerprint
from ogls.records.schema import SCHEMA_VERSION

DROPPABLE = "teacher_states"  # the only table whose files `retention` may delete to save space
OPTIMIZER = "optimizer.safetensors"  # the other files that it may delete: the optimizer states of old rounds


@dataclass(frozen=True)
class FileEntry:
    """One file of a finished stage; `path` is relative to the run's folder."""

    path: str
    table: str
    rows: int
    bytes: int
    sha256: str
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def is_droppable(self) -> bool:
        """Whether `retention` may delete the file: it is a cache, or only the round after it reads it."""
        return self.table == DROPPABLE or self.path.endswith(f"/{OPTIMIZER}")


@dataclass(frozen=True)
class Manifest:
    """The files that a stage wrote, and the fingerprint of its inputs."""

    stage: str
    round: int
    fingerprint: str
    files: tuple[FileEntry, ...]
    rows: int
    metrics: dict[str, Any]
    written: str
    version: str
    schema_version: int = SCHEMA_VERSION
    result_version: int = 2  # version of the fingerprint; manifests without this field have version 2
    numerics: dict[str, Any] = field(default_factory=dict)  # the numerics settings that the stage was carried out with
    epoch: int = 0  # of the lease under which it was written or sealed (`lease.py`); 0 on a local disk
    dropped: str = ""  # when `retention` deleted its droppable files (the stage stays done); empty if it did not

    @property
    def digest(self) -> str:
        """A hash of the inputs and the files; it does not depend on when they were written."""
        return fingerprint(self.fingerprint, [f.sha256 for f in self.files])

    @property
    def present_files(self) -> list[FileEntry]:
        """The files in the store: all files except dropped states and optimizer states."""
        return [f for f in self.files if not self.dropped or not f.is_droppable]

    def files_of(self, table: str) -> list[FileEntry]:
        """The files in the store that belong to `table`."""
        return [f for f in self.present_files if f.table == table]


@dataclass(frozen=True)
class Status:
    """The state of a stage: `why` is the reason if it is not done, `manifest` is set if it is done."""

    state: Literal["done", "missing", "changed", "damaged"]
    why: str = ""
    manifest: Manifest | None = None


def parse_manifest(data: dict[str, Any]) -> Manifest:
    """A manifest from its parsed JSON."""
    return Manifest(**{**data, "files": tuple(FileEntry(**f) for f in data["files"])})


def utc_now() -> str:
    """The current time in UTC, in ISO 8601 format with microseconds."""
    return datetime.now(UTC).isoformat(timespec="microseconds")
