"""The Ray cluster of a run: connecting to it, its nodes, and how many workers they have devices for."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from ogls.config import RunConfig
from ogls.errors import ClusterUnavailable, ConfigError

Kind = Literal["GPU", "CPU"]
OBJECT_STORE_BYTES = 2 * 10**8  # of a local cluster: shards go through the store of the run, not through Ray
_LOOPBACK = ("127.0.0.1", "localhost")
# "0": the address of this node is 127.0.0.1, and Ray listens nowhere else. Without it, Ray replaces 127.0.0.1 by an
# address that other machines can reach, and listens on all. It is read when ray is imported.
LOOPBACK_ONLY = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
_connected = ""  # the address that this process is connected to


@dataclass(frozen=True)
class Node:
    """A live node of the cluster."""

    id: str
    host: str
    cpus: int
    gpus: int

    def devices(self, kind: Kind) -> int:
        """The number of its devices of a kind."""
        return self.gpus if kind == "GPU" else self.cpus

    def __str__(self) -> str:
        return f"{self.host} ({self.id[:8]})"


@dataclass(frozen=True)
class Room:
    """The devices of one worker: their kind and number."""

    kind: Kind
    devices: int

    def workers(self, nodes: Sequence[Node]) -> int:
        """How many workers the nodes have devices for, in use or not."""
        return sum(node.devices(self.kind) // self.devices for node in nodes)


def require_ray() -> None:
    """Raise ConfigError, with the command that installs it, if Ray is not installed."""
    if find_spec("ray") is None:
        raise ConfigError(
            "execution.workers is ray, which is not installed: pip install 'ogls-sd[ray]'; or set "
            "execution.workers = local"
        )


def connect(address: str, start: bool = True) -> str:
    """Connect this process to a cluster, and return its address.

    `address` is execution.address. With auto and no running cluster, a local one is started, if `start`. Raises
    ClusterUnavailable if no cluster answers, ConfigError if it has another version of Ray or Python.
    """
    global _connected
    require_ray()
    running = _running_address() if address == "auto" else ("" if address == "local" else address)
    if not running and not start:
        raise ClusterUnavailable(
            "no Ray cluster runs on this machine, and RAY_ADDRESS is not set: a run starts a local one and ends it"
        )
    if not running or running.rpartition(":")[0] in _LOOPBACK:
        os.environ |= LOOPBACK_ONLY
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if ray.is_initialized():
        if _connected in ("", address):  # "": a test or a program that calls this package has connected
            return str(ray.get_runtime_context().gcs_address)
        ray.shutdown()
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if running:
        use_token()
    else:
        options |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    with _own_signals():
        try:
            ray.init(address=running or "local", **options)
        except ConnectionError as error:
            raise ClusterUnavailable(
                f"no Ray cluster answers at {running} ({first_line(error)}): start it (`ogls up --ray`, or `ray start "
                "--head`); if it runs and has a token, give this machine the same one (~/.ray/auth_token or "
                "RAY_AUTH_TOKEN); or set execution.address = local, which starts one for the run"
            ) from error
        except RuntimeError as error:  # Ray's own words name both versions
            raise ConfigError(f"execution.address {address}: {first_line(error)}") from error
    if not _connected:
        atexit.register(disconnect)
    _connected = address
    return str(ray.get_runtime_context().gcs_address)


def use_token() -> None:
    """Send the token of this machine, if it has one. A cluster without tokens ignores it.

    `ray start` and `ray.init` without an address use a token that exists; `ray.init` with an address does not.
    """
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]  # a compiled module

    if "RAY_AUTH_MODE" not in os.environ and AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True):
        os.environ["RAY_AUTH_MODE"] = "token"
        Config.initialize("")  # reads the variable again


def disconnect() -> None:
    """Leave the cluster; a local one that this process started ends."""
    global _connected
    if _connected:
        import ray

        ray.shutdown()
        _connected = ""


def _running_address() -> str:
    """The address in RAY_ADDRESS, or of the cluster that `ray start` started last on this machine; empty without one.

    Ray itself would also find the local cluster of another run, which ends with that run.
    """
    if given := os.environ.get("RAY_ADDRESS"):
        return given
    file = Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir()), "ray", "ray_current_cluster")
    address = file.read_text().strip() if file.is_file() else ""
    return address if accepts_connections(address) else ""  # it may have ended


def accepts_connections(address: str) -> bool:
    """Whether a process listens at `host:port`."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=3).close()
    except (OSError, ValueError):
        return False
    return True


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep the handler of SIGTERM, which ray.init replaces: Prefect and vLLM have their own."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None and signal.getsignal(signal.SIGTERM) is not before:
            signal.signal(signal.SIGTERM, before)


def live_nodes() -> list[Node]:
    """The live nodes of the connected cluster."""
    import ray

    return [
        Node(
            n["NodeID"],
            n.get("NodeManagerHostname") or n["NodeManagerAddress"],
            int(n["Resources"].get("CPU", 0)),
            int(n["Resources"].get("GPU", 0)),
        )
        for n in ray.nodes()
        if n["Alive"]
    ]


def find_room(config: RunConfig, nodes: Sequence[Node]) -> Room:
    """The devices of one worker.

    Raises ConfigError if the run wants GPUs and no node has any, or if no node has as many devices as a worker needs.
    """
    gpus = any(node.gpus for node in nodes)
    if config.model.device == "cuda" and not gpus:
        raise ConfigError(
            f"model.device is cuda, and none of the {len(nodes)} nodes of the Ray cluster has a GPU: add a node with "
            "one (`ray start --address=HEAD`), or set model.device = cpu"
        )
    kind: Kind = "GPU" if gpus and config.model.device != "cpu" else "CPU"
    parallel = config.rollout.vllm.tensor_parallel if config.rollout.engine == "vllm" and kind == "GPU" else 1
    devices = config.execution.worker_devices or parallel
    if devices < parallel:
        raise ConfigError(
            f"rollout.vllm.tensor_parallel is {parallel}, and execution.worker_devices gives a worker {devices}: set "
            f"it to {parallel}, or to 0"
        )
    largest = max(nodes, key=lambda node: node.devices(kind))
    if devices > largest.devices(kind):
        raise ConfigError(
            f"a worker needs {devices} {kind}s of one node (rollout.vllm.tensor_parallel, execution.worker_devices), "
            f"and the largest of {len(nodes)} nodes, {largest}, has {largest.devices(kind)}: lower it, or add a larger "
            "node"
        )
    return Room(kind, devices)


def first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]


def reason_of(error: BaseException) -> str:
    """What Ray says of a failure, in a line."""
    lines = [line.strip() for line in str(getattr(error, "cause", None) or error).splitlines() if line.strip()]
    last = next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "")
    return f"{type(error).__name__}: {last[:300]}"
