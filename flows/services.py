"""Background services: `ogls up` starts and records them, `ogls down` stops them.

A process is stopped only if its id and its start time equal the recorded ones.
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
from ogls.execution.ray_cluster import accepts_connections

HOST = "127.0.0.1"
LOOPBACK = (HOST, "localhost", "::1")
FOLDER = Path("data/services")  # process ids and logs
PREFECT_FOLDER = Path("data/prefect")  # Prefect's home: temporary servers and that of `ogls up` share its database
_START_SECONDS = 180.0  # time limit of a start; the first start creates a database
_RESPONSE_SECONDS = 30.0  # a running server that does not respond for this long is restarted


@dataclass(frozen=True)
class Service:
    """A recorded process. `created` (seconds since the epoch) distinguishes it from a later process with its id."""

    name: str
    pid: int
    created: float
    url: str
    log: str


class Services:
    """The services recorded in one folder. Start and stop them inside `lock`, so that no other command does so too."""

    def __init__(self, folder: Path):
        self.folder = folder.absolute()
        self.file = self.folder / "services.json"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the folder while the block runs. Raises UserError if another command has locked it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "services.lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another `ogls up` or `ogls down` is running in {self.folder}; wait for it") from None
            yield

    def recorded(self) -> dict[str, Service]:
        """All recorded services by name, running or not; empty if the record is missing or damaged."""
        try:
            return {name: Service(**fields) for name, fields in json.loads(self.file.read_text()).items()}
        except (FileNotFoundError, ValueError, TypeError):
            return {}

    def running(self) -> dict[str, Service]:
        """The recorded services that are running, by name."""
        return {name: s for name, s in self.recorded().items() if find_process(s)}

    def children(self, name: str) -> set[str]:
        """The names of the processes that a running service has started."""
        process = find_process(service) if (service := self.recorded().get(name)) else None
        return {child.name() for child in process.children(recursive=True)} if process else set()

    def responding_url(self, name: str, alive: Callable[[str], bool]) -> str | None:
        """The URL of a running service that responds within 30 seconds, else None. `alive(url)` tests the response."""
        service = self.recorded().get(name)
        deadline = time.monotonic() + _RESPONSE_SECONDS
        while service and find_process(service) and time.monotonic() < deadline:
            if alive(service.url):
                return service.url
            time.sleep(0.3)
        return None

    def start(
        self, name: str, command: Sequence[str], url: str, environment: Mapping[str, str], ready: Callable[[], bool]
    ) -> Service:
        """Run `python -m COMMAND` in a separate session, wait until `ready()` and return the recorded service.

        The process is recorded before the wait, so `stop` finds it after an interruption. If it exits, or is not ready
        within three minutes, it is stopped and UserError with the end of its log is raised.
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
        deadline = time.monotonic() + _START_SECONDS
        while not ready():
            exited = process.poll() is not None
            if exited or time.monotonic() > deadline:
                self.stop(name)
                log_end = "\n  ".join(log.read_text(errors="replace").strip().splitlines()[-6:])
                reason = f"exited with {process.returncode}" if exited else f"did not respond in {_START_SECONDS:.0f} s"
                raise UserError(f"{name} {reason}; the end of {log}:\n  {log_end}")
            time.sleep(0.3)
        return service

    def stop(self, name: str, timeout: float = 20.0) -> bool:
        """Stop a recorded process and its children: SIGTERM, and SIGKILL after `timeout` seconds. Removes the record.

        Returns False if the process was not running.
        """
        service = self.recorded().get(name)
        process = find_process(service) if service else None
        if process:
            family = [*process.children(recursive=True), process]
            for member in family:
                _signal(member, "terminate")
            _, alive = psutil.wait_procs(family, timeout=timeout)
            for member in alive:
                _signal(member, "kill")
            psutil.wait_procs(alive, timeout=5)
        self._record({n: s for n, s in self.recorded().items() if n != name})
        return process is not None

    def _record(self, services: Mapping[str, Service]) -> None:
        temporary = self.file.with_suffix(".tmp")
        temporary.write_text(json.dumps({n: asdict(s) for n, s in services.items()}, indent=1))
        os.replace(temporary, self.file)


def use_running(folder: Path = FOLDER) -> None:
    """Set PREFECT_API_URL, MLFLOW_TRACKING_URI and RAY_ADDRESS to what `ogls up` started here, if it responds.

    Variables that are set already are kept.
    """
    recorded = Services(folder).recorded()
    for name, variable in (("prefect", "PREFECT_API_URL"), ("mlflow", "MLFLOW_TRACKING_URI")):
        service = recorded.get(name)
        if service and variable not in os.environ and find_process(service) and responds(f"{service.url}/health"):
            os.environ[variable] = service.url
    ray = recorded.get("ray")
    if ray and "RAY_ADDRESS" not in os.environ and find_process(ray) and accepts_connections(ray.url):
        os.environ["RAY_ADDRESS"] = ray.url


def database_url(folder: Path = PREFECT_FOLDER) -> str:
    """The URL of the database in Prefect's home."""
    return f"sqlite+aiosqlite:///{folder.absolute() / 'prefect.db'}"


def find_process(service: Service) -> psutil.Process | None:
    """The running process of a service; None if it has ended, even if its id now belongs to another process."""
    try:
        process = psutil.Process(service.pid)
        alive = abs(process.create_time() - service.created) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return None
    return process if alive else None


def _signal(process: psutil.Process, method: str) -> None:
    with suppress(psutil.NoSuchProcess):
        getattr(process, method)()


def exit_with_parent() -> None:
    """Start a thread that ends this process within a second after its parent has ended, also after SIGKILL."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="exit with parent").start()


def stop_orphaned_servers() -> int:
    """Stop temporary Prefect servers that survived a killed parent. Returns how many were stopped.

    Prefect marks temporary servers in their environment. The children of a killed process get process 1 or the systemd
    of the user as parent. If process 1 is a Python process (in a container), it may be the original parent, and
    nothing is stopped.
    """
    stopped = 0
    for process in psutil.process_iter(["cmdline"]):
        if not any("prefect.server.api" in part for part in process.info["cmdline"] or ()):
            continue
        with suppress(psutil.Error):
            parent = process.parent()
            if (parent is None or adopts_orphans(parent)) and process.environ().get("PREFECT__SERVER_EPHEMERAL") == "1":
                _signal(process, "terminate")
                stopped += 1
    return stopped


def adopts_orphans(parent: psutil.Process) -> bool:
    """Whether a process is an init process: it adopts orphans and is never the original parent of a server."""
    init = parent.pid == 1 and "python" not in " ".join(parent.cmdline())
    return init or parent.name() == "systemd"


def responds(url: str, text: str = "") -> bool:
    """Whether a server responds to a GET request with status 200 and a body that contains `text`."""
    try:
        with urllib.request.urlopen(url, timeout=3) as reply:
            return text in reply.read().decode(errors="replace")
    except (urllib.error.URLError, OSError, ValueError):
        return False


def describe_port_owner(port: int, host: str = HOST) -> str | None:
    """A description of the process that listens on a port of this machine; None if the port is free."""
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
        owners = [c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.laddr.port == port]
        return f"process {owners[0].pid} ({psutil.Process(owners[0].pid).name()})"
    except (psutil.Error, IndexError):
        return "another process"
