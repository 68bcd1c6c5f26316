"""This release reads, queries and continues a run that an older release wrote."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from conftest import REPO, ROUND

from ogls.errors import StoreError
from ogls.records import ALL_TABLES, TABLES
from ogls.records.schema import SCHEMA_VERSION, upgrade_schema
from ogls.stages.registry import STAGES
from ogls.stages.rounds import read_round
from ogls.stages.run import Run, open_run
from ogls.store import Store, named_queries, run_query

OLD = REPO / "tests" / "golden" / "store-v2"  # written by ogls-sd 0.1.0, in schema version 2


@pytest.fixture
def old(tmp_path: Path) -> Run:
    shutil.copytree(OLD, tmp_path / "store")
    return open_run(str(tmp_path / "store"), "old")


def test_every_table_is_read_with_the_columns_of_this_release(old: Run) -> None:
    for table in ALL_TABLES:
        for round_ in old.records.rounds(table.name):
            manifest = old.records.manifest(table.name, round_)
            assert manifest
            assert manifest.schema_version == 2
            if manifest.files_of(table.name):
                assert old.records.read(table.name, round_).schema.equals(table.schema)
    targets = old.records.read("targets", 1, ["kl", "base_entropy"])
    assert targets["base_entropy"].null_count == len(targets) > 0
    assert targets["kl"].null_count == 0


def test_updates_without_metrics_are_read_and_queried() -> None:
    half = REPO / "tests" / "golden" / "store-0.2.0"  # in schema version 3
    run = open_run(str(half), "half")
    updates = run.records.read("updates", 1)
    assert updates["metrics"].null_count == len(updates) > 0
    rows = run_query(run.store, "SELECT metrics['agreement'] AS agreement FROM updates").to_pylist()
    assert {row["agreement"] for row in rows} == {None}
    assert read_round(run.records, 1).loss_metrics == {}


@pytest.mark.parametrize("name", named_queries())
def test_named_queries_answer(name: str) -> None:
    answer = run_query(Store(str(OLD)), named_queries()[name])
    # failed_then_fixed: no problem of this run was failed first and solved later
    assert answer.num_rows > 0 or name == "failed_then_fixed"


def test_missing_tables_are_computed_from_existing_ones(old: Run) -> None:
    rows = run_query(old.store, "SELECT * FROM steered WHERE round = 2 ORDER BY problem_id, sample").to_pylist()
    targets = old.records.read("targets", 2).to_pylist()
    keys = sorted({(t["problem_id"], t["sample"]) for t in targets})
    assert [(r["problem_id"], r["sample"]) for r in rows] == keys
    for row, key in zip(rows, keys, strict=True):
        rollout_targets = [t for t in targets if (t["problem_id"], t["sample"]) == key]
        largest = max(rollout_targets, key=lambda t: t["kl"])
        assert row["tokens"] == len(rollout_targets)
        assert row["kl"] == pytest.approx(sum(t["kl"] for t in rollout_targets) / len(rollout_targets), rel=1e-5)
        assert (row["kl_max"], row["kl_max_position"]) == (largest["kl"], largest["position"])
        gains = [t["token_target_logprob"] - t["token_base_logprob"] for t in rollout_targets]
        assert row["gain"] == pytest.approx(sum(gains) / len(rollout_targets), rel=1e-4, abs=1e-7)
        assert row["base_entropy"] is row["stop_base"] is None


def test_finished_stages_are_reused(old: Run) -> None:
    assert old.records.open(old.config)  # the notice that another version ran it last
    for name, round_ in [("prepare", 0), ("evaluate", 0), *((n, r) for r in (1, 2) for n in ROUND)]:
        result = STAGES[name](Run(old.config), round_)
        assert (name, result.reused, result.redone) == (name, True, "")


def test_the_run_continues_in_this_release(old: Run) -> None:
    for name in ("sample", "verify", "teach", "steer"):
        STAGES[name](old, 3)
    rows = run_query(old.store, "SELECT round, count(base_entropy) > 0 AS new FROM targets GROUP BY 1 ORDER BY 1")
    assert rows.to_pylist() == [{"round": r, "new": r == 3} for r in (1, 2, 3)]


def test_a_newer_schema_is_refused() -> None:
    table = TABLES["verdicts"]
    newer = table.schema.with_metadata({"ogls_schema_version": str(SCHEMA_VERSION + 1)}).empty_table()
    with pytest.raises(StoreError, match="install a newer ogls-sd"):
        upgrade_schema(table, newer)
    with pytest.raises(StoreError, match="the file lacks the columns outcome, so it is not this table"):
        upgrade_schema(table, pa.table({"problem_id": ["p"], "sample": [0], "verdict": ["correct"]}))
