"""Wrong command lines: one clear error, another exit code than 0, no traceback, nothing written."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from conftest import TINY, small_config

from flows import cli
from flows.console import show_table
from ogls.stages.run import Run

RUN = ["tiny", "--root", "ROOT"]


def run_command(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Run a command in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["ogls", *arguments])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["config", str(TINY), "--set", "steer.strength=nan"], "steer.strength: Input should be a finite number"),
        (["config", str(TINY), "--set", "train.learning_rate=inf"], "train.learning_rate: Input should be a finite"),
        (["config", str(TINY), "--set", "steer.recipe=custom", "--set", "steer.weights={base=nan}"], "a finite number"),
        (["config", str(TINY), "--set", "root="], "root: String should have at least 1 character"),
        (["config", str(TINY), "--set", "rounds"], "write section.key=value"),
        (["config", str(TINY), "--set", "seed.x=1"], "seed: Input should be a valid integer"),
        (["config", "."], "Is a directory"),
        (["plan", str(TINY), "--length", "-5"], "--length"),
        (["plan", str(TINY), "--gpu", "abacus"], "unknown machine abacus"),
        (["stage", "sample", str(TINY), "--round", "0"], "--round 0: sample runs in rounds 1 and later"),
        (["stage", "train", str(TINY), "--round", "-1"], "--round"),
        (["evaluate", str(TINY), "--round", "-1"], "--round"),
        (["view", *RUN, "--sample", "3"], "--sample needs --problem"),
        (["view", *RUN, "--most", "0"], "--most"),
        (["view", *RUN, "--show", "wonders"], "unknown --show wonders"),
        (["view", *RUN, "--round", "77", "--no-policy"], "77"),
        (["view", *RUN, "--problem", "nobody", "--no-policy"], "nobody"),
        (["view", "nobody", "--root", "ROOT"], "no run nobody in"),
        (["sweep", *RUN, "--strength", "nan"], "--strength must be a finite number"),
        (["sweep", *RUN, "--round", "77"], "round 77"),
        (["query", "", "--root", "ROOT"], "expected one SELECT statement, got an empty text"),
        (["query", "SELECT", "--root", "ROOT"], "the query failed"),
        (["query", "SELECT 1", "--root", "ROOT", "--out", "FOLDER"], "cannot write"),
        (["query", "SELECT 1", "--root", "ROOT", "--format", "parquet", "--out", "FOLDER"], "cannot write"),
        (["query", "SELECT 1", "--root", "ROOT", "--format", "json", "--out", "/proc/x/y.json"], "cannot write"),
        (["query", "SELECT * FROM wonders", "--root", "ROOT"], "the tables are stages, problems"),
        (["query", "SELECT 1", "--root", "ROOT", "--export-db", "x.db"], "--export-db takes no query"),
        (["export", *RUN, "FOLDER"], "already exists"),
        (["export", *RUN, "new-folder", "--round", "77"], "has not trained round 77"),
        (["report", "nobody", "--root", "ROOT"], "no run nobody in"),
        (["dataset", "x.jsonl", "--root", "ROOT", "--kind", "poems"], "unknown kind poems"),
        (["dataset", "x.jsonl", "--root", "ROOT", "--where", "wonders > 3"], "the query failed"),
        (["dataset", "x.jsonl", "--root", "ROOT", "--where", "false"], "no rows"),
        (["gc", "--root", "ROOT", "--run", "nobody"], "no run nobody in"),
        (["gc", "--root", "ROOT", "--keep", "0"], "--keep"),
        (["check", "nobody", "--root", "ROOT"], "no run nobody in"),
        (["rm", "nobody", "--root", "ROOT"], "no run nobody in"),
        (["compare", "nothing.toml"], "no study nothing.toml"),
        (["seed-model", "new-folder", "--terse", "2"], "terse"),
        *(
            (([command, *rest, "--root", root]), message)
            for command, rest in (
                ("query", ["SELECT 1"]),
                ("runs", []),
                ("gc", []),
                ("dataset", ["x.jsonl"]),
                ("check", ["tiny"]),
                ("rm", ["tiny"]),
                ("report", ["tiny"]),
                ("view", ["tiny"]),
                ("export", ["tiny", "y"]),
                ("sweep", ["tiny"]),
            )
            for root, message in (
                ("/nowhere/runs", "/nowhere/runs"),
                ("gopher://hole/runs", "gopher:// is not supported"),
                ("", "root is empty"),
            )
        ),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_a_wrong_command_line_gives_one_clear_error(
    arguments: list[str],
    message: str,
    finished: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"ROOT": finished.records.storage.path, "FOLDER": str(tmp_path)}
    (tmp_path / "full").touch()
    before = sorted(tmp_path.rglob("*"))
    code = run_command([places.get(a, a) for a in arguments], monkeypatch)
    printed = capsys.readouterr()
    errors = " ".join(printed.err.split())
    assert code in (1, 2), printed
    assert message in errors
    assert "Traceback" not in errors
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path("x.jsonl").exists()
    assert not Path("new-folder").exists()


@pytest.mark.parametrize("most", [1, 2, 7])
def test_view_shows_at_most_the_number_that_was_asked_for(
    most: int, finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = ["--out", str(tmp_path / "page.html")]
    root = ["--root", finished.records.storage.path]
    assert run_command(["view", "tiny", *root, *page, "--most", str(most), "--no-policy"], monkeypatch) == 0
    assert int(capsys.readouterr().out.split()[0]) <= most


TABLE = pa.table(
    {
        "number": [1.5, float("nan"), float("inf")],
        "time": pa.array([0, 1, 2], pa.timestamp("us")),
        "struct": [{"a": [1]}, {"a": []}, None],
        "list": [[1], [], None],
        "bytes": pa.array([b"\x01", None, b""], pa.binary()),
        "date": pa.array([0, 1, None], pa.date32()),
        "duration": pa.array([1, None, 2], pa.duration("s")),
        "text": ["=1+1", None, "x"],
        "nothing": pa.nulls(3),
    }
)


def test_every_type_has_a_form_in_json_and_csv(capsys: pytest.CaptureFixture[str]) -> None:
    show_table(TABLE, "json", None)
    rows = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"bare {name}"))
    assert [row["number"] for row in rows] == [1.5, None, None]
    assert rows[1]["time"] == "1970-01-01T00:00:00.000001"
    assert (rows[0]["struct"], rows[0]["bytes"], rows[1]["date"]) == ({"a": [1]}, "01", "1970-01-02")
    show_table(TABLE, "csv", None)
    first, *_ = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert (first["struct"], first["list"], first["text"]) == ('{"a": [1]}', "[1]", "'=1+1")


@pytest.mark.parametrize("format_", ["json", "csv", "table", "parquet"])
def test_equal_column_names_are_kept_apart(tmp_path: Path, format_: str) -> None:
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2]), pa.array([3])], names=["a", "a", "a_1"])
    path = tmp_path / "new" / "file"
    show_table(table, format_, path)  # the folder is created
    if format_ == "json":
        assert json.loads(path.read_text()) == [{"a": 1, "a_1": 2, "a_1_1": 3}]
    elif format_ == "csv":
        assert path.read_text().splitlines()[0] == '"a","a_1","a_1_1"'


def test_rm_says_what_is_lost_and_asks(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    shutil.copytree(finished.records.storage.path, tmp_path, dirs_exist_ok=True)
    run = Run(small_config(tmp_path))
    command = ["rm", "tiny", "--root", str(tmp_path)]
    with run.records.lock("train"):
        assert run_command([*command, "--yes"], monkeypatch) == 2
    assert "is held by process" in capsys.readouterr().err
    monkeypatch.setattr("typer.confirm", lambda text: False)
    assert run_command(command, monkeypatch) == 1
    assert "2 trained rounds" in capsys.readouterr().out
    assert run.records.read_info()
    assert run_command([*command, "--yes"], monkeypatch) == 0
    assert not (tmp_path / "tiny").exists()
