"""Queries: every named query works, over one run or all runs; a query can only read the store."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

import pytest
from conftest import UNGRADED, small_config

from ogls.errors import StoreError, UserError
from ogls.evaluation.metrics import pass_at_k
from ogls.records import ALL_TABLES, VERDICTS
from ogls.records.schema import to_arrow
from ogls.stages.run import Run
from ogls.store import Store, export_database, named_queries, run_query
from ogls.store.writer import StageWriter


@pytest.fixture(scope="module")
def store(finished: Run) -> Store:
    return finished.store


@pytest.mark.parametrize("name", named_queries())
def test_named_queries_return_rows(store: Store, name: str) -> None:
    assert run_query(store, named_queries()[name]).num_rows > 0


@pytest.mark.parametrize("name", named_queries())
def test_named_queries_work_on_an_empty_store(tmp_path: Path, name: str) -> None:
    assert run_query(Store(str(tmp_path)), named_queries()[name]).num_rows == 0


def test_the_rounds_query_equals_the_summaries(store: Store, finished: Run) -> None:
    table = run_query(store, named_queries()["rounds"])
    assert table.schema.names == [
        *("run", "round", "accuracy", "accuracy_low", "accuracy_high"),
        *("greedy_accuracy", "mean_length", "truncated", "mixed_groups"),
    ]
    rows = table.to_pylist()
    assert [(r["run"], r["round"]) for r in rows] == [("tiny", 0), ("tiny", 1), ("tiny", 2)]
    for r in rows:
        summary = finished.records.read("summaries", r["round"]).to_pylist()[0]
        assert r["accuracy"] == summary["accuracy"]
    verdicts = finished.records.manifest("verdicts", 1)
    assert [r["mixed_groups"] for r in rows][:2] == [None, verdicts.metrics["mixed_groups"]]


def test_pass_at_k_in_sql_equals_pass_at_k(store: Store, finished: Run) -> None:
    rows = [r for r in finished.records.read("scores", 2).to_pylist() if not r["greedy"]]
    by_problem: dict[str, list[bool]] = {}
    for r in rows:
        by_problem.setdefault(r["problem_id"], []).append(r["verdict"] == "correct")
    rows_by_k = run_query(store, named_queries()["pass_at_k"]).to_pylist()
    for k in (1, 2):
        expected = sum(pass_at_k(2, sum(v), k) for v in by_problem.values()) / len(by_problem)
        (actual,) = [r["pass_at_k"] for r in rows_by_k if r["round"] == 2 and r["k"] == k]
        assert actual == pytest.approx(expected)


def test_every_table_has_its_columns_with_and_without_rows(store: Store, tmp_path: Path) -> None:
    for table in ALL_TABLES:
        for source in (store, Store(str(tmp_path))):
            result = run_query(source, f"SELECT * FROM {table.name} LIMIT 1")
            assert set(result.schema.names) == {"run", "round", *table.schema.names}


def test_views_contain_only_committed_rows(tmp_path: Path, finished: Run) -> None:
    store = Store(str(tmp_path))
    run = store.run("r")
    run.open(small_config(tmp_path, "name=r"))
    rows = finished.records.read("verdicts", 1)
    writer = StageWriter(run, VERDICTS, 1, "f")
    writer.write_shard(0, rows)
    (tmp_path / "r/verdicts/round=001/part-0007.parquet").write_bytes(b"torn")
    assert run_query(store, "SELECT count(*) AS n FROM verdicts")["n"][0].as_py() == 0
    writer.commit("verify", {})
    assert run_query(store, "SELECT count(*) AS n FROM verdicts")["n"][0].as_py() == len(rows)


def test_a_query_reads_all_runs_or_one(tmp_path: Path, finished: Run) -> None:
    store = Store(str(tmp_path))
    rows = finished.records.read("verdicts", 1)
    for name in ("a", "b"):
        run = store.run(name)
        run.open(small_config(tmp_path, f"name={name}"))
        writer = StageWriter(run, VERDICTS, 1, "f")
        writer.write_shard(0, rows)
        writer.commit("verify", {})
    sql = "SELECT DISTINCT run FROM verdicts ORDER BY run"
    assert run_query(store, sql)["run"].to_pylist() == ["a", "b"]
    assert run_query(store, sql, "b")["run"].to_pylist() == ["b"]
    with pytest.raises(StoreError, match=r"no run c in .*; existing runs: a, b"):
        run_query(store, sql, "c")


def test_a_store_that_is_not_a_directory_can_be_queried(finished: Run) -> None:
    store = Store(f"memory://{uuid4().hex}")
    run = store.run("r")
    run.open(small_config(store.root, "name=r"))
    writer = StageWriter(run, VERDICTS, 1, "f")
    writer.write_shard(0, finished.records.read("verdicts", 1))
    writer.commit("verify", {})
    assert run_query(store, "SELECT count(*) AS n FROM verdicts")["n"][0].as_py() == 32
    assert run_query(store, "SELECT run, round FROM verdicts LIMIT 1").to_pylist() == [{"run": "r", "round": 1}]


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM read_csv('/etc/passwd')",
        "SELECT * FROM read_text('/etc/hostname')",
        "SELECT * FROM '/etc/passwd'",
        "SELECT * FROM glob('/*')",
        "COPY (SELECT 1) TO '{root}/x.csv'",
        "CREATE TABLE x AS SELECT 1",
        "ATTACH '/tmp/x.db'",
        "INSTALL httpfs",
        "SET enable_external_access=true",
        "SELECT 1; SELECT 2",
        "DROP VIEW verdicts",
        "",
        "SELECT nonsense FROM verdicts",
    ],
)
def test_forbidden_and_invalid_queries_are_refused(store: Store, sql: str) -> None:
    with pytest.raises(UserError):
        run_query(store, sql.replace("{root}", store.storage.path))


def test_the_result_converts_to_pandas_and_polars(store: Store) -> None:
    import polars

    table = run_query(
        store, "SELECT problem_id, list(sample ORDER BY sample) AS samples FROM verdicts GROUP BY ALL", "tiny"
    )
    frame = polars.from_arrow(table)
    assert isinstance(frame, polars.DataFrame)
    assert frame["problem_id"].to_list() == table.to_pandas()["problem_id"].tolist() == table["problem_id"].to_pylist()


def test_the_exported_file_can_be_queried_by_any_client(store: Store, finished: Run, tmp_path: Path) -> None:
    import duckdb

    path = tmp_path / "views.duckdb"
    for _ in range(2):  # the second export replaces the first
        export_database(store, path)
    with duckdb.connect(str(path), read_only=True) as con:
        for table in ALL_TABLES:
            assert {"run", "round"} < {row[0] for row in con.execute(f"DESCRIBE {table.name}").fetchall()}
        expected = sum(len(finished.records.read("trajectories", r)) for r in (1, 2))
        assert con.execute("SELECT count(*) FROM trajectories").fetchall() == [(expected,)]
        for name, sql in named_queries().items():
            rows = con.execute(f"SELECT count(*) FROM named.{name}").fetchall()
            assert rows == [(run_query(store, sql).num_rows,)]
    assert [p.name for p in tmp_path.iterdir()] == ["views.duckdb"]
    with pytest.raises(UserError, match="cannot write"):
        export_database(store, path / "under-a-file" / "x.duckdb")
    with pytest.raises(UserError, match="a store in a directory"):
        export_database(Store("memory://x"), path)


def test_failed_then_fixed_finds_problems_that_are_solved_later(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    run = store.run("r")
    run.open(small_config(tmp_path, "name=r"))
    outcomes = {1: {"a": "ffcf", "b": "ffff", "c": "cccf"}, 4: {"a": "cccf", "b": "fffc", "c": "ffff"}}
    for round_, groups in outcomes.items():
        rows = [
            {
                "problem_id": name,
                "sample": sample,
                "verdict": "correct" if o == "c" else "incorrect",
                "outcome": "correct" if o == "c" else "failed",
                "answer": "1",
                **UNGRADED,
            }
            for name, group in groups.items()
            for sample, o in enumerate(group)
        ]
        writer = StageWriter(run, VERDICTS, round_, "f")
        writer.write_shard(0, to_arrow(VERDICTS, rows))
        writer.commit("verify", {})
    found = run_query(store, named_queries()["failed_then_fixed"]).to_pylist()
    assert [(r["round"], r["problem_id"], r["sample"]) for r in found] == [(1, "a", 0), (1, "a", 1), (1, "a", 3)]
    assert {(r["accuracy"], r["next_round"], r["next_accuracy"]) for r in found} == {(0.25, 4, 0.75)}
    agreement = run_query(store, named_queries()["agreement"]).to_pylist()
    assert [r["accuracy"] for r in agreement] == [4 / 12, 4 / 12]


def test_the_error_for_an_unknown_table_lists_the_tables(store: Store) -> None:
    with pytest.raises(
        UserError, match=r"trajectory does not exist[\s\S]*the tables are stages, problems, trajectories"
    ):
        run_query(store, "SELECT * FROM trajectory")


def test_a_query_leaves_no_temporary_files(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "secret.csv").write_text("a\n1\n")
    run_query(store, "SELECT count(*) FROM verdicts")
    with pytest.raises(UserError):
        run_query(store, f"SELECT * FROM read_csv('{tmp_path}/secret.csv')")
    assert [p.name for p in tmp_path.iterdir()] == ["secret.csv"]
