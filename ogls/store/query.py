"""SQL over the store: one DuckDB view per table, over finished stages.

Queries are read-only and cannot access other files. A view lists the files that manifests list, so an incomplete shard
is never read. Every view has the columns of its table and the columns `run` and `round`; the table `stages` has one row
per finished stage. Only the views that a statement names are created, because reading manifests and opening files
dominates the cost of a query on a large store.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Collection, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from ogls.errors import StoreError, UserError
from ogls.records import TABLES
from ogls.records.schema import Table
from ogls.store.atomic import atomic_write
from ogls.store.manifest import Manifest
from ogls.store.run_store import RunStore
from ogls.store.store import Store

if TYPE_CHECKING:
    import duckdb


STAGES_ABOUT = "One row per finished stage: its duration in seconds, the number of rows it wrote, its metrics as JSON."
_STAGES = pa.schema(
    [
        ("run", pa.string()),
        ("round", pa.int32()),
        ("stage", pa.string()),
        ("seconds", pa.float64()),
        ("rows", pa.int64()),
        ("written", pa.string()),
        ("metrics", pa.string()),
    ]
)


STAGES_COLUMNS = tuple(_STAGES.names)
_MEMORY = "4GiB"  # memory limit of a query; DuckDB spills larger intermediate results to the temporary folder
_ALL = ("stages", *TABLES)


def named_queries() -> dict[str, str]:
    """The shipped queries: SQL by name. The first line of each is a comment that describes the result."""
    folder = files("ogls.store") / "sql"
    return {
        f.name[:-4]: f.read_text() for f in sorted(folder.iterdir(), key=lambda f: f.name) if f.name.endswith(".sql")
    }


def run_query(store: Store, sql: str, run: str | None = None, last: int | None = None) -> pa.Table:
    """The result of one SELECT over all runs, or over `run`, as an Arrow table; with `last`, up to round `last`.

    `.to_pandas()` and `polars.from_arrow()` convert it to a data frame. The query can read only the store and
    cannot write. Raises UserError if `sql` is not one SELECT statement, or if DuckDB raises an error.
    """
    import duckdb

    # A query can read the folder that DuckDB spills to, so that folder must be otherwise empty.
    with tempfile.TemporaryDirectory(prefix="ogls-duckdb-") as spill:
        con = duckdb.connect(":memory:", config={"memory_limit": _MEMORY, "temp_directory": spill})
        return _run_restricted(con, store, sql, run, last)


def _run_restricted(
    con: duckdb.DuckDBPyConnection, store: Store, sql: str, run: str | None, last: int | None
) -> pa.Table:
    import duckdb

    try:
        statements = con.extract_statements(sql)
        types = [s.type.name for s in statements]
        if types != ["SELECT"]:
            raise UserError(f"expected one SELECT statement, got {', '.join(types) or 'an empty text'}")
        define_views(con, store, run, _names_in(sql), last)
        _restrict_access(con, store)
        return con.sql(statements[0].query).to_arrow_table()
    except duckdb.Error as error:
        advice = f"\nthe tables are {', '.join(_ALL)} (ogls tables)" if "Table with name" in str(error) else ""
        raise UserError(f"the query failed: {str(error).strip()}{advice}") from None
    finally:
        con.close()


def _names_in(sql: str) -> Collection[str]:
    """The words of a statement, which include the tables that it names; all tables if it reads the catalog."""
    words = set(re.findall(r"\w+", sql.lower()))
    return _ALL if any(w.startswith(("information_schema", "duckdb_", "pg_", "sqlite_")) for w in words) else words


def export_database(store: Store, path: Path, run: str | None = None) -> None:
    """Write a DuckDB file for any client: one view per table, `stages`, and every named query in the schema `named`.

    The views read the files of the store in place; export again to include later rounds. An existing file is replaced
    atomically. Raises UserError if the store is not a directory (a client would need credentials).
    """
    import duckdb

    if not store.storage.local:
        raise UserError(f"--export-db needs a store in a directory, not {store.root}: copy the run, or use ogls query")
    with atomic_write(path, replace=True, errors=(duckdb.Error, OSError)) as file, duckdb.connect(str(file)) as con:
        define_views(con, store, run)
        con.execute("CREATE SCHEMA named")
        for name, sql in named_queries().items():
            con.execute(f"CREATE VIEW named.{name} AS {sql}")


def define_views(
    con: duckdb.DuckDBPyConnection,
    store: Store,
    run: str | None = None,
    names: Collection[str] = _ALL,
    last: int | None = None,
) -> None:
    """Create the views `names` in a connection; with `last`, they end with round `last`.

    Raises StoreError, listing the existing runs, if `run` does not exist.
    """
    runs = store.runs()
    if run is not None:
        existing = ", ".join(r.name for r in runs) or "none"
        runs = [r for r in runs if r.name == run]
        if not runs:
            raise StoreError(f"no run {run} in {store.root}; existing runs: {existing}")
    if not store.storage.local:
        con.register_filesystem(store.storage.file_system())

    def finished(run: RunStore, table: str) -> list[Manifest]:
        return [m for m in run.manifests(table) if last is None or m.round <= last]

    for table in (t for n, t in TABLES.items() if n in names):
        parts = [p for r in runs for p in _selects(r, table, finished(r, table.name))]
        con.execute(f"CREATE VIEW {table.name} AS {' UNION ALL BY NAME '.join([_empty_select(table), *parts])}")
    if "stages" in names:
        found = [(r.name, m) for r in runs for t in TABLES.values() if not t.owner for m in finished(r, t.name)]
        con.register("finished", pa.Table.from_pylist([_stage_row(*pair) for pair in found], schema=_STAGES))
        con.execute("CREATE TABLE stages AS SELECT * FROM finished ORDER BY written")
        con.unregister("finished")


def _restrict_access(con: duckdb.DuckDBPyConnection, store: Store) -> None:
    con.execute(f"SET allowed_directories=[{quote(store.storage.url)}]")
    con.execute("SET enable_external_access=false")
    con.execute("SET lock_configuration=true")


def _selects(run: RunStore, table: Table, manifests: Sequence[Manifest]) -> list[str]:
    """SELECT statements for the rows of one run. The name of the run is a constant, so DuckDB skips other runs.

    Files of one schema version have the same columns, so DuckDB reads the schema of one file only.
    """
    parts = []
    for version in sorted({m.schema_version for m in manifests}):
        same_version = [m for m in manifests if m.schema_version == version]
        if paths := [run.url(f.path) for m in same_version for f in m.files_of(table.name)]:
            parts.append(_select(run.name, paths))
        elif table.owner and (older := files("ogls.store") / "sql" / "older" / f"{table.name}.sql").is_file():
            source = [run.url(f.path) for m in same_version for f in m.files_of(table.owner)]
            if source:
                parts.append(f"({older.read_text().replace('{' + table.owner + '}', _select(run.name, source))})")
    return parts


def _select(run: str, paths: Sequence[str]) -> str:
    listed = ", ".join(quote(p) for p in paths)
    return (
        f"SELECT {quote(run)} AS run, * FROM read_parquet([{listed}], "
        "hive_partitioning=true, hive_types={'round': INTEGER})"
    )


def _empty_select(table: Table) -> str:
    """A SELECT with the columns of the table and no rows, so that the view exists before its first row is written."""
    types = {pa.string(): "VARCHAR", pa.int32(): "INTEGER", pa.int64(): "BIGINT", pa.bool_(): "BOOLEAN"}
    types |= {pa.float32(): "FLOAT", pa.float64(): "DOUBLE", pa.large_binary(): "BLOB"}
    types |= {pa.list_(pa.int32()): "INTEGER[]", pa.list_(pa.float32()): "FLOAT[]"}
    types |= {pa.map_(pa.string(), pa.float64()): "MAP(VARCHAR, DOUBLE)"}
    columns = ", ".join(f"NULL::{types[f.type]} AS {f.name}" for f in table.schema)
    return f"SELECT NULL::VARCHAR AS run, NULL::INTEGER AS round, {columns} WHERE false"


def _stage_row(run: str, manifest: Manifest) -> dict[str, object]:
    return {
        "run": run,
        "round": manifest.round,
        "stage": manifest.stage,
        "seconds": manifest.metrics.get("seconds"),
        "rows": manifest.rows,
        "written": manifest.written,
        "metrics": json.dumps(manifest.metrics),
    }


def quote(text: str) -> str:
    """Quote a string as an SQL literal."""
    return "'" + text.replace("'", "''") + "'"
