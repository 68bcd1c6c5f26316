"""A worker: an actor of Ray that loads a model once a run, and carries out shards of stage after stage with it."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ogls.execution.node_check import Expected, enter_folder, find_problems, require_token
from ogls.execution.work import FinishedShard, Job, Shard, ShardWork, write_shards
from ogls.records import TABLES
from ogls.store import Store
from ogls.store.writer import ShardWriter


@dataclass(frozen=True)
class WorkerFacts:
    """What a worker says of itself when it joins; `problems` are reasons why it cannot carry out shards."""

    name: str  # host/process
    node: str
    device: str
    problems: tuple[str, ...]


class Worker:
    """Carries out shards in a process of its own. Every method is called by the driver, one at a time."""

    def __init__(self, expected: Expected, threads: int):
        """`threads` is the number of threads of torch on a CPU."""
        self.expected, self.threads = expected, threads
        self.kept: dict[str, Any] = {}  # the loaded models
        self._job: Job | None = None
        self._work: ShardWork | None = None

    def join(self) -> WorkerFacts:
        """Check that this process can carry out shards of the run."""
        import ray
        import torch

        enter_folder(self.expected)
        cuda = torch.cuda.is_available()
        if not cuda:
            torch.set_num_threads(self.threads)
        name = f"{socket.gethostname()}/{os.getpid()}"
        device = torch.cuda.get_device_name(0) if cuda else f"CPU, {self.threads} threads"
        node = ray.get_runtime_context().get_node_id()
        return WorkerFacts(name, node, device, tuple(find_problems(self.expected)))

    def ping(self) -> bool:
        """Respond, if the process is alive."""
        return True

    def carry_out(self, job: Job, shards: Sequence[Shard]) -> Iterator[FinishedShard]:
        """Compute shards, and yield each when it is in the store. Writes nothing if the driver has lost the run."""
        if self._work is None or self._job is None or self._job.id != job.id:
            self.rest()
            self._work, self._job = job.open_work(job.config, job.round, self.kept), job
        records = Store(job.config.root).run(job.config.name)
        writer = ShardWriter(records, TABLES[job.table], job.round, job.epoch)
        started = time.perf_counter()
        for finished in write_shards(self._work, writer, shards, before_write=lambda: require_token(self.expected)):
            yield replace(finished, seconds=time.perf_counter() - started)
            started = time.perf_counter()

    def rest(self) -> None:
        """Release memory after a stage; the models are kept."""
        if self._work is not None:
            self._work.close()
        self._work = self._job = None


def check_node(expected: Expected) -> list[str]:
    """Why the node on which this runs cannot carry out shards of the run (see `find_problems`)."""
    enter_folder(expected)
    return find_problems(expected)
