"""`ogls up` with services, folders and ports of its own."""

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

ENDS = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Up:
    """The command line with services of its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.ports = [free_port(), free_port()]
        self.environment = {k: v for k, v in os.environ.items() if k not in ("PREFECT_API_URL", "PREFECT_HOME")}
        # Prefect looks for new schedules once a minute; a run due before it looks would never be made.
        self.environment["PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS"] = "5"

    def ogls(self, *arguments: str, code: int = 0) -> str:
        command = [sys.executable, "-m", "flows.cli", *arguments, "--folder", str(self.folder)]
        done = subprocess.run(
            command, cwd=REPO, env=self.environment, capture_output=True, text=True, check=False, timeout=280
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def __enter__(self) -> Up:
        self.said = self.up()
        return self

    def __exit__(self, *_: object) -> None:
        self.ogls("down")

    def up(self, code: int = 0) -> str:
        ports = ("--prefect-port", str(self.ports[0]), "--mlflow-port", str(self.ports[1]))
        return self.ogls("up", *ports, "--store", str(self.folder / "mlflow"), code=code)

    def training(self, config: RunConfig, log: Path | None = None) -> subprocess.Popen[str]:
        """`ogls train` in a process of its own, reporting to this server; what it says is piped, or goes to a log."""
        file = self.folder / f"{config.name}.toml"
        file.write_text(to_toml(config))
        environment = {**self.environment, "PREFECT_API_URL": self.api, "PREFECT_CLIENT_MAX_RETRIES": "2"}
        command = [sys.executable, "-m", "flows.cli", "train", str(file)]
        to = open(log, "a") if log else subprocess.PIPE  # noqa: SIM115 - the child's from now on
        return subprocess.Popen(command, cwd=REPO, env=environment, stdout=to, stderr=subprocess.STDOUT, text=True)

    def start(self, config: RunConfig, deployment: str = "tiny") -> str:
        """A run of a deployment, for its worker to take; its id."""
        (found,) = [d for d in self.ask("POST", "/deployments/filter", {}) if d["name"] == deployment]
        body = {"parameters": {"config": config.model_dump(mode="json")}, "state": {"type": "SCHEDULED"}}
        return str(self.ask("POST", f"/deployments/{found['id']}/create_flow_run", body)["id"])

    def end_of(self, flow_run: str, seconds: float = 240) -> dict[str, Any]:
        """A flow run, once it has ended."""
        return self.reaches(flow_run, *ENDS, seconds=seconds)

    def reaches(self, flow_run: str, *types: str, seconds: float = 240) -> dict[str, Any]:
        """A flow run, once its state is of one of these types."""
        deadline = time.monotonic() + seconds
        while (run := self.ask("GET", f"/flow_runs/{flow_run}"))["state_type"] not in types:
            assert time.monotonic() < deadline, (run["state"], (self.folder / "worker.log").read_text()[-2000:])
            time.sleep(0.5)
        return dict(run)

    def states(self, name: str) -> list[str]:
        """The states of the flow runs of a name, oldest first."""
        runs = self.ask("POST", "/flow_runs/filter", {"flow_runs": {"name": {"any_": [name]}}})
        return [r["state_name"] for r in sorted(runs, key=lambda r: r["created"])]

    @property
    def api(self) -> str:
        return f"http://127.0.0.1:{self.ports[0]}/api"

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        import httpx

        for attempt in range(5):  # 503: its database is locked for a moment, and it asks to be asked again
            reply = httpx.request(method, self.api + path, json=body, timeout=90)  # it waits for a minute itself
            if reply.status_code != 503:
                break
            time.sleep(1 + attempt)
        reply.raise_for_status()
        return reply.json() if reply.content else None


def ended(up: Up, deployment: str, when: datetime) -> dict[str, Any]:
    """The deployment's flow run scheduled for a time, once it has ended."""
    wanted = {"deployments": {"id": {"any_": [deployment]}}}
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        for run in up.ask("POST", "/flow_runs/filter", wanted):
            due = datetime.fromisoformat(run["expected_start_time"].replace("Z", "+00:00"))
            if due == when and run["state_type"] in ENDS:
                return run
        time.sleep(1)
    seen = [
        (r["expected_start_time"], r["start_time"], r["state_name"], (r["state"] or {}).get("message"))
        for r in up.ask("POST", "/flow_runs/filter", wanted)
    ]
    raise AssertionError(f"no run for {when} has ended: {seen}\n{(up.folder / 'worker.log').read_text()[-2000:]}")


def wait_for(path: Path, seconds: float = 180) -> None:
    """Wait until a file is there."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.01)


def kill_service(up: Up, name: str) -> None:
    """SIGKILL to a service and its own processes, as the machine's memory killer would."""
    process = psutil.Process(Services(up.folder).running()[name].pid)
    family = [process, *(process.children(recursive=True) if name != "worker" else [])]
    for member in family:
        member.kill()
    psutil.wait_procs(family, timeout=10)


def flow_processes(up: Up) -> list[psutil.Process]:
    """The processes in which this worker carries flows out."""
    found = []
    for process in psutil.process_iter(["cmdline", "environ"]):
        line, environment = process.info["cmdline"] or [], process.info["environ"] or {}
        ours = environment.get("PREFECT_API_URL") == up.api
        if ours and ("flow-run" in line or "prefect.engine" in " ".join(line)):
            found.append(process)
    return found
