"""Commands in this process: wrong ones give one clear error; output formats; what a terminal shows."""

from __future__ import annotations

import csv
import io
import json
import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import SMALL, TINY, small_config
from rich.console import Console
from rich.table import Table

import ogls
from flows import cli
from flows.console import show_table
from ogls.analysis.rounds import HEADINGS, fitting_columns, round_cells
from ogls.stages.rounds import read_rounds
from ogls.stages.run import Run
from ogls.store import Store
from tasks.files import is_nothing_left

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
        (["import", "nothing.jsonl", "--config", str(TINY)], "cannot read problems from nothing.jsonl"),
        (["import", "x.jsonl", "--config", str(TINY), "--messages", "a", "--completion", "b"], "--messages or --comp"),
        (["import", "data/tiny/train.jsonl", "--config", str(TINY)], "has no column completion; it has id, problem"),
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


@pytest.mark.parametrize("width", [28, 80, 120, 200])
def test_the_table_of_rounds_shows_whole_columns_at_every_width(width: int, finished: Run) -> None:
    rows = read_rounds(finished.records)
    columns = fitting_columns(rows, width)
    names = [HEADINGS[i] for i in columns]
    assert names[:2] == ["round", "accuracy"]
    assert (len(columns) == len(HEADINGS)) is (width == 200)
    assert ("95% interval" in names) is (width >= 80)
    table = Table(*names)
    for row in rows:
        table.add_row(*(round_cells(row)[i] for i in columns))
    sink = io.StringIO()
    Console(file=sink, width=width).print(table)
    assert all(name in sink.getvalue() for name in names)
    assert max(map(len, sink.getvalue().splitlines())) <= width


def test_a_finished_run_that_is_asked_for_no_more_stays_untouched(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fewer rounds than it has, or as many: no server starts, and no file is written."""
    shutil.copytree(finished.records.storage.path, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tiny" / "published.json").write_text(json.dumps({"2": "all"}))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    monkeypatch.setattr("flows.cli.run_in_foreground", lambda _: pytest.fail("a flow was started"))
    for rounds in (1, 2):
        sets = [part for s in (*SMALL, f"rounds={rounds}", f"root={tmp_path}") for part in ("--set", s)]
        limit = ["--set", "evaluate.benchmarks.0.limit=8"]
        assert run_command(["train", str(TINY), *sets, *limit], monkeypatch) == 0
        printed = capsys.readouterr().out
        assert "run tiny is finished; raise rounds to continue it" in printed
        assert "accuracy" in printed
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_what_is_not_published_or_tracked_is_left_to_do(finished: Run, tmp_path: Path) -> None:
    shutil.copytree(finished.records.storage.path, tmp_path, dirs_exist_ok=True)
    tracked = small_config(tmp_path, "tracking.enabled=true", "tracking.uri=http://127.0.0.1:9")
    untracked = small_config(tmp_path)
    records = Run(untracked).records
    assert not is_nothing_left(untracked)
    records.write_json("published.json", {"2": "all"})
    assert is_nothing_left(untracked)
    assert not is_nothing_left(tracked)
    records.write_json("mlflow.json", {"uri": "http://127.0.0.1:9", "run_id": "x", "finished": 1})
    assert not is_nothing_left(tracked)
    records.write_json("mlflow.json", {"uri": "http://127.0.0.1:9", "run_id": "x", "finished": 2})
    assert is_nothing_left(tracked)
    assert not is_nothing_left(small_config(tmp_path, "rounds=3"))


def test_runs_have_a_status(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(finished.records.storage.path, "tiny")
    for name in ("done", "half", "held", "stopped"):
        shutil.copytree(source, tmp_path / name)
    info = json.loads((tmp_path / "half/run.json").read_text())
    info["config"]["rounds"] = 9
    (tmp_path / "half/run.json").write_text(json.dumps(info))
    health = tmp_path / "stopped/health/round=002/manifest.json"
    health.write_text(health.read_text().replace('"state": "well"', '"state": "stop"').replace('"warn"', '"stop"'))
    with Store(str(tmp_path)).run("held").lock("train"):
        command = ["runs", "--root", str(tmp_path), "--format", "json", "--sort", "run"]
        assert run_command(command, monkeypatch) == 0
    rows = {row["run"]: row["status"] for row in json.loads(capsys.readouterr().out)}
    assert rows == {"done": "finished", "half": "interrupted", "held": "running", "stopped": "stopped by health"}
    assert run_command(["runs", "--root", str(tmp_path), "--sort", "colour"], monkeypatch) == 2


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet"])
def test_a_dataset_can_be_a_single_file(
    name: str, finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["dataset", str(tmp_path / name), "--kind", "sft", "--root", finished.records.storage.path]
    assert run_command(command, monkeypatch) == 0
    capsys.readouterr()
    if name == "rows.csv":
        first, *_ = csv.DictReader(io.StringIO((tmp_path / name).read_text()))
        assert [message["role"] for message in json.loads(first["messages"])] == ["user", "assistant"]
    else:
        assert pq.read_table(tmp_path / name).num_rows > 0
    assert run_command(command, monkeypatch) == 2
    assert "already exists" in capsys.readouterr().err


def test_the_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["--version"], monkeypatch) == 0
    assert capsys.readouterr().out == f"ogls-sd {ogls.__version__}\n"


def test_a_page_can_be_opened(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda address: opened.append(address) or True)
    page = tmp_path / "page.html"
    command = [
        "view",
        "tiny",
        "--root",
        finished.records.storage.path,
        "--out",
        str(page),
        "--most",
        "1",
        "--no-policy",
    ]
    assert run_command([*command, "--open"], monkeypatch) == 0
    assert opened == [page.as_uri()]
    assert run_command(command, monkeypatch) == 0
    assert "open it in a browser" in " ".join(capsys.readouterr().out.split())
    assert len(opened) == 1


def test_a_table_shows_the_columns_that_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names stay whole at 80 columns; what does not fit is named."""
    names = [f"accuracy_{n}" for n in ("first", "last", "best", "worst", "mean", "median")]
    table = pa.table({"run": ["a", "b"], **{n: [0.5, 0.25] for n in names}})
    monkeypatch.setattr("flows.console.Console", lambda **_: Console(width=80))
    show_table(table, "table", None)
    printed = capsys.readouterr()
    assert max(map(len, printed.out.splitlines())) <= 80
    assert all(name in printed.out for name in names[:3])
    assert "accuracy_median" not in printed.out
    assert "2 rows, without accuracy_mean, accuracy_median, for which the terminal" in printed.err
    capsys.readouterr()
    show_table(table.select(["run", names[0]]), "table", None)
    assert capsys.readouterr().err.strip() == "2 rows"
