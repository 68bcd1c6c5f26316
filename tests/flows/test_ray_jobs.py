"""Flow runs as jobs of a Ray cluster: the work pool deployments/ray/work-pool.json."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import REPO, small_config
from services_fixture import ServiceStack, free_port

from ogls.errors import ClusterUnavailable, ConfigError
from ogls.execution import ray_job
from ogls.stages.run import Run

TEMPLATE = REPO / "deployments/ray/work-pool.json"
BIN = Path(sys.executable).parent


class FakeClient:
    """The dashboard of a cluster with one job. The first connection to its log breaks off."""

    def __init__(self, end: str, log: Any):
        self.status, self.end, self.log, self.submitted, self.lost = "RUNNING", end, log, {}, False

    def submit_job(self, **submitted: Any) -> None:
        self.submitted = submitted

    def stop_job(self, job: str) -> None:
        self.status = "STOPPED"

    def get_job_status(self, job: str) -> Any:
        return SimpleNamespace(is_terminal=lambda: self.status != "RUNNING")

    def get_job_info(self, job: str) -> Any:
        return SimpleNamespace(status=self.status, message="")

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        yield "r001  "
        if not self.lost:
            self.lost = True
            raise RuntimeError("the connection was closed: 1006")
        yield "accuracy\n"
        self.log()
        self.status = self.end


@pytest.fixture
def submit(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Submit a flow run to a fake cluster; gives the exit code and the client."""
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", "the-flow-run")
    monkeypatch.setenv("PREFECT_API_URL", "http://prefect:4200/api")
    monkeypatch.setenv("PREFECT__CONTROL_PORT", "1234")
    monkeypatch.setenv("PREFECT_HOME", "/home/me/.prefect")
    before = signal.getsignal(signal.SIGTERM)

    def run(end: str = "SUCCEEDED", log: Any = lambda: None) -> tuple[Any, FakeClient]:
        client = FakeClient(end, log)
        monkeypatch.setattr(ray_job, "_connect", lambda address: client)
        try:
            return ray_job.main("/srv/my project"), client
        except SystemExit as error:
            return error.code, client

    yield run
    signal.signal(signal.SIGTERM, before)


def test_a_flow_run_is_submitted_and_followed(submit: Any, capsys: pytest.CaptureFixture[str]) -> None:
    code, client = submit()
    assert code == 0
    assert client.submitted["entrypoint"] == "cd '/srv/my project' && exec python -m prefect.engine"
    variables = client.submitted["runtime_env"]["env_vars"]
    assert variables["PREFECT__FLOW_RUN_ID"] == "the-flow-run"
    assert variables["PREFECT_API_URL"] == "http://prefect:4200/api"
    assert not {"PREFECT__CONTROL_PORT", "PREFECT_HOME"} & variables.keys()  # of the worker's machine
    assert all(name.startswith("PREFECT_") for name in variables)
    output = capsys.readouterr().out.splitlines()
    job = client.submitted["submission_id"]
    assert output == [f"flow run the-flow-run is the Ray job {job}", "r001  accuracy", f"Ray job {job}: SUCCEEDED"]
    assert submit("FAILED")[0] == 1


def test_a_cancelled_flow_run_stops_its_job(submit: Any) -> None:
    code, client = submit(log=lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert (code, client.status) == (128 + signal.SIGTERM, "STOPPED")


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT__FLOW_RUN_ID", raising=False)
    with pytest.raises(ConfigError, match="no flow run: a Prefect worker starts this command"):
        ray_job.main()
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", "the-flow-run")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(
        ClusterUnavailable, match=r"^no job can be submitted at http://127.0.0.1:\d+ \(.*RAY_API_SERVER"
    ):
        ray_job.main()


def test_the_work_pool_is_one_of_prefect() -> None:
    from prefect.workers.process import ProcessJobConfiguration

    async def configuration(values: dict[str, Any]) -> ProcessJobConfiguration:
        client: Any = object()  # there are no blocks to ask a server for
        template = json.loads(TEMPLATE.read_text())
        return await ProcessJobConfiguration.from_template_and_values(template, values, client=client)

    assert asyncio.run(configuration({})).command == "python -m ogls.execution.ray_job '.'"
    command = asyncio.run(configuration({"folder": "/srv/my project"})).command
    assert command
    assert shlex.split(command)[-1] == "/srv/my project"


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_a_deployment_runs_as_a_job_of_a_cluster(services: ServiceStack, tmp_path: Path) -> None:
    environment = {
        **{n: v for n, v in os.environ.items() if not n.startswith(("RAY_", "PREFECT_"))},
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PREFECT_API_URL": services.api,
        "HOME": str(tmp_path),  # without a token of Ray
    }
    port, dashboard = free_port(), free_port()
    environment["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{dashboard}"

    def call(*command: str) -> str:
        result = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout + result.stderr

    head = (
        "--head",
        f"--port={port}",
        "--node-ip-address=127.0.0.1",
        "--num-cpus=2",
        "--object-store-memory=100000000",
    )
    with_jobs = ("--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}")
    ray = subprocess.Popen([BIN / "ray", "start", "--block", *head, *with_jobs], env=environment, cwd=REPO)
    try:
        call("prefect", "work-pool", "create", "ogls-ray", "--type", "process", "--base-job-template", str(TEMPLATE))
        (tiny,) = [d for d in services.request("POST", "/deployments/filter", {}) if d["name"] == "tiny"]
        pool = {"work_pool_name": "ogls-ray", "job_variables": {"folder": str(REPO)}}
        services.request("PATCH", f"/deployments/{tiny['id']}", pool)
        config = small_config(tmp_path / "runs", "name=as-a-job", "rounds=1", "execution.workers=ray")
        flow_run = services.start_deployment(config)
        services.request("PATCH", f"/deployments/{tiny['id']}", {"work_pool_name": "ogls", "job_variables": {}})
        output = call("prefect", "worker", "start", "--pool", "ogls-ray", "--run-once", "--prefetch-seconds", "60")
        assert services.wait_for_end(flow_run)["state_type"] == "COMPLETED", output
        manifest = Run(config).records.manifest("scores", 1)
        assert manifest
        assert manifest.metrics["workers"]  # the job found the cluster that it runs in
    finally:
        ray.terminate()
        ray.wait(30)
