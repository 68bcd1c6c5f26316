"""The workers of a run on a Ray cluster, and what happens when one of them dies.

A worker is an actor that stays until the process that holds the run (the driver) ends, because its model stays loaded
between stages and rounds; Ray Data's pools of actors end with every execution. Ray places the actors and says when one
has died. What is done then is decided here: with Ray's own restarts, a call waits for ever when no node has room. A
shard of a dead worker goes to another one, at most three times. A worker has one shard at a time, or several where its
engine decodes them together. A worker that is only cut off, and still writes its shard, writes the same bytes; only the
rounding of an engine that decodes shards together may differ, and then the checksum of the shard says so.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ogls.errors import ClusterUnavailable, StoreError, UserError
from ogls.execution.node_check import Expected, remove_token
from ogls.execution.ray_cluster import connect, find_room, live_nodes, reason_of
from ogls.execution.ray_nodes import require_usable
from ogls.execution.ray_worker import Worker, WorkerFacts
from ogls.execution.work import FinishedShard, Job, Shard

Notice = Callable[[str], None]
_FIRST_PART = 0.75  # of its share of the shards, for a worker that gets several at once; the rest balances the workers
_ATTEMPTS = 4  # at one shard: the first, and three after the death of a worker
_START_ATTEMPTS = 3  # failed starts of workers in a row
_LOOK_SECONDS = 1.0  # between two looks at the nodes of the cluster
_REST_SECONDS = 120.0  # for a worker to release its memory


@dataclass
class _Member:
    """A worker of the pool; `facts` are known when it has joined."""

    actor: Any
    facts: WorkerFacts | None = None
    shards: list[Shard] = field(default_factory=list)  # that it has and that are not finished

    def __str__(self) -> str:
        return self.facts.name if self.facts else "a worker that had not started"


class RayPool:
    """The workers of one run. Only one stage uses it at a time."""

    def __init__(self, expected: Expected):
        """Connect to the cluster, and check that every node of it can carry out shards.

        Raises ClusterUnavailable, ConfigError or StoreError, which names the nodes.
        """
        self.expected = expected
        execution = expected.config.execution
        self.address = connect(execution.address)
        nodes = live_nodes()
        self.room = find_room(expected.config, nodes)
        self.limit = execution.worker_count
        self._idle: list[_Member] = []
        self._busy: dict[Any, _Member] = {}  # by the generator of its finished shards
        self._starting: dict[Any, _Member] = {}
        self._refused: dict[str, str] = {}  # by node: why it cannot carry out shards; it joined after the check
        self._deaths: Counter[tuple[bool, int]] = Counter()  # workers that each shard of the stage has lost
        self._failed_starts = 0
        self._looked = self._had_worker = 0.0
        self._notice: Notice = lambda _: None
        try:
            require_usable(expected, nodes)
        except UserError:
            remove_token(expected)
            raise

    def carry_out(self, job: Job, shards: Sequence[Shard], notice: Notice) -> Iterator[FinishedShard]:
        """Yield each shard when it is in the store, in any order. `notice` is told what happens to workers.

        Raises what a shard raises, and ClusterUnavailable if no worker is left for longer than
        execution.worker_start_seconds, or if a shard has lost four workers.
        """
        import ray

        self._notice, self._had_worker, self._looked = notice, time.monotonic(), 0.0
        waiting, self._deaths = deque(shards), Counter()
        self._drop_dead()
        try:
            while waiting or self._busy:
                self._start_workers(len(waiting))
                self._deal(job, waiting)
                self._require_worker()
                references = [*self._busy, *self._starting]
                ready, _ = ray.wait(references, timeout=_LOOK_SECONDS) if references else ([], [])
                if not references:
                    time.sleep(_LOOK_SECONDS)
                for reference in ready:
                    if reference in self._starting:
                        self._welcome(reference)
                        continue
                    finished = self._next(reference)
                    if finished is None:
                        waiting.extendleft(reversed(self._busy.pop(reference).shards))
                        continue
                    if not self._busy[reference].shards:
                        self._idle.append(self._busy.pop(reference))
                        self._deal(job, waiting)  # the worker goes on while the driver records the shard
                    yield finished
            self._rest()
        finally:  # after an error, nothing of this attempt is written any more
            for member in self._busy.values():
                self._end(member)
            self._busy.clear()

    def await_workers(self, count: int) -> None:
        """Start workers before there are shards, and wait until `count` have joined (fewer if no node has room)."""
        import ray

        self._had_worker = time.monotonic()
        while len(self.members) < min(count, self.room.workers(live_nodes())):
            self._start_workers(count)
            for reference in ray.wait([*self._starting], timeout=_LOOK_SECONDS)[0]:
                self._welcome(reference)

    def close(self) -> None:
        """End all workers. A local cluster ends with this process."""
        for member in [*self._idle, *self._busy.values(), *self._starting.values()]:
            self._end(member)
        self._idle, self._busy, self._starting = [], {}, {}
        with contextlib.suppress(StoreError):  # a token that stays does no harm
            remove_token(self.expected)

    @property
    def members(self) -> list[WorkerFacts]:
        """The workers that have joined."""
        return [m.facts for m in (*self._idle, *self._busy.values()) if m.facts]

    def _start_workers(self, waiting: int) -> None:
        """Start workers while the cluster has devices for more of them, and shards are left for them."""
        if time.monotonic() - self._looked < _LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        room = self.room.workers([n for n in live_nodes() if n.id not in self._refused])
        wanted = min(room, self.limit or room, waiting + len(self._busy))
        for _ in range(wanted - len(self._idle) - len(self._busy) - len(self._starting)):
            member = _Member(self._start())
            self._starting[member.actor.join.remote()] = member

    def _start(self) -> Any:
        """A new actor. Ray chooses the node, and waits until it has room."""
        import ray

        devices = self.room.devices
        options: dict[str, Any] = {"num_gpus": devices} if self.room.kind == "GPU" else {"num_cpus": devices}
        if self._refused:
            options["label_selector"] = {"ray.io/node-id": f"!in({','.join(self._refused)})"}
        return ray.remote(Worker).options(max_restarts=0, **options).remote(self.expected, devices)

    def _welcome(self, reference: Any) -> None:
        """Take in a worker that has started, unless it cannot carry out shards."""
        import ray

        member = self._starting.pop(reference)
        try:
            facts: WorkerFacts = ray.get(reference)
        except ray.exceptions.RayError as error:
            self._end(member)
            self._failed_starts += 1
            if self._failed_starts >= _START_ATTEMPTS:
                raise ClusterUnavailable(
                    f"{self._failed_starts} workers in a row died at their start; the last: {reason_of(error)}"
                ) from error
            return
        if facts.problems:
            self._end(member)
            if facts.node not in self._refused:
                self._refused[facts.node] = facts.problems[0]
                self._notice(f"a node that has joined carries out no shards: {facts.name}: {facts.problems[0]}")
            return
        others = {f.device for f in self.members} - {facts.device}
        if others:
            self._notice(
                f"workers run on {facts.device} and on {', '.join(sorted(others))}: results are the same bits only on "
                "one kind of device"
            )
        member.facts, self._failed_starts = facts, 0
        self._idle.append(member)

    def _deal(self, job: Job, waiting: deque[Shard]) -> None:
        """Give every idle worker a shard, or a part of its share if its engine decodes several together.

        A shard that has lost a worker is given out alone, so that it takes no others with it.
        """
        share = len(waiting) / max(len(self.members) + len(self._starting), 1)
        count = math.ceil(_FIRST_PART * share) if job.together else 1
        while waiting and self._idle:
            member = self._idle.pop(0)
            member.shards = [waiting.popleft()]
            while (
                waiting
                and len(member.shards) < count
                and not self._deaths.keys() & {member.shards[0].key, waiting[0].key}
            ):
                member.shards.append(waiting.popleft())
            call = member.actor.carry_out.options(num_returns="streaming")
            self._busy[call.remote(job, member.shards)] = member

    def _next(self, generator: Any) -> FinishedShard | None:
        """The next finished shard of a worker; None if it has died. Raises what a shard has raised."""
        import ray

        member = self._busy[generator]
        try:
            finished: FinishedShard = ray.get(next(generator))
        except ray.exceptions.RayTaskError as error:
            self._idle.append(self._busy.pop(generator))
            if isinstance(error.cause, UserError):
                raise error.cause from None
            raise
        except ray.exceptions.RayError as error:  # the worker, its node, or the result is lost
            self._end(member)
            keys = [shard.key for shard in member.shards]
            self._deaths.update(keys)
            numbers = [f"{index} of the next round" if ahead else str(index) for ahead, index in keys]
            listed = f"shard{'s' * (len(numbers) > 1)} {', '.join(numbers)}"
            found = f"{listed}: {member} was lost ({reason_of(error)})"
            if any(self._deaths[key] >= _ATTEMPTS for key in keys):
                raise ClusterUnavailable(
                    f"{found}; it was the worker number {_ATTEMPTS} that this shard has lost. If they ran out of "
                    "memory, lower the batch size of the stage (of the next round: rollout.batch_size), or give a "
                    "worker more room (execution.worker_devices)"
                ) from error
            self._notice(f"{found}; {'they go' if len(numbers) > 1 else 'the shard goes'} to another worker")
            return None
        member.shards = [shard for shard in member.shards if shard.key != finished.key]
        return replace(finished, worker=str(member), device=member.facts.device if member.facts else "")

    def _require_worker(self) -> None:
        """Raise ClusterUnavailable if there has been no worker for too long."""
        if self._busy or self._idle:
            self._had_worker = time.monotonic()
            return
        limit = self.expected.config.execution.worker_start_seconds
        if time.monotonic() - self._had_worker > limit:
            import ray

            kind, nodes = self.room.kind, live_nodes()
            total, free = sum(n.devices(kind) for n in nodes), int(ray.available_resources().get(kind, 0))
            refused = "".join(f"; {reason}" for reason in self._refused.values())
            raise ClusterUnavailable(
                f"no worker has started within {limit:g} s: a worker needs {self.room.devices} {kind}s of one node, "
                f"and of {total} in {len(nodes)} nodes {free} are free{refused}; wait until other runs end, add nodes, "
                "or raise execution.worker_start_seconds"
            )

    def _drop_dead(self) -> None:
        """Drop workers that have died since the last stage."""
        import ray

        pings = {member.actor.ping.remote(): member for member in self._idle}
        answered, silent = ray.wait([*pings], num_returns=len(pings), timeout=_REST_SECONDS) if pings else ([], [])
        for reference in answered:
            try:
                ray.get(reference)
            except ray.exceptions.RayError as error:
                self._lose(pings[reference], reason_of(error))
        for reference in silent:
            self._lose(pings[reference], f"did not answer within {_REST_SECONDS:g} s")

    def _rest(self) -> None:
        """Let all workers release their memory: the driver may use the same devices in the next stage."""
        import ray

        rests = {member.actor.rest.remote(): member for member in self._idle}
        if rests:
            ray.wait([*rests], num_returns=len(rests), timeout=_REST_SECONDS)
        self._drop_dead()

    def _lose(self, member: _Member, reason: str) -> None:
        self._end(member)
        self._idle.remove(member)
        self._notice(f"{member} was lost between two shards ({reason})")

    def _end(self, member: _Member) -> None:
        """End the process of a worker, if it still runs."""
        import ray

        with contextlib.suppress(Exception):  # it has ended, or the cluster has
            ray.kill(member.actor, no_restart=True)
