"""Long-lived processes that `ogls up` starts and `ogls down` stops; they are recorded in one file.

A process is only stopped if both its id and its start time are the recorded ones.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from ogls.errors import UserError

HOST = "127.0.0.1"
LOOPBACK = (HOST, "localhost", "::1")
_PATIENCE = 180.0  # seconds; the first start creates a database
_BUSY = 30.0  # seconds after which a live server that does not respond counts as hanging


@dataclass(frozen=True)
class Service:
    """One process; `created` (seconds since the epoch) distinguishes it from a later process with the same id."""

    name: str
    pid: int
    created: float
    url: str
    log: str


class Services:
    """The services recorded in one folder. Use it within `held`, so that two commands do not start them twice."""

    def __init__(self, folder: Path):
        self.folder = folder.absolute()
        self.file = self.folder / "services.json"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other commands out while the block runs. Raises UserError if another command is running."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "services.lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another `ogls up` or `ogls down` is running in {self.folder}; wait for it") from None
            yield

    def recorded(self) -> dict[str, Service]:
        """The recorded services, running or not."""
        try:
            return {name: Service(**about) for name, about in json.loads(self.file.read_text()).items()}
        except (FileNotFoundError, ValueError, TypeError):
            return {}

    def running(self) -> dict[str, Service]:
        """The recorded services that still run."""
        return {name: s for name, s in self.recorded().items() if process_of(s)}

    def answering(self, name: str, alive: Callable[[str], bool]) -> str | None:
        """The URL of a service that runs and responds; a busy one gets 30 seconds to respond. None otherwise."""
        service = self.recorded().get(name)
        deadline = time.monotonic() + _BUSY
        while service and process_of(service) and time.monotonic() < deadline:
            if alive(service.url):
                return service.url
            time.sleep(0.3)
        return None

    def start(
        self, name: str, command: Sequence[str], url: str, environment: Mapping[str, str], ready: Callable[[], bool]
    ) -> Service:
        """Start a process in a session of its own and wait until it is ready.

        It is recorded before the wait, so `stop` always finds it. Raises UserError with the end of its log
        if it dies or is not ready in time; then it is stopped.
        """
        log = self.folder / f"{name}.log"
        with open(log, "ab") as sink:
            process = subprocess.Popen(
                [sys.executable, "-m", *command],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,
            )
        service = Service(name, process.pid, psutil.Process(process.pid).create_time(), url, str(log))
        self._record({**self.running(), name: service})
        deadline = time.monotonic() + _PATIENCE
        while not ready():
            dead = process.poll() is not None
            if dead or time.monotonic() > deadline:
                self.stop(name)
                last = "\n  ".join(log.read_text(errors="replace").strip().splitlines()[-6:])
                what = f"ended with {process.returncode}" if dead else f"did not respond within {_PATIENCE:.0f} s"
                raise UserError(f"{name} {what}; the end of {log}:\n  {last}")
            time.sleep(0.3)
        return service

    def stop(self, name: str, patience: float = 20.0) -> bool:
        """Stop a recorded process and its children, with SIGTERM and then SIGKILL. Returns False if it was gone."""
        service = self.recorded().get(name)
        process = process_of(service) if service else None
        if process:
            family = [*process.children(recursive=True), process]
            for member in family:
                _signal(member, "terminate")
            _, left = psutil.wait_procs(family, timeout=patience)
            for member in left:
                _signal(member, "kill")
            psutil.wait_procs(left, timeout=5)
        self._record({n: s for n, s in self.recorded().items() if n != name})
        return process is not None

    def _record(self, services: Mapping[str, Service]) -> None:
        temporary = self.file.with_suffix(".tmp")
        temporary.write_text(json.dumps({n: asdict(s) for n, s in services.items()}, indent=1))
        os.replace(temporary, self.file)


def process_of(service: Service) -> psutil.Process | None:
    """The running process of a service; None if it is gone or its id belongs to another process now."""
    try:
        process = psutil.Process(service.pid)
        alive = abs(process.create_time() - service.created) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return None
    return process if alive else None


def _signal(process: psutil.Process, how: str) -> None:
    with suppress(psutil.NoSuchProcess):
        getattr(process, how)()


def end_with_parent() -> None:
    """Let this process exit soon after its parent, however the parent ends."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="end with parent").start()


def end_orphaned_servers() -> int:
    """Stop temporary Prefect servers whose parent was killed. Returns how many.

    Prefect marks them in their environment. Children of a killed process are adopted by process 1 or by the user's
    systemd; if process 1 is a Python process (in a container), nothing is stopped.
    """
    ended = 0
    for process in psutil.process_iter(["cmdline"]):
        if not any("prefect.server.api" in part for part in process.info["cmdline"] or ()):
            continue
        with suppress(psutil.Error):
            parent = process.parent()
            if (parent is None or adopts_orphans(parent)) and process.environ().get("PREFECT__SERVER_EPHEMERAL") == "1":
                _signal(process, "terminate")
                ended += 1
    return ended


def adopts_orphans(parent: psutil.Process) -> bool:
    """Whether a process adopts orphans, and cannot be their original parent."""
    init = parent.pid == 1 and "python" not in " ".join(parent.cmdline())
    return init or parent.name() == "systemd"


def responds(url: str, text: str = "") -> bool:
    """Whether a server answers a GET with status 200 and a body that contains `text`."""
    try:
        with urllib.request.urlopen(url, timeout=3) as reply:
            return text in reply.read().decode(errors="replace")
    except (urllib.error.URLError, OSError, ValueError):
        return False


def describe_port_owner(port: int, host: str = HOST) -> str | None:
    """The process that listens on a port of this machine, as text; None if the port is free."""
    import socket

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            pass
        else:
            return None
    try:
        found = [c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.laddr.port == port]
        return f"process {found[0].pid} ({psutil.Process(found[0].pid).name()})"
    except (psutil.Error, IndexError):
        return "another process"
