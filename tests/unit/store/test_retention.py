"""Old teacher states may go; what was computed stays, stays done, and says what happened where they are missed."""

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


def size(run: Run) -> int:
    return sum(p.stat().st_size for p in Path(run.records.url("teacher_states")).rglob("*.parquet"))


def test_all_but_the_newest_trained_rounds_may_go(copy: Run) -> None:
    assert list_droppable(copy.records, 2) == []
    (found,) = list_droppable(copy.records, 1)
    assert (found.run, found.round, found.files) == ("tiny", 1, 2)
    before = size(copy)
    drop_states(copy.records, 1)
    assert before - size(copy) == found.bytes > 0
    assert list_droppable(copy.records, 1) == []
    with pytest.raises(ValueError, match="at least 1"):
        list_droppable(copy.records, 0)


def test_an_untrained_round_keeps_its_states(copy: Run) -> None:
    shutil.rmtree(copy.records.url("updates/round=002"))
    assert list_droppable(copy.records, 1) == []


def test_dropped_states_leave_everything_done(copy: Run) -> None:
    drop_states(copy.records, 1)
    assert all(STAGES[name](Run(copy.config), r).reused for r in (1, 2) for name in ROUND)
    counted = run_query(copy.store, "SELECT round, count(*) AS n FROM teacher_states GROUP BY round").to_pylist()
    assert [r["round"] for r in counted] == [2]


def test_what_needs_dropped_states_says_so(copy: Run) -> None:
    drop_states(copy.records, 1)
    shutil.rmtree(copy.records.url("targets/round=001"))
    with pytest.raises(StoreError, match=r"teacher_states were dropped to save space on 20.*have them made again"):
        STAGES["steer"](copy, 1)
    shutil.rmtree(copy.records.url("teacher_states/round=001"))
    assert not STAGES["teach"](copy, 1).reused
    assert STAGES["steer"](copy, 1).rows > 0
    assert STAGES["train"](copy, 1).reused  # the same bits came back


def test_a_crash_between_the_mark_and_the_files_is_mended_by_the_next_drop(
    copy: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: str) -> None:
        raise KeyboardInterrupt(path)

    monkeypatch.setattr(copy.records.storage, "remove", killed)
    with pytest.raises(KeyboardInterrupt):
        drop_states(copy.records, 1)
    monkeypatch.undo()
    assert STAGES["teach"](copy, 1).reused
    (left,) = list_droppable(copy.records, 1)
    drop_states(copy.records, left.round)
    assert list_droppable(copy.records, 1) == []


def test_gc_shows_asks_and_drops(copy: Run, tmp_path: Path) -> None:
    command = ["gc", "--root", str(tmp_path)]
    refused = CliRunner().invoke(app, command, input="n\n")
    assert refused.exit_code == 1
    assert "Drop the teacher states of 1 rounds" in refused.output
    assert list_droppable(copy.records, 1)
    done = CliRunner().invoke(app, [*command, "--yes"])
    assert done.exit_code == 0
    assert not list_droppable(copy.records, 1)
    assert "nothing to drop" in CliRunner().invoke(app, command).output
