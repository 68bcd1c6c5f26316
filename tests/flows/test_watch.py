"""What `ogls watch` reads from the store, at the end of a run, between two stages and within one."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
from conftest import small_config
from rich.console import Console

from flows import watch as command
from ogls.analysis.watch import Snapshot, read_snapshot, sparkline
from ogls.stages.run import Run, open_run


@pytest.fixture
def copy(finished: Run, tmp_path: Path) -> Path:
    """The folder of a copy of the finished run; its root is the parent."""
    shutil.copytree(finished.records.storage.path, tmp_path, dirs_exist_ok=True)
    return tmp_path / "tiny"


def draw(snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    monkeypatch.setattr(command, "out", console)
    console.print(command.render(snapshot))
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def test_a_finished_run(finished: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = read_snapshot(finished)
    assert (snapshot.status, snapshot.holder, snapshot.round, snapshot.rounds) == ("finished", None, 2, 2)
    assert [s.name for s in snapshot.stages] == [
        *("sample", "verify", "teach", "steer", "style", "train", "evaluate", "health")
    ]
    assert all(s.done for s in snapshot.stages)
    assert (snapshot.stages[0].tokens or 0) > 0
    assert [n for n, _ in snapshot.accuracies] == [0, 1, 2]
    assert len(snapshot.rollouts) == 3
    assert all(row["verdict"] and row["problem"] and row["expected"] for row in snapshot.rollouts)
    lines = draw(snapshot, monkeypatch).splitlines()
    assert lines[0].strip() == "tiny  round 2 of 2  finished"
    assert max(map(len, lines)) <= 80
    assert "✓  sample" in lines[1]
    assert "tokens/s" in lines[1]


def test_the_stage_in_progress_has_a_time_and_what_is_stored(
    copy: Path, monkeypatch: pytest.MonkeyPatch, finished: Run
) -> None:
    """The second round is cut off within `sample`: one of its shards is stored."""
    manifest = json.loads((copy / "trajectories/round=002/manifest.json").read_text())
    for folder in copy.glob("*/round=002"):
        if folder.parent.name != "trajectories":
            shutil.rmtree(folder)
    (copy / "trajectories/round=002/manifest.json").unlink()
    partial = {"fingerprint": "f", "version": "v", "shards": {"0": manifest["files"][0]}}
    (copy / "trajectories/round=002/partial.json").write_text(json.dumps(partial))
    run = open_run(str(copy.parent), "tiny")
    assert read_snapshot(run).status == "interrupted"
    with run.records.lock("train"):
        snapshot = read_snapshot(run)
    assert snapshot.status == "running"
    assert snapshot.round == 2
    stage = snapshot.stages[0]
    assert (stage.name, stage.done, stage.rows, stage.expected) == ("sample", False, 16, 32)
    assert stage.before == pytest.approx(finished.records.manifest("trajectories", 1).metrics["seconds"])  # type: ignore[union-attr]
    assert (stage.seconds or 0) > 0
    assert {row["verdict"] for row in snapshot.rollouts} == {None}
    text = draw(snapshot, monkeypatch)
    assert "▶  sample" in text
    assert "16 of 32, " in text
    assert "not verified yet" in text


def test_a_second_snapshot_reads_only_what_is_new(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_run(str(copy.parent), "tiny")
    first = read_snapshot(run)
    read: list[str] = []
    monkeypatch.setattr(type(run.records), "read_shard", lambda *_: read.append("shard"))
    monkeypatch.setattr("ogls.analysis.watch.read_rounds", lambda *_: read.append("rounds"))
    assert read_snapshot(run, first) == first
    assert read == []


def test_a_run_before_its_first_stage_and_one_without_a_teacher(tmp_path: Path) -> None:
    config = small_config(tmp_path, "name=new", "train.objective=grpo", "evaluate.every=2", "rounds=3")
    run = Run(config)
    run.open()
    snapshot = read_snapshot(run)
    assert (snapshot.round, snapshot.accuracies, snapshot.rollouts) == (0, (), ())
    assert [s.name for s in snapshot.stages] == ["prepare", "evaluate", "health"]
    assert not any(s.done for s in snapshot.stages)


def test_control_characters_do_not_reach_the_terminal(finished: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = read_snapshot(finished)
    row = {**snapshot.rollouts[0], "text": "\x1b[2Jgone [red]not markup[/red]"}
    text = draw(Snapshot(**{**snapshot.__dict__, "rollouts": (row,)}), monkeypatch)
    assert "\\x1b[2Jgone [red]not markup[/red]" in text


def test_sparkline() -> None:
    assert sparkline([]) == ""
    assert sparkline([0.5, 0.5]) == "▄▄"
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
