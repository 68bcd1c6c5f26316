"""Questions to the store, in SQL: a DuckDB view a table over finished stages, read-only and locked in.

Views name the files that manifests vouch for, so a torn or half-written shard is never read. Every table has
`run` and `round` besides its own columns; the view `stages` has a row for every finished stage.
"""

from __future__ import annotations

import json
from importlib.resources import files
from typing import TYPE_CHECKING

import pyarrow as pa

from ogls.errors import StoreError, UserError
from ogls.manifest import Manifest
from ogls.records import ALL_TABLES, Table
from ogls.store import RunStore, Store

if TYPE_CHECKING:
    import duckdb

STAGES_ABOUT = "One row a finished stage: seconds it took, rows it wrote, its metrics as JSON."
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


def named_queries() -> dict[str, str]:
    """Name to SQL of the shipped queries; the first line of each is a comment that says what it answers."""
    folder = files("ogls") / "sql"
    return {
        f.name[:-4]: f.read_text() for f in sorted(folder.iterdir(), key=lambda f: f.name) if f.name.endswith(".sql")
    }


def connect(store: Store, run: str | None = None) -> duckdb.DuckDBPyConnection:
    """A connection with a view a table, over all runs or one, that can read the store and nothing else."""
    import duckdb

    runs = store.runs()
    if run is not None:
        names = [r.name for r in runs]
        runs = [r for r in runs if r.name == run]
        if not runs:
            raise StoreError(f"no run {run} in {store.root}; there are: {', '.join(names) or 'none'}")
    con = duckdb.connect(":memory:")
    if not store.local:
        con.register_filesystem(store.fs)
    manifests = {(r.name, t.name): _manifests(r, t) for r in runs for t in ALL_TABLES if not t.owner}
    for table in ALL_TABLES:
        parts = [_part(r, table, manifests[r.name, table.manifest_table]) for r in runs]
        con.execute(
            f"CREATE VIEW {table.name} AS {' UNION ALL BY NAME '.join(p for p in [_nothing(table), *parts] if p)}"
        )
    finished = pa.Table.from_pylist(
        [_stage_row(name, m) for (name, _), found in manifests.items() for m in found], schema=_STAGES
    )
    con.register("finished", finished)
    con.execute("CREATE TABLE stages AS SELECT * FROM finished ORDER BY written")
    con.unregister("finished")
    root = store.path if store.local else store.fs.unstrip_protocol(store.path)
    con.execute(f"SET allowed_directories=[{_quoted(root)}]")
    con.execute("SET enable_external_access=false")
    con.execute("SET lock_configuration=true")
    return con


def query(store: Store, sql: str, run: str | None = None) -> pa.Table:
    """The answer to one SELECT. Raises UserError for anything else, and for what DuckDB refuses."""
    import duckdb

    con = connect(store, run)
    try:
        statements = con.extract_statements(sql)
        kinds = [s.type.name for s in statements]
        if kinds != ["SELECT"]:
            raise UserError(f"one SELECT, please: this is {', '.join(kinds) or 'empty'}")
        return con.sql(statements[0].query).to_arrow_table()
    except duckdb.Error as error:
        raise UserError(f"the query failed: {str(error).strip()}") from None
    finally:
        con.close()


def _manifests(run: RunStore, table: Table) -> list[Manifest]:
    found = (run.manifest(table.name, n) for n in run.rounds(table.name))
    return [m for m in found if m]


def _part(run: RunStore, table: Table, manifests: list[Manifest]) -> str:
    """One run's share of a view; the run's name is a constant, so DuckDB skips runs that are not asked for."""
    paths = [_quoted(run.url(f.path)) for m in manifests if not m.dropped for f in m.of(table.name)]
    if not paths:
        return ""
    return (
        f"SELECT {_quoted(run.name)} AS run, * FROM read_parquet([{', '.join(paths)}], "
        "hive_partitioning=true, hive_types={'round': INTEGER}, union_by_name=true)"
    )


def _nothing(table: Table) -> str:
    """An empty select with the table's columns, so that a view exists before its first row does."""
    types = {pa.string(): "VARCHAR", pa.int32(): "INTEGER", pa.int64(): "BIGINT", pa.bool_(): "BOOLEAN"}
    types |= {pa.float32(): "FLOAT", pa.float64(): "DOUBLE", pa.large_binary(): "BLOB"}
    types |= {pa.list_(pa.int32()): "INTEGER[]", pa.list_(pa.float32()): "FLOAT[]"}
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


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
