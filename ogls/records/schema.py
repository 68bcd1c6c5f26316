"""Tables of the store: their schema, its check on write and its upgrade on read.

A release reads the files of every older release. A newer schema only adds tables and nullable columns;
`upgrade_schema` fills the columns that an older file lacks with nulls. RESULT_VERSION is part of every fingerprint and
is raised when the same inputs would give other rows, or when fingerprints are made of other inputs. A stage that an
older version finished stays done (`RunStore.status`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from ogls.errors import DataError, StoreError

# 4: metrics in updates; 3: entropies in targets, the table steered; 2: adapters with a start, style, health
SCHEMA_VERSION = 4
RESULT_VERSION = 3  # 3: models, data and checkers by content, no numerics settings, no [health]


@dataclass(frozen=True)
class Table:
    """One table: its schema, the stage that writes it, and the table that its manifest is stored with (`owner`)."""

    name: str
    stage: str
    about: str
    schema: pa.Schema
    owner: str = ""
    float_lists: tuple[str, ...] = ()  # list columns stored with the encoding BYTE_STREAM_SPLIT, which compresses best
    opaque: tuple[str, ...] = ()  # binary columns, stored without dictionary, compression and statistics

    @property
    def manifest_table(self) -> str:
        """The table in whose folder the manifest of this table is stored: `owner`, or this table."""
        return self.owner or self.name

    @property
    def stored_schema(self) -> pa.Schema:
        """The schema as it is written: without descriptions, so that a reworded description changes no checksum."""
        return pa.schema([field.remove_metadata() for field in self.schema], metadata=self.schema.metadata)


def column(name: str, type_: pa.DataType, about: str, nullable: bool = False) -> pa.Field:
    """An Arrow field with its description in the metadata key `about`."""
    return pa.field(name, type_, nullable=nullable, metadata={"about": about})


def columns(*fields: pa.Field) -> pa.Schema:
    """An Arrow schema with SCHEMA_VERSION in the metadata key `ogls_schema_version`."""
    return pa.schema(fields, metadata={"ogls_schema_version": str(SCHEMA_VERSION)})


def to_arrow(table: Table, rows: list[dict[str, Any]]) -> pa.Table:
    """Convert rows to an Arrow table with the schema of `table`. Raises DataError if the rows do not fit the schema."""
    expected, given = set(table.schema.names), set(rows[0]) if rows else set()
    if rows and expected != given:
        raise DataError(f"{table.name}: missing {sorted(expected - given)}, unknown {sorted(given - expected)}")
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


def upgrade_schema(table: Table, arrow: pa.Table, names: Sequence[str] | None = None) -> pa.Table:
    """Return the columns `names` (None: all) with the types of this release, from a file of this or an older release.

    Raises StoreError if a required column is missing, or if a newer release wrote the file.
    """
    fields = [table.schema.field(name) for name in names or table.schema.names]
    present = set(arrow.schema.names)
    if missing := [f.name for f in fields if f.name not in present and not f.nullable]:
        raise StoreError(f"{table.name}: the file lacks the columns {', '.join(missing)}, so it is not this table")
    written = int((arrow.schema.metadata or {}).get(b"ogls_schema_version", 0))
    if written > SCHEMA_VERSION:
        raise StoreError(
            f"{table.name}: the file has schema version {written}; this release reads versions up to {SCHEMA_VERSION}: "
            "install a newer ogls-sd"
        )
    arrays = [arrow[f.name] if f.name in present else pa.nulls(len(arrow), f.type) for f in fields]
    return pa.table(arrays, schema=pa.schema(fields, metadata=table.schema.metadata))
