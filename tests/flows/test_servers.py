"""`ogls train` in a separate process, with a running Prefect server and with one that does not respond."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from conftest import REPO, SMALL, TINY
from services_fixture import free_port

pytestmark = pytest.mark.slow


@pytest.fixture
def server(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Start a Prefect server on a free loopback port and yield the environment of its clients."""
    port = free_port()
    environment = {
        **os.environ,
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    }
    command = [sys.executable, "-m", "prefect", "server", "start", "--port", str(port)]
    with open(tmp_path / "server.log", "wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api/health", timeout=2)
                break
            except OSError:
                assert process.poll() is None, (tmp_path / "server.log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.2)
        yield environment
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.mark.nightly
def test_training_with_a_running_server(server: dict[str, str], tmp_path: Path) -> None:
    sets = [p for s in (*SMALL, "name=served", "rounds=1", f"root={tmp_path}/store") for p in ("--set", s)]
    command = [sys.executable, "-m", "flows.cli", "train", str(TINY), *sets]
    result = subprocess.run(command, cwd=REPO, env=server, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "temporary" not in result.stderr
    address = server["PREFECT_API_URL"].removesuffix("/api")
    assert f"open {address}" in result.stdout
    (run,) = httpx.post(f"{server['PREFECT_API_URL']}/flow_runs/filter", json={}).json()
    assert (run["name"], run["state_name"]) == ("train served", "Completed")
    assert run["parameters"]["config"]["name"] == "served"
    (artifact,) = httpx.post(
        f"{server['PREFECT_API_URL']}/artifacts/filter", json={"artifacts": {"key": {"any_": ["served-r001"]}}}
    ).json()
    assert artifact["data"].startswith("# served, round 1")


def test_a_server_that_does_not_respond_is_an_error(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PREFECT_API_URL": f"http://127.0.0.1:{free_port()}/api",
        "PREFECT_CLIENT_MAX_RETRIES": "0",
    }
    command = [sys.executable, "-m", "flows.cli", "train", str(TINY), "--set", f"root={tmp_path}/store"]
    result = subprocess.run(
        command, cwd=REPO, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 2, result.stderr
    assert f"no Prefect server answers at {environment['PREFECT_API_URL']}" in result.stderr
    assert "Traceback" not in result.stderr
