"""A Prefect server, a worker and MLflow for tests: `ogls up` with a separate folder and free ports."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
from conftest import REPO

from flows.services import Services
from ogls.config import RunConfig, to_toml

FINAL_STATES = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


def free_port() -> int:
    """A port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ServiceStack:
    """Services in one folder, started with `ogls up` and stopped with `ogls down`; `ports` are Prefect's and MLflow's.

    As a context manager it starts them, with the output in `output`, and stops them at the end.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.ports = [free_port(), free_port()]
        self.environment = {k: v for k, v in os.environ.items() if k not in ("PREFECT_API_URL", "PREFECT_HOME")}
        # By default the scheduler runs once a minute and would create no flow run for a schedule that is due sooner.
        self.environment["PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS"] = "5"

    def ogls(self, *arguments: str, code: int = 0) -> str:
        """Run a command of `ogls`, check its exit code and return its output."""
        command = [sys.executable, "-m", "flows.cli", *arguments, "--folder", str(self.folder)]
        result = subprocess.run(
            command, cwd=REPO, env=self.environment, capture_output=True, text=True, check=False, timeout=280
        )
        assert result.returncode == code, result.stdout + result.stderr
        return result.stdout + result.stderr

    def __enter__(self) -> ServiceStack:
        self.output = self.up()
        return self

    def __exit__(self, *_: object) -> None:
        self.ogls("down")

    def up(self, code: int = 0) -> str:
        """Run `ogls up` and return its output."""
        ports = ("--prefect-port", str(self.ports[0]), "--mlflow-port", str(self.ports[1]))
        folders = [x for n in ("home", "root", "store") for x in (f"--{n}", str(self.folder / n))]
        return self.ogls("up", *ports, *folders, code=code)

    def start_training(self, config: RunConfig, log: Path | None = None) -> subprocess.Popen[str]:
        """Start `ogls train` in a separate process with this Prefect server; its output goes to a pipe, or to `log`."""
        file = self.folder / f"{config.name}.toml"
        file.write_text(to_toml(config))
        environment = {**self.environment, "PREFECT_API_URL": self.api, "PREFECT_CLIENT_MAX_RETRIES": "2"}
        command = [sys.executable, "-m", "flows.cli", "train", str(file)]
        output = open(log, "a") if log else subprocess.PIPE  # noqa: SIM115 - the child process keeps it open
        return subprocess.Popen(command, cwd=REPO, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True)

    def start_deployment(self, config: RunConfig, deployment: str = "tiny") -> str:
        """Create a flow run of a deployment, which the worker starts. Returns its id."""
        (match,) = [d for d in self.request("POST", "/deployments/filter", {}) if d["name"] == deployment]
        body = {"parameters": {"config": config.model_dump(mode="json")}, "state": {"type": "SCHEDULED"}}
        return str(self.request("POST", f"/deployments/{match['id']}/create_flow_run", body)["id"])

    def wait_for_end(self, flow_run: str, seconds: float = 240) -> dict[str, Any]:
        """Wait until a flow run has ended, and return it."""
        return self.wait_for_state(flow_run, *FINAL_STATES, seconds=seconds)

    def wait_for_state(self, flow_run: str, *types: str, seconds: float = 240) -> dict[str, Any]:
        """Wait until the state of a flow run has one of these types, and return the flow run."""
        deadline = time.monotonic() + seconds
        while (run := self.request("GET", f"/flow_runs/{flow_run}"))["state_type"] not in types:
            assert time.monotonic() < deadline, (run["state"], (self.folder / "worker.log").read_text()[-2000:])
            time.sleep(0.5)
        return dict(run)

    def flow_run_states(self, name: str) -> list[str]:
        """The states of the flow runs with a name, oldest first."""
        runs = self.request("POST", "/flow_runs/filter", {"flow_runs": {"name": {"any_": [name]}}})
        return [r["state_name"] for r in sorted(runs, key=lambda r: r["created"])]

    @property
    def api(self) -> str:
        return f"http://127.0.0.1:{self.ports[0]}/api"

    def request(self, method: str, path: str, body: Any = None) -> Any:
        """The JSON body of a response of the Prefect API; raises if the status is an error."""
        import httpx

        for attempt in range(5):  # 503: the database of the server is locked for a moment
            response = httpx.request(method, self.api + path, json=body, timeout=90)  # the server waits up to a minute
            if response.status_code != 503:
                break
            time.sleep(1 + attempt)
        response.raise_for_status()
        return response.json() if response.content else None


def wait_for_scheduled_run(services: ServiceStack, deployment: str, when: datetime) -> dict[str, Any]:
    """Wait until the flow run of a deployment that is scheduled for `when` has ended, and return it."""
    by_deployment = {"deployments": {"id": {"any_": [deployment]}}}
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        for run in services.request("POST", "/flow_runs/filter", by_deployment):
            due = datetime.fromisoformat(run["expected_start_time"].replace("Z", "+00:00"))
            if due == when and run["state_type"] in FINAL_STATES:
                return run
        time.sleep(1)
    seen = [
        (r["expected_start_time"], r["start_time"], r["state_name"], (r["state"] or {}).get("message"))
        for r in services.request("POST", "/flow_runs/filter", by_deployment)
    ]
    log_end = (services.folder / "worker.log").read_text()[-2000:]
    raise AssertionError(f"no flow run scheduled for {when} has ended: {seen}\n{log_end}")


def wait_for_file(path: Path, seconds: float = 180) -> None:
    """Wait until a file exists."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} was not written"
        time.sleep(0.01)


def kill_service(services: ServiceStack, name: str) -> None:
    """Send SIGKILL to a service and its children, as the OOM killer would; flows of the worker keep running."""
    process = psutil.Process(Services(services.folder).running()[name].pid)
    family = [process, *(process.children(recursive=True) if name != "worker" else [])]
    for member in family:
        member.kill()
    psutil.wait_procs(family, timeout=10)


def flow_processes(services: ServiceStack) -> list[psutil.Process]:
    """The processes in which the worker runs flows."""
    processes = []
    for process in psutil.process_iter(["cmdline", "environ"]):
        command, environment = process.info["cmdline"] or [], process.info["environ"] or {}
        same_server = environment.get("PREFECT_API_URL") == services.api
        if same_server and ("flow-run" in command or "prefect.engine" in " ".join(command)):
            processes.append(process)
    return processes
