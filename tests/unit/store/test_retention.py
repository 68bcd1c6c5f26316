"""Old teacher states can be deleted: their stages stay done, and an error explains when the states are needed again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conftest import ROUND, content, small_config
from history import counted, make_history
from typer.testing import CliRunner

from flows.cli import app
from ogls.errors import StoreError
from ogls.stages.check import find_damage
from ogls.stages.registry import STAGES
from ogls.stages.resume import needed_optimizers
from ogls.stages.run import Run
from ogls.store import run_query
from ogls.store.retention import drop_files, drop_old_files, list_droppable


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
    drop_files(copy.records, 1)
    assert before - states_size(copy) == droppable.bytes > 0
    assert list_droppable(copy.records, 1) == []
    with pytest.raises(ValueError, match="at least 1"):
        list_droppable(copy.records, 0)


def test_an_untrained_round_keeps_its_states(copy: Run) -> None:
    shutil.rmtree(copy.records.url("updates/round=002"))
    assert list_droppable(copy.records, 1) == []


def test_stages_stay_done_when_states_are_dropped(copy: Run) -> None:
    drop_files(copy.records, 1)
    assert all(STAGES[name](Run(copy.config), r).reused for r in (1, 2) for name in ROUND)
    counts = run_query(copy.store, "SELECT round, count(*) AS n FROM teacher_states GROUP BY round").to_pylist()
    assert [r["round"] for r in counts] == [2]


def test_a_stage_that_needs_dropped_states_raises(copy: Run) -> None:
    drop_files(copy.records, 1)
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
        drop_files(copy.records, 1)
    monkeypatch.undo()
    assert STAGES["teach"](copy, 1).reused
    (remaining,) = list_droppable(copy.records, 1)
    drop_files(copy.records, remaining.round)
    assert list_droppable(copy.records, 1) == []


def optimizers(run: Run) -> list[int]:
    return sorted(int(p.parent.name[-3:]) for p in Path(run.records.url("policy")).rglob("optimizer.safetensors"))


def set_best(run: Run, round_: int, best: int) -> None:
    path = f"{run.records.folder('health', round_)}/manifest.json"
    manifest = run.records.read_json(path) or {}
    run.records.write_json(path, {**manifest, "metrics": {**manifest["metrics"], "best": best}})


def test_optimizers_that_a_training_may_load_are_kept(finished: Run, tmp_path: Path) -> None:
    """Those of the newest rounds, of the start of the next round, and of every round that a rollback may return to."""
    run = make_history(finished, str(tmp_path), 9, summary=False)
    for round_ in range(1, 10):
        set_best(run, round_, 2 if round_ < 8 else 3 if round_ == 8 else 7)
    assert needed_optimizers(run) == {3, 7, 8, 9}  # 3 was the best when round 9 was decided
    before = content(run)
    dropped = drop_old_files(run.records, 1, "optimizers", needed_optimizers(run))
    assert [d.round for d in dropped] == [1, 2, 4, 5, 6]
    assert optimizers(run) == [3, 7, 8, 9]
    assert content(run) == before  # the manifests list what they listed
    assert not find_damage(run)
    set_best(run, 8, 7)
    assert [d.round for d in drop_old_files(run.records, 1, "optimizers", needed_optimizers(run))] == [3]
    with pytest.raises(StoreError, match=r"round 3: the optimizer state was deleted on 20.*adapter\.start"):
        run.read_attachment(3, "optimizer.safetensors")
    assert run.load_adapter(3)


def test_a_run_goes_on_to_the_same_bits_after_its_old_optimizers_were_dropped(copy: Run, tmp_path: Path) -> None:
    """Also where the newest round is redone: its start is kept."""
    assert drop_old_files(copy.records, 1, "optimizers", needed_optimizers(copy)) == []
    expected = content(copy)["updates 2"]
    (tmp_path / "tiny" / "policy/round=002/optimizer.safetensors").unlink()
    assert not STAGES["train"](copy, 2).reused
    assert content(copy)["updates 2"] == expected


def test_dropping_costs_the_same_in_a_long_run(finished: Run, tmp_path: Path) -> None:
    costs = []
    for rounds in (10, 60):
        run = make_history(finished, str(tmp_path / str(rounds)), rounds)
        drop_old_files(run.records, 2, "states")
        run = make_history(run, str(tmp_path / f"{rounds}-on"), rounds + 1)
        with counted() as cost:
            assert [d.round for d in drop_old_files(run.records, 2, "states")] == [rounds - 1]
        costs.append(cost.requests)
    assert costs[0] == costs[1]


def test_gc_deletes_optimizers_on_request(copy: Run, tmp_path: Path) -> None:
    drop_files(copy.records, 1)
    make_history(copy, str(tmp_path / "long"), 6)
    result = CliRunner().invoke(app, ["gc", "--root", str(tmp_path / "long"), "--optimizers", "2"], input="y\n")
    best = copy.records.newest_manifest("health").metrics["best"]
    kept = sorted({best, 5, 6} - {0})
    assert "the teacher states of 4 rounds and the optimizer states of" in result.output
    assert optimizers(Run(small_config(tmp_path / "long"))) == kept


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
