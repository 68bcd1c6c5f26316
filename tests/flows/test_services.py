"""Processes that are started, found again and stopped: only those, and nothing twice."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from flows.services import Service, Services, describe_port_owner, process_of
from ogls.errors import UserError


def sleeper(services: Services, name: str = "sleeper") -> Service:
    return services.start(name, ("timeit", "-n1", "-r1", "import time; time.sleep(60)"), "", {}, lambda: True)


def test_what_was_started_is_found_and_stopped(tmp_path: Path) -> None:
    services = Services(tmp_path)
    with services.held():
        service = sleeper(services)
        assert process_of(service)
        assert Services(tmp_path).running() == {"sleeper": service}
        assert services.stop("sleeper")
        assert not psutil.pid_exists(service.pid) or process_of(service) is None
        assert services.recorded() == {}
        assert not services.stop("sleeper")


def test_a_server_that_is_slow_to_answer_is_not_taken_for_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    services = Services(tmp_path)
    assert services.answering("sleeper", lambda url: True) is None
    service = services.start("sleeper", ("timeit", "-n1", "import time; time.sleep(60)"), "here", {}, lambda: True)
    answers = iter([False, False, True])
    assert services.answering("sleeper", lambda url: next(answers)) == service.url == "here"
    monkeypatch.setattr("flows.services._BUSY", 0.5)
    assert services.answering("sleeper", lambda url: False) is None
    services.stop("sleeper")


def test_a_process_that_only_has_the_number_is_left_alone(tmp_path: Path) -> None:
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


def test_a_service_that_dies_tells_the_end_of_its_log(tmp_path: Path) -> None:
    services = Services(tmp_path)
    with pytest.raises(
        UserError, match=r"broken ended with 1; the end of .*broken\.log:\n.*No module named nothing_here"
    ):
        services.start("broken", ("nothing_here",), "", {}, lambda: False)
    assert services.recorded() == {}


def test_two_commands_do_not_meet(tmp_path: Path) -> None:
    with (
        Services(tmp_path).held(),
        pytest.raises(UserError, match="another `ogls up` or `ogls down` is running"),
        Services(tmp_path).held(),
    ):
        pass


def test_a_damaged_record_is_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "services.json").write_text('{"prefect": {"pid"')
    assert Services(tmp_path).recorded() == {}


def test_the_holder_of_a_port_is_named() -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        time.sleep(0.05)
        assert "process" in (describe_port_owner(taken.getsockname()[1]) or "")
        port = taken.getsockname()[1]
    assert describe_port_owner(port) is None
