"""The summary of rounds: it repeats the manifests, costs the same in a long run, and is rebuilt when it is damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPO, small_config
from history import Cost, counted, make_history

from ogls.analysis.watch import read_snapshot
from ogls.config.fingerprint import fingerprint
from ogls.stages.check import find_damage, repair
from ogls.stages.registry import STAGES
from ogls.stages.rounds import find_summary_damage, read_round, read_rounds, record_round
from ogls.stages.run import Run


@pytest.fixture(scope="module")
def long(finished: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A run of 60 rounds. Tests must leave it as it was."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPO)
        yield make_history(finished, str(tmp_path_factory.mktemp("long")), 60)


def test_the_summary_has_the_numbers_of_the_manifests(long: Run) -> None:
    with counted() as cost:
        rows = read_rounds(long.records)
    assert rows == [read_round(long.records, n) for n in range(61)]
    assert sum(path.startswith("tiny/rounds/") for path in cost.paths) == 2
    # The other reads are those of the newest round: eight manifests, and the summary of its benchmark.
    assert {path.split("/")[2] for path in cost.paths if "/round=" in path} == {"round=060"}
    assert cost.reads <= 2 + 10
    assert [row.round for row in read_rounds(long.records, 55, 48)] == list(range(48, 56))


@pytest.mark.parametrize("damage", ["missing", "torn", "changed", "of another form"])
def test_a_damaged_summary_is_read_from_the_manifests_and_rebuilt(long: Run, damage: str) -> None:
    path = Path(long.records.url("rounds/0001.json"))
    before, expected = path.read_text(), read_rounds(long.records)
    content = json.loads(before)
    content["rounds"]["55"]["kl"] = 99.0
    if damage == "of another form":
        content = json.loads(before)
        content["rounds"] = {n: {"accuracy": 1.0} for n in content["rounds"]}
    path.unlink() if damage == "missing" else path.write_text(before[:99] if damage == "torn" else json.dumps(content))
    assert read_rounds(long.records) == expected
    if damage == "missing":
        record_round(long.records, 60)
    else:  # what is there and wrong is found by the check, and rebuilt by it
        (found,) = [d for d in find_damage(long) if d.path.startswith("rounds/")]
        assert (found.path, found.problem) == ("rounds/0001.json", "cannot be read")
        assert [reason for _, reason in repair(long, [found])] == [""]
    assert json.loads(path.read_text()) == json.loads(before)


def test_a_round_that_is_evaluated_later_is_in_the_summary(finished: Run, tmp_path: Path) -> None:
    """Also by `ogls stage evaluate`, after which nothing is published."""
    shutil.copytree(finished.records.url("."), tmp_path / "tiny")
    for table in ("scores", "health"):
        shutil.rmtree(tmp_path / "tiny" / table / "round=001")
    run = Run(small_config(tmp_path))
    for round_ in (0, 1, 2):
        record_round(run.records, round_)
    assert [row.summary is None for row in read_rounds(run.records)] == [False, True, False]
    assert not STAGES["evaluate"](run, 1).reused
    assert json.loads(Path(run.records.url("rounds/0000.json")).read_text())["rounds"]["1"]["summary"]
    assert not find_summary_damage(run.records)


def recorded(finished: Run, root: Path, rounds: int) -> Cost:
    """The cost of adding the newest round to the summary of a run with so many rounds."""
    run = make_history(finished, str(root / str(rounds)), rounds)
    path = f"rounds/{rounds // 50:04d}.json"
    rows = (run.records.read_json(path) or {})["rounds"]
    del rows[str(rounds)]
    run.records.write_json(path, {"checksum": fingerprint(rows), "rounds": rows})
    with counted() as cost:
        record_round(run.records, rounds)
    assert read_rounds(run.records)[-1] == read_round(run.records, rounds)
    return cost


def test_adding_a_round_costs_the_same_in_a_long_run(finished: Run, tmp_path: Path) -> None:
    short, long = (recorded(finished, tmp_path, rounds) for rounds in (10, 60))
    assert short.requests == long.requests == (11, 1, 1)
    assert long.read_bytes < 1.1 * short.read_bytes  # round 0, which trains nothing, has less to say
    assert long.written_bytes < 1.1 * short.written_bytes


def test_watching_a_long_run_reads_its_summary(long: Run) -> None:
    with counted() as cost:
        snapshot = read_snapshot(long)
    assert [n for n, _ in snapshot.accuracies] == list(range(61))
    assert cost.reads < 60
