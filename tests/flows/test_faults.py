"""SIGKILL of everything that a training stands on, one after another: nothing lost, nothing doubled, the same result,
and what Prefect shows afterwards is true."""

from __future__ import annotations

import subprocess
from pathlib import Path

import psutil
import pytest
from conftest import content, small_config
from upped import Up, flow_processes, kill_service, wait_for

from ogls.config import RunConfig
from ogls.stages.run import Run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def config(up: Up, root: Path, *overrides: str) -> RunConfig:
    tracking = ("tracking.enabled=true", f"tracking.uri=http://127.0.0.1:{up.ports[1]}", f"tracking.experiment={root}")
    return small_config(root, "execution.retry_seconds=0.5", *tracking, *overrides)


def done(root: Path, table: str, round_: int) -> Path:
    return root / "tiny" / table / f"round={round_:03d}" / "manifest.json"


def logged(up: Up, root: Path) -> tuple[str, list[int]]:
    """Status and logged rounds of the one MLflow run."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"http://127.0.0.1:{up.ports[1]}")
    (run,) = client.search_runs([client.get_experiment_by_name(str(root)).experiment_id])
    return run.info.status, [m.step for m in client.get_metric_history(run.info.run_id, "rounds_logged")]


def heard(training: subprocess.Popen[str], words: str) -> str:
    """What a training says until it says these words."""
    said = ""
    assert training.stdout
    while words not in said:
        said += (line := training.stdout.readline())
        assert line, said
    return said


def goes_on(up: Up, wanted: RunConfig, finished: Run) -> None:
    """Started again through the worker, the run ends as one that nothing happened to, tracked once."""
    assert up.end_of(up.start(wanted))["state_name"] == "Completed"
    assert content(Run(wanted)) == content(finished)
    assert logged(up, Path(wanted.root)) == ("FINISHED", [0, 1, 2])


def test_mlflow_and_the_server_are_killed_in_a_training(up: Up, finished: Run, tmp_path: Path) -> None:
    """It goes on without the one, waits for the other, and the next start logs what MLflow missed."""
    wanted = config(up, tmp_path)
    training = up.training(wanted)
    wait_for(done(tmp_path, "trajectories", 1))
    kill_service(up, "mlflow")
    said = heard(training, "is unavailable")
    kill_service(up, "prefect")
    said += heard(training, "does not respond; waiting for it")
    up.up()
    said += training.communicate(timeout=400)[0]
    assert training.returncode == 0, said
    assert said.count("is unavailable") == 1
    assert content(Run(wanted)) == content(finished)
    assert up.states("train tiny")[-2:] == ["Crashed", "Completed"]
    goes_on(up, wanted, finished)


def test_the_worker_is_killed_and_its_flow_goes_on_or_is_gone(up: Up, finished: Run, tmp_path: Path) -> None:
    wanted = config(up, tmp_path)
    first = up.start(wanted)
    wait_for(done(tmp_path, "trajectories", 1))
    kill_service(up, "worker")
    up.up()
    assert up.end_of(first)["state_name"] in ("Completed", "Crashed")
    goes_on(up, wanted, finished)


def test_two_workers_take_the_same_run(up: Up, finished: Run, tmp_path: Path) -> None:
    wanted = config(up, tmp_path, "execution.limit=")
    runs = [up.end_of(run) for run in [up.start(wanted), up.start(wanted)]]
    states = sorted(run["state_name"] for run in runs)
    if states != ["Completed", "Completed"]:  # one after the other, if the machine is slow to start the second
        assert states == ["Completed", "Failed"]
        (refused,) = [run for run in runs if run["state_name"] == "Failed"]
        assert "run tiny is held by process" in refused["state"]["message"]
    assert content(Run(wanted)) == content(finished)
    assert logged(up, tmp_path) == ("FINISHED", [0, 1, 2])


def test_a_flow_is_killed_with_its_worker_and_again_without(up: Up, finished: Run, tmp_path: Path) -> None:
    """At first nobody is left to say that the run is gone: the automation `a run has gone silent` does. Then the
    worker says it."""
    wanted = config(up, tmp_path)
    first = up.start(wanted)
    wait_for(done(tmp_path, "trajectories", 1))
    flows = flow_processes(up)
    kill_service(up, "worker")
    for process in flows:
        process.kill()
    psutil.wait_procs(flows, timeout=10)
    ended = up.end_of(first, seconds=400)
    assert ended["state_name"] == "Crashed"
    assert "silent" in ended["state"]["message"]
    up.up()
    second = up.start(wanted)
    up.reaches(second, "RUNNING")
    for process in flow_processes(up):
        process.kill()
    ended = up.end_of(second)
    assert (ended["state_name"], "silent" in (ended["state"]["message"] or "")) == ("Crashed", False)
    goes_on(up, wanted, finished)
