"""The command line in separate processes: exit codes, output formats, and a training from start to end."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from conftest import REPO, SMALL, TINY

from ogls.stages.run import Run, open_run

OGLS = [sys.executable, "-m", "flows.cli"]


def ogls(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command of `ogls` with additional environment variables."""
    return subprocess.run(
        [*OGLS, *arguments], cwd=REPO, env={**os.environ, **env}, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def root(finished: Run) -> str:
    return finished.records.storage.path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "none.toml"], "no configuration file none.toml"),
        (["train", str(TINY), "--set", "train.epoch=3"], "train.epoch: unknown key; did you mean epochs?"),
        (["config", str(TINY), "--set", "rounds=-1"], "rounds: Input should be greater than or equal to 0"),
        (["query"], "give one SELECT, or --name with one of: agreement, direct"),
        (["query", "--name", "curve"], "unknown query curve; named queries:"),
        (["query", "DROP TABLE x", "--root", "data/tiny"], "expected one SELECT statement, got DROP"),
        (["query", "SELECT 1", "--run", "none", "--root", "data/tiny"], "no run none in data/tiny"),
        (["query", "SELECT 1", "--root", "data/tiny", "--format", "xml"], "unknown format xml"),
        (["query", "SELECT 1", "--root", "data/tiny", "--format", "parquet"], "add --out FILE"),
        (["sweep", "none", "--root", "/nonexistent"], "no run none in /nonexistent; existing runs: none"),
        (["sweep", "none", "--recipe", "x"], "unknown recipe x; known recipes: ogls-sd, contrastive"),
        (["stage", "dream", str(TINY)], "unknown stage dream; stages: prepare, sample"),
        (["seed-model", "data/tiny"], "data/tiny is not empty"),
        (["nonsense"], "No such command 'nonsense'"),
        (["train"], "config"),
        (["stage", "sample", str(TINY), "--set", "root=/proc/x"], "cannot write"),
    ],
)
def test_a_user_error_has_exit_code_2_and_no_traceback(arguments: list[str], message: str) -> None:
    result = ogls(*arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr + result.stdout


def test_help_lists_every_command() -> None:
    result = ogls("--help")
    assert result.returncode == 0
    for command in ("train", "evaluate", "sweep", "query", "tables", "runs", "config", "stage", "seed-model"):
        assert f" {command} " in result.stdout


def test_config_prints_the_resolved_configuration() -> None:
    result = ogls("config", str(TINY), "--set", "train.epochs=3")
    assert result.returncode == 0
    assert "epochs = 3" in result.stdout
    assert "max_grad_norm = 1.0" in result.stdout


def test_query_formats_agree(root: str, tmp_path: Path) -> None:
    sql = "SELECT round, problem_id, sample, token_ids FROM trajectories ORDER BY ALL LIMIT 5"
    rows = json.loads(ogls("query", sql, "--root", root, "--format", "json").stdout)
    assert [r["sample"] for r in rows] == [0, 1, 2, 3, 0]
    as_csv = list(csv.DictReader(io.StringIO(ogls("query", sql, "--root", root, "--format", "csv").stdout)))
    assert [(r["problem_id"], json.loads(r["token_ids"])) for r in as_csv] == [
        (r["problem_id"], r["token_ids"]) for r in rows
    ]
    ogls("query", sql, "--root", root, "--format", "parquet", "--out", str(tmp_path / "x.parquet"))
    assert pq.read_table(tmp_path / "x.parquet").to_pylist() == rows
    shown = ogls("query", sql, "--root", root)
    assert rows[0]["problem_id"] in shown.stdout
    assert "5 rows" in shown.stderr


def test_named_queries_and_runs_and_tables(root: str) -> None:
    rows = json.loads(ogls("query", "--name", "rounds", "--run", "tiny", "--root", root, "--format", "json").stdout)
    assert [r["round"] for r in rows] == [0, 1, 2]
    (run,) = json.loads(ogls("runs", "--root", root, "--format", "json").stdout)
    assert (run["run"], run["method"], run["rounds"]) == ("tiny", "ogls-sd", 2)
    assert run["accuracy"] == rows[-1]["accuracy"]
    assert "teacher_states" in ogls("tables").stdout


def test_stage_runs_one_stage(tmp_path: Path) -> None:
    small = [part for s in (*SMALL, f"root={tmp_path}") for part in ("--set", s)]
    assert ogls("stage", "prepare", str(TINY), *small).returncode == 0
    result = ogls("stage", "sample", str(TINY), "--round", "1", *small)
    assert result.returncode == 0, result.stderr
    assert "sample r001: 32 rows, done" in result.stdout
    assert "32 rows, already done" in ogls("stage", "sample", str(TINY), "--round", "1", *small).stdout
    failed = ogls("stage", "steer", str(TINY), "--round", "1", *small)
    assert failed.returncode == 2
    assert "run the stage teach first" in failed.stderr


@pytest.mark.slow
def test_a_user_error_inside_the_flow_has_no_traceback(tmp_path: Path) -> None:
    small = [p for s in (*SMALL, f"root={tmp_path}", "problems.source=none.jsonl") for p in ("--set", s)]
    result = ogls("train", str(TINY), *small, PREFECT_HOME=str(tmp_path / "prefect"))
    assert result.returncode == 2
    assert "error: cannot read problems from none.jsonl: No such file or directory" in result.stderr
    assert "Traceback" not in result.stderr + result.stdout
    assert len(result.stderr.strip().splitlines()) <= 4, result.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("killed", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_train_interrupted_and_finished_by_the_same_command(tmp_path: Path, killed: bool) -> None:
    """Ctrl-C, SIGKILL (`killed`), a complete run: one MLflow run, each round logged once, table and next steps."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    sets = ["name=cli", "rounds=2", f"root={tmp_path}/store", "tracking.enabled=true", f"tracking.uri={uri}"]
    overrides = [p for s in (*SMALL, *sets, f"tracking.artifacts={tmp_path}/art") for p in ("--set", s)]
    command = [*OGLS, "train", str(TINY), *overrides]
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path / "prefect"), "COLUMNS": "200"}
    environment.pop("PREFECT_API_URL", None)

    def start_until(manifest: str, log: Path) -> subprocess.Popen[bytes]:
        """Start the command and wait until it has written `manifest`. Returns the running process."""
        with open(log, "wb") as file:
            child = subprocess.Popen(command, cwd=REPO, env=environment, stderr=file)
        deadline = time.monotonic() + 300
        while not (tmp_path / "store/cli" / manifest).exists():
            assert child.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        return child

    child = start_until("updates/round=001/manifest.json", tmp_path / "first.log")
    child.send_signal(signal.SIGINT)
    output = f"exit {child.wait(timeout=60)}: {(tmp_path / 'first.log').read_text()}"
    assert child.returncode == 130, output
    assert "the same command continues where this one ended" in output

    if killed:
        child = start_until("trajectories/round=002/manifest.json", tmp_path / "second.log")
        orphans = psutil.Process(child.pid).children(recursive=True)
        child.kill()
        child.wait()
        for orphan in orphans:  # the temporary Prefect server survives a killed flow
            with contextlib.suppress(psutil.NoSuchProcess):
                orphan.kill()

    result = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "r002  accuracy" in result.stderr
    assert "run cli" in result.stdout
    next_steps = [line.strip() for line in result.stdout.split("Next steps:")[1].strip().splitlines()][::2]
    expected = ["watch it in the Prefect UI", "open MLflow", "read its tokens", "query it"]
    assert [line.split(":")[0] for line in next_steps] == expected

    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("ogls-sd").experiment_id])
    assert run.info.status == "FINISHED"
    steps = [m.step for m in client.get_metric_history(run.info.run_id, "evaluate/accuracy")]
    assert steps == [0, 1, 2]


@pytest.mark.nightly
def test_train_killed_during_its_start_up(finished: Run, tmp_path: Path) -> None:
    """SIGKILL after a growing number of seconds, before and after the run is opened; then a complete run."""
    overrides = [p for s in (*SMALL, "rounds=1", f"root={tmp_path}/store") for p in ("--set", s)]
    command = [*OGLS, "train", str(TINY), *overrides]
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path / "prefect")}
    environment.pop("PREFECT_API_URL", None)
    for seconds in (0.2, 1, 2, 4, 6, 8, 10, 12):
        child = subprocess.Popen(command, cwd=REPO, env=environment, stderr=subprocess.DEVNULL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(seconds)
        orphans = psutil.Process(child.pid).children(recursive=True) if child.poll() is None else []
        child.kill()
        child.wait()
        for orphan in orphans:
            with contextlib.suppress(psutil.NoSuchProcess):
                orphan.kill()
    result = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    run = open_run(str(tmp_path / "store"), "tiny")
    sampled = run.records.read("trajectories", 1).column("text")
    assert sampled == finished.records.read("trajectories", 1).column("text")
