"""What a finished stage leaves besides its rows: the manifest, last to be written and the only proof."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from ogls.config.fingerprint import fingerprint
from ogls.records.schema import SCHEMA_VERSION

DROPPABLE = "teacher_states"  # the one table whose files may be dropped to save space (`retention`)


@dataclass(frozen=True)
class FileEntry:
    """One file of a finished stage; `path` is relative to the run's folder."""

    path: str
    table: str
    rows: int
    bytes: int
    sha256: str
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """What a stage wrote, from what. Its `digest` stands for its content, not for when it was made."""

    stage: str
    round: int
    fingerprint: str
    files: tuple[FileEntry, ...]
    rows: int
    metrics: dict[str, Any]
    written: str
    version: str
    schema_version: int = SCHEMA_VERSION
    dropped: str = ""  # when the files were dropped to save space (`retention`): the stage stays done

    @property
    def digest(self) -> str:
        return fingerprint(self.fingerprint, [f.sha256 for f in self.files])

    @property
    def present_files(self) -> list[FileEntry]:
        """The files that are in the store: all but the states that were dropped."""
        return [f for f in self.files if not self.dropped or f.table != DROPPABLE]

    def files_of(self, table: str) -> list[FileEntry]:
        return [f for f in self.present_files if f.table == table]


@dataclass(frozen=True)
class Status:
    """Whether a stage is done; if not, `why` says what was found."""

    state: Literal["done", "missing", "changed", "damaged"]
    why: str = ""
    manifest: Manifest | None = None


def parse_manifest(data: dict[str, Any]) -> Manifest:
    return Manifest(**{**data, "files": tuple(FileEntry(**f) for f in data["files"])})


def utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")
