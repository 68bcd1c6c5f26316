"""Services are started, found and stopped; other processes are never stopped."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from services_fixture import free_port

from flows.services import Service, Services, describe_port_owner, find_process, responds, use_running
from ogls.config import TrackingConfig
from ogls.errors import UserError


def start_sleeper(services: Services, url: str = "") -> Service:
    """Start a service `sleeper`: a process that sleeps for a minute."""
    return services.start("sleeper", ("timeit", "-n1", "-r1", "import time; time.sleep(60)"), url, {}, lambda: True)


def test_a_started_service_is_found_and_stopped(tmp_path: Path) -> None:
    services = Services(tmp_path)
    with services.lock():
        service = start_sleeper(services)
        assert find_process(service)
        assert Services(tmp_path).running() == {"sleeper": service}
        assert services.stop("sleeper")
        assert not psutil.pid_exists(service.pid) or find_process(service) is None
        assert services.recorded() == {}
        assert not services.stop("sleeper")


def test_a_slow_response_does_not_count_as_no_response(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    services = Services(tmp_path)
    assert services.responding_url("sleeper", lambda url: True) is None
    service = start_sleeper(services, url="http://sleeper")
    responses = iter([False, False, True])
    assert services.responding_url("sleeper", lambda url: next(responses)) == service.url == "http://sleeper"
    monkeypatch.setattr("flows.services._RESPONSE_SECONDS", 0.5)
    assert services.responding_url("sleeper", lambda url: False) is None
    services.stop("sleeper")


def test_another_process_with_the_recorded_id_is_not_stopped(tmp_path: Path) -> None:
    services = Services(tmp_path)
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        created = psutil.Process(other.pid).create_time()
        services._record({"old": Service("old", other.pid, created - 100, "", "")})
        assert services.running() == {}
        assert not services.stop("old")
        assert other.poll() is None
    finally:
        other.kill()


def test_the_error_of_a_failed_start_has_the_end_of_the_log(tmp_path: Path) -> None:
    services = Services(tmp_path)
    with pytest.raises(
        UserError, match=r"broken exited with 1; the end of .*broken\.log:\n.*No module named nothing_here"
    ):
        services.start("broken", ("nothing_here",), "", {}, lambda: False)
    assert services.recorded() == {}


def test_a_second_command_is_refused_while_the_first_one_runs(tmp_path: Path) -> None:
    with (
        Services(tmp_path).lock(),
        pytest.raises(UserError, match="another `ogls up` or `ogls down` is running"),
        Services(tmp_path).lock(),
    ):
        pass


def test_a_damaged_record_counts_as_empty(tmp_path: Path) -> None:
    (tmp_path / "services.json").write_text('{"prefect": {"pid"')
    assert Services(tmp_path).recorded() == {}


def test_the_owner_of_a_port_is_named() -> None:
    import socket

    with socket.socket() as used:
        used.bind(("127.0.0.1", 0))
        used.listen()
        time.sleep(0.05)
        assert "process" in (describe_port_owner(used.getsockname()[1]) or "")
        port = used.getsockname()[1]
    assert describe_port_owner(port) is None


def test_a_command_uses_the_servers_that_run_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://given")
    for name in ("api", "mlflow"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "health").write_text("true")
    services, port = Services(tmp_path), free_port()
    url = f"http://127.0.0.1:{port}"
    command = ("http.server", str(port), "--bind", "127.0.0.1", "--directory", str(tmp_path))
    services.start("prefect", command, f"{url}/api", {}, lambda: responds(f"{url}/api/health"))
    services._record({**services.recorded(), "mlflow": replace(services.recorded()["prefect"], url=f"{url}/mlflow")})
    try:
        use_running(tmp_path)
        assert (os.environ["PREFECT_API_URL"], os.environ["MLFLOW_TRACKING_URI"]) == (f"{url}/api", "http://given")
        assert TrackingConfig().address == "http://given"
        assert TrackingConfig(uri="http://mine").address == "http://mine"
        monkeypatch.delenv("MLFLOW_TRACKING_URI")
        assert TrackingConfig().address == "sqlite:///data/mlflow/mlflow.db"
        use_running(tmp_path)
        assert TrackingConfig().address == f"{url}/mlflow"
    finally:
        services.stop("prefect")
        monkeypatch.delenv("PREFECT_API_URL")
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    use_running(tmp_path)
    assert "PREFECT_API_URL" not in os.environ
