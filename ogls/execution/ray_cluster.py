"""The Ray cluster of a run: connecting to it, its nodes, and how many workers they have devices for."""

from __future__ import annotations

import atexit
import logging
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

from ogls.config import RunConfig
from ogls.errors import ClusterUnavailable, ConfigError

Kind = Literal["GPU", "CPU"]
_OBJECT_STORE_BYTES = 2 * 10**8  # of a local cluster: shards go through the store of the run, not through Ray
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

    `address` is that of execution.address. With auto and no running cluster, a local one is started, if `start`.
    Raises ClusterUnavailable if no cluster answers, ConfigError if it has another version of Ray or Python.
    """
    global _connected
    require_ray()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if ray.is_initialized():
        if _connected in ("", address):  # "": the caller of this library has connected
            return str(ray.get_runtime_context().gcs_address)
        ray.shutdown()
    with _own_signals():
        try:
            if address == "local":
                _start_local()
            else:
                _join(address, start)
        except RuntimeError as error:  # Ray's own words name both versions
            raise ConfigError(f"execution.address {address}: {_first_line(error)}") from error
    if not _connected:
        atexit.register(disconnect)
    _connected = address
    return str(ray.get_runtime_context().gcs_address)


def disconnect() -> None:
    """Leave the cluster; a local one that this process started ends."""
    global _connected
    if _connected:
        import ray

        ray.shutdown()
        _connected = ""


def _join(address: str, start: bool) -> None:
    """Connect to a running cluster; start a local one if `address` is auto, none runs, and `start`."""
    import ray

    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        if address == "auto" and start and "RAY_ADDRESS" not in os.environ:
            _start_local()
            return
        where = os.environ.get("RAY_ADDRESS", "this machine") if address == "auto" else address
        raise ClusterUnavailable(
            f"no Ray cluster answers at {where} ({_first_line(error)}): start it (`ogls up --ray`, or `ray start "
            "--head`), or set execution.address = local, which starts one for the run"
        ) from error


def _start_local() -> None:
    """Start a cluster of one node on this machine, which ends with this process."""
    import ray

    ray.init(
        address="local",
        _node_ip_address="127.0.0.1",
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


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


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]
