"""SIGKILL of each process that a training uses. The results equal those of an undisturbed run, nothing is logged twice,
and Prefect shows the true states."""

from __future__ import annotations

import subprocess
from pathlib import Path

import psutil
import pytest
from conftest import content, small_config
from services_fixture import ServiceStack, flow_processes, kill_service, wait_for_file

from ogls.config import RunConfig
from ogls.stages.run import Run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def tracked_config(services: ServiceStack, root: Path, *overrides: str) -> RunConfig:
    """The small configuration, tracked in the MLflow of `services`, in an experiment named after `root`."""
    uri = f"http://127.0.0.1:{services.ports[1]}"
    tracking = ("tracking.enabled=true", f"tracking.uri={uri}", f"tracking.experiment={root}")
    return small_config(root, "execution.retry_seconds=0.5", *tracking, *overrides)


def manifest(root: Path, table: str, round_: int) -> Path:
    """The path of a manifest, which is written when its stage is done."""
    return root / "tiny" / table / f"round={round_:03d}" / "manifest.json"


def logged(services: ServiceStack, root: Path) -> tuple[str, list[int]]:
    """(status, logged rounds) of the only MLflow run of the experiment."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"http://127.0.0.1:{services.ports[1]}")
    (run,) = client.search_runs([client.get_experiment_by_name(str(root)).experiment_id])
    return run.info.status, [m.step for m in client.get_metric_history(run.info.run_id, "rounds_logged")]


def read_until(training: subprocess.Popen[str], text: str) -> str:
    """Read the output of a training until it contains `text`. Returns the output read."""
    output = ""
    assert training.stdout
    while text not in output:
        output += (line := training.stdout.readline())
        assert line, output
    return output


def assert_resumes(services: ServiceStack, config: RunConfig, finished: Run) -> None:
    """Resume the run on the worker: its files equal those of the undisturbed run, and each round is logged once."""
    assert services.wait_for_end(services.start_deployment(config))["state_name"] == "Completed"
    assert content(Run(config)) == content(finished)
    assert logged(services, Path(config.root)) == ("FINISHED", [0, 1, 2])


@pytest.mark.nightly
def test_mlflow_and_the_prefect_server_are_killed_during_a_training(
    services: ServiceStack, finished: Run, tmp_path: Path
) -> None:
    """The training continues without MLflow and waits for Prefect; the next start logs the missing rounds."""
    config = tracked_config(services, tmp_path)
    training = services.start_training(config)
    wait_for_file(manifest(tmp_path, "trajectories", 1))
    kill_service(services, "mlflow")
    output = read_until(training, "is unavailable")
    kill_service(services, "prefect")
    output += read_until(training, "does not respond; waiting for it")
    services.up()
    output += training.communicate(timeout=400)[0]
    assert training.returncode == 0, output
    assert output.count("is unavailable") == 1
    assert content(Run(config)) == content(finished)
    assert services.flow_run_states("train tiny")[-2:] == ["Crashed", "Completed"]
    assert_resumes(services, config, finished)


@pytest.mark.nightly
def test_the_worker_is_killed(services: ServiceStack, finished: Run, tmp_path: Path) -> None:
    """Its flow either completes without the worker or is shown as Crashed; the run can be resumed."""
    config = tracked_config(services, tmp_path)
    first = services.start_deployment(config)
    wait_for_file(manifest(tmp_path, "trajectories", 1))
    kill_service(services, "worker")
    services.up()
    assert services.wait_for_end(first)["state_name"] in ("Completed", "Crashed")
    assert_resumes(services, config, finished)


@pytest.mark.nightly
def test_two_workers_take_the_same_run(services: ServiceStack, finished: Run, tmp_path: Path) -> None:
    config = tracked_config(services, tmp_path, "execution.limit=")
    flow_runs = [services.start_deployment(config), services.start_deployment(config)]
    runs = [services.wait_for_end(flow_run) for flow_run in flow_runs]
    states = sorted(run["state_name"] for run in runs)
    if states != ["Completed", "Completed"]:  # both complete if the second starts after the first has ended
        assert states == ["Completed", "Failed"]
        (refused,) = [run for run in runs if run["state_name"] == "Failed"]
        assert "run tiny is held by process" in refused["state"]["message"]
    assert content(Run(config)) == content(finished)
    assert logged(services, tmp_path) == ("FINISHED", [0, 1, 2])


@pytest.mark.nightly
def test_a_flow_is_killed_with_and_without_its_worker(services: ServiceStack, finished: Run, tmp_path: Path) -> None:
    """Without a worker, the automation `a run has gone silent` marks the flow run as Crashed; else the worker does."""
    config = tracked_config(services, tmp_path)
    first = services.start_deployment(config)
    wait_for_file(manifest(tmp_path, "trajectories", 1))
    flows = flow_processes(services)
    kill_service(services, "worker")
    for process in flows:
        process.kill()
    psutil.wait_procs(flows, timeout=10)
    ended = services.wait_for_end(first, seconds=400)
    assert ended["state_name"] == "Crashed"
    assert "silent" in ended["state"]["message"]
    services.up()
    second = services.start_deployment(config)
    services.wait_for_state(second, "RUNNING")
    for process in flow_processes(services):
        process.kill()
    ended = services.wait_for_end(second)
    assert (ended["state_name"], "silent" in (ended["state"]["message"] or "")) == ("Crashed", False)
    assert_resumes(services, config, finished)
