"""What a table of the store is, and how its schema is checked on write and upgraded on read.

A release reads the files of every older release. A newer schema only adds tables and nullable columns;
`upgrade_schema` fills the columns that an older file lacks with nulls. RESULT_VERSION is part of every fingerprint and
is raised only when the same inputs would give other rows, so a new column redoes no finished work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from ogls.errors import DataError, StoreError

SCHEMA_VERSION = 3  # 3: entropies in targets, the table steered; 2: adapters with a start, style, health
RESULT_VERSION = 2


@dataclass(frozen=True)
class Table:
    """One table: its schema, the stage that writes it, and the table whose folder has its manifest."""

    name: str
    stage: str
    about: str
    schema: pa.Schema
    owner: str = ""
    float_lists: tuple[str, ...] = ()  # list columns stored as BYTE_STREAM_SPLIT, which compresses them best
    opaque: tuple[str, ...] = ()  # columns that only code reads: stored without dictionary and compression

    @property
    def manifest_table(self) -> str:
        """The table whose folder has the manifest of this table."""
        return self.owner or self.name


def column(name: str, type_: pa.DataType, about: str, nullable: bool = False) -> pa.Field:
    return pa.field(name, type_, nullable=nullable, metadata={"about": about})


def columns(*fields: pa.Field) -> pa.Schema:
    return pa.schema(fields, metadata={"ogls_schema_version": str(SCHEMA_VERSION)})


def to_arrow(table: Table, rows: list[dict[str, Any]]) -> pa.Table:
    """Rows as an Arrow table with the schema of `table`. Raises DataError naming the column that does not fit."""
    known, given = set(table.schema.names), set(rows[0]) if rows else set()
    if rows and known != given:
        raise DataError(f"{table.name}: missing {sorted(known - given)}, unknown {sorted(given - known)}")
    try:
        arrow = pa.Table.from_pylist(rows, schema=table.schema)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(f"{table.name}: {error}") from None
    return check_schema(table, arrow)


def check_schema(table: Table, arrow: pa.Table) -> pa.Table:
    """Return `arrow` if it has the schema of `table` and no nulls in columns that forbid them; raise DataError
    otherwise."""
    if not arrow.schema.equals(table.schema):
        raise DataError(f"{table.name}: schema differs\n got: {arrow.schema}\n want: {table.schema}")
    for name in (f.name for f in table.schema if not f.nullable):
        if count := arrow[name].null_count:
            raise DataError(f"{table.name}.{name}: {count} of {len(arrow)} values are null")
    return arrow


def upgrade_schema(table: Table, arrow: pa.Table, wanted: Sequence[str] | None = None) -> pa.Table:
    """The `wanted` columns (None: all) with the types of this release, from a file of this or an older release.

    Raises StoreError if a required column is missing, or if a newer release wrote the file.
    """
    fields = [table.schema.field(name) for name in wanted or table.schema.names]
    present = set(arrow.schema.names)
    if missing := [f.name for f in fields if f.name not in present and not f.nullable]:
        raise StoreError(f"{table.name}: the file lacks the columns {', '.join(missing)}, so it is not this table")
    written = int((arrow.schema.metadata or {}).get(b"ogls_schema_version", 0))
    if written > SCHEMA_VERSION:
        raise StoreError(
            f"{table.name}: written in schema version {written}, and this release knows up to {SCHEMA_VERSION}: "
            "install a newer ogls-sd"
        )
    parts = [arrow[f.name] if f.name in present else pa.nulls(len(arrow), f.type) for f in fields]
    return pa.table(parts, schema=pa.schema(fields, metadata=table.schema.metadata))
