"""How the work of a round is spread over several devices.

The shards of sample, teach, steer and evaluate go to workers (`execution.workers = "ray"`), each with a model of its
own on its GPUs. The other stages stay in the process of the run; of these, train uses several GPUs of its node if
`train.parallel` says so.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ogls.config import RunConfig
from ogls.planning.gpus import Gpu


@dataclass(frozen=True)
class Devices:
    """Nodes with the same number of GPUs each. A CPU counts as one device."""

    gpus: int = 1  # of each node
    nodes: int = 1

    @property
    def total(self) -> int:
        """GPUs of all nodes."""
        return self.gpus * self.nodes

    def describe(self, name: str) -> str:
        """Say how many there are: h100; 4 h100; 2 nodes with 4 h100 each."""
        on_node = name if self.gpus == 1 else f"{self.gpus} {name}"
        return on_node if self.nodes == 1 else f"{self.nodes} nodes with {self.gpus} {name} each"


def resolve_engine_for(config: RunConfig, gpu: Gpu) -> str:
    """Return the engine that `rollout.engine` selects on a machine, assuming that vLLM is installed."""
    engine = config.rollout.engine
    return ("transformers" if gpu.name == "cpu" else "vllm") if engine == "auto" else engine


def engine_gpus(config: RunConfig, gpu: Gpu) -> int:
    """Return the number of GPUs that one engine is split over."""
    return config.rollout.vllm.tensor_parallel if gpu.name != "cpu" and resolve_engine_for(config, gpu) == "vllm" else 1


def worker_gpus(config: RunConfig, gpu: Gpu) -> int:
    """Return the number of GPUs of a worker (as `execution.ray_cluster.find_room`)."""
    given = config.execution.worker_devices if config.execution.workers == "ray" and gpu.name != "cpu" else 0
    return given or engine_gpus(config, gpu)


def count_workers(config: RunConfig, gpu: Gpu, devices: Devices) -> int:
    """Return the number of workers that compute shards, at least 1."""
    if config.execution.workers == "local":
        return 1
    fitting = devices.gpus // worker_gpus(config, gpu) * devices.nodes
    return max(1, min(fitting, config.execution.worker_count or fitting))


def count_training_ranks(config: RunConfig, gpu: Gpu, devices: Devices) -> int:
    """Return the number of processes that train: on the node of the run alone, each with a GPU."""
    train = config.train
    if train.parallel == "none":
        return 1
    if gpu.name == "cpu":
        return max(1, train.processes)
    return min(train.processes or devices.gpus, devices.gpus, train.batch_rollouts)


def longest_worker(shards: Sequence[float], workers: int) -> float:
    """Return the seconds until `workers` have computed all shards, each taking the next one when it is free."""
    busy = [0.0] * min(workers, len(shards))
    for seconds in shards:
        heapq.heapreplace(busy, busy[0] + seconds)
    return max(busy, default=0.0)


def device_warnings(config: RunConfig, gpu: Gpu, devices: Devices) -> Iterator[str]:
    """Say which devices the settings leave idle, and what fails on them."""
    train, per_worker, total = config.train, worker_gpus(config, gpu), devices.total
    node = f"a node has {devices.gpus}"
    if gpu.name == "cpu":
        if train.parallel != "none" and not train.processes:
            yield f"train.parallel = {train.parallel} on the CPU fails: set train.processes to the number of processes"
        return
    if engine_gpus(config, gpu) > per_worker:
        yield "execution.worker_devices is less than rollout.vllm.tensor_parallel, which fails: set it to 0"
    if per_worker > devices.gpus:
        yield (
            f"a worker needs {per_worker} GPUs of one node (rollout.vllm.tensor_parallel, execution.worker_devices), "
            f"and {node}: lower them, or plan with --gpus {per_worker}"
        )
    elif config.execution.workers == "local" and total > per_worker:
        yield (
            "execution.workers = local: the shards of sample, teach, steer and evaluate are computed on "
            f"{per_worker} of {total} GPUs; set execution.workers = ray to use all of them"
        )
    elif config.execution.workers == "ray" and (used := count_workers(config, gpu, devices) * per_worker) < total:
        yield (
            f"{total - used} of {total} GPUs compute no shards: workers have {per_worker} GPUs each, {node}, and "
            f"execution.worker_count is {config.execution.worker_count}"
        )
    if train.parallel == "none":
        return
    if train.processes > devices.gpus:
        yield f"train.processes = {train.processes} fails, because {node} GPUs: lower it"
    if (train.processes or devices.gpus) > train.batch_rollouts:
        yield (
            f"{train.processes or devices.gpus} processes train on steps of train.batch_rollouts = "
            f"{train.batch_rollouts} rollouts, which fails: lower train.processes"
        )
