"""Old teacher states can be deleted: their stages stay done, and an error explains when the states are needed again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conftest import ROUND, small_config
from typer.testing import CliRunner

from flows.cli import app
from ogls.errors import StoreError
from ogls.stages.registry import STAGES
from ogls.stages.run import Run
from ogls.store import run_query
from ogls.store.retention import drop_states, list_droppable


@pytest.fixture
def copy(finished: Run, tmp_path: Path) -> Run:
    shutil.copytree(Path(finished.records.storage.path) / "tiny", tmp_path / "tiny")
    return Run(small_config(tmp_path))


def states_size(run: Run) -> int:
    return sum(p.stat().st_size for p in Path(run.records.url("teacher_states")).rglob("*.parquet"))


def test_states_of_all_but_the_newest_trained_rounds_can_be_dropped(copy: Run) -> None:
    assert list_droppable(copy.records, 2) == []
    (droppable,) = list_droppable(copy.records, 1)
    assert (droppable.run, droppable.round, droppable.files) == ("tiny", 1, 2)
    before = states_size(copy)
    drop_states(copy.records, 1)
    assert before - states_size(copy) == droppable.bytes > 0
    assert list_droppable(copy.records, 1) == []
    with pytest.raises(ValueError, match="at least 1"):
        list_droppable(copy.records, 0)


def test_an_untrained_round_keeps_its_states(copy: Run) -> None:
    shutil.rmtree(copy.records.url("updates/round=002"))
    assert list_droppable(copy.records, 1) == []


def test_stages_stay_done_when_states_are_dropped(copy: Run) -> None:
    drop_states(copy.records, 1)
    assert all(STAGES[name](Run(copy.config), r).reused for r in (1, 2) for name in ROUND)
    counts = run_query(copy.store, "SELECT round, count(*) AS n FROM teacher_states GROUP BY round").to_pylist()
    assert [r["round"] for r in counts] == [2]


def test_a_stage_that_needs_dropped_states_raises(copy: Run) -> None:
    drop_states(copy.records, 1)
    shutil.rmtree(copy.records.url("targets/round=001"))
    with pytest.raises(StoreError, match=r"teacher_states were dropped to save space on 20.*compute them again"):
        STAGES["steer"](copy, 1)
    shutil.rmtree(copy.records.url("teacher_states/round=001"))
    assert not STAGES["teach"](copy, 1).reused
    assert STAGES["steer"](copy, 1).rows > 0
    assert STAGES["train"](copy, 1).reused  # the recomputed states have the same bits


def test_the_next_drop_completes_one_that_crashed_before_the_files_were_deleted(
    copy: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(path: str) -> None:
        raise KeyboardInterrupt(path)

    monkeypatch.setattr(copy.records.storage, "remove", interrupt)
    with pytest.raises(KeyboardInterrupt):
        drop_states(copy.records, 1)
    monkeypatch.undo()
    assert STAGES["teach"](copy, 1).reused
    (remaining,) = list_droppable(copy.records, 1)
    drop_states(copy.records, remaining.round)
    assert list_droppable(copy.records, 1) == []


def test_gc_lists_asks_and_deletes(copy: Run, tmp_path: Path) -> None:
    command = ["gc", "--root", str(tmp_path)]
    refused = CliRunner().invoke(app, command, input="n\n")
    assert refused.exit_code == 1
    assert "Delete the teacher states of 1 rounds" in refused.output
    assert list_droppable(copy.records, 1)
    done = CliRunner().invoke(app, [*command, "--yes"])
    assert done.exit_code == 0
    assert not list_droppable(copy.records, 1)
    assert "nothing to delete" in CliRunner().invoke(app, command).output
