"""Starts the ranks of a training stage in processes of their own, and watches over them.

The ranks form a process group (gloo on the CPU, nccl and gloo on GPUs), which they find through a file in a temporary
folder, so no port is opened for it. The parent receives what they report. The first rank that fails or dies ends all:
the others wait for it in a collective operation for ever.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from ogls.errors import RankDied, UserError

# Called in every rank: (rank, number of ranks, report) -> result. `report` sends a value to the parent.
Job = Callable[[int, int, Callable[[Any], None]], Any]

_COLLECTIVE = timedelta(hours=6)  # the longest time that a rank waits for the others; the parent notices a dead one
_GRACE_SECONDS = 2.0  # after an error of one rank: time in which the death of another, its cause, is noticed


def run_ranks(job: Job, size: int, device: str, receive: Callable[[Any], None] = lambda value: None) -> list[Any]:
    """Run `job` in `size` processes, each with its own device (`cpu` or `cuda`). Return their results, by rank.

    `receive` is called with each value that a rank reports. A UserError of a rank is raised as it is. Raises RankDied
    if a rank ends without a result, RuntimeError with its traceback if it raises another exception. When this function
    ends, so have all ranks.
    """
    context = get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="ogls-ranks-") as folder:
        connections, processes = [], []
        try:
            for rank in range(size):
                connection, child_end = context.Pipe()
                arguments = (job, rank, size, device, Path(folder, "group"), child_end)
                process = context.Process(target=_serve, args=arguments, name=f"rank {rank}", daemon=True)
                process.start()
                child_end.close()  # so that the end of the process closes the pipe
                connections.append(connection)
                processes.append(process)
            return _collect(connections, processes, receive)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()


def _collect(connections: list[Connection], processes: list[Any], receive: Callable[[Any], None]) -> list[Any]:
    """Receive from the ranks until each has sent its result."""
    size, results = len(processes), dict[int, Any]()
    while len(results) < size:
        open_ = {connections[rank]: rank for rank in range(size) if rank not in results}
        for connection in wait(list(open_)):
            rank = open_[connection]  # type: ignore[index]
            try:
                kind, value = connections[rank].recv()
            except (EOFError, OSError):
                raise _death(rank, processes) from None
            if kind == "report":
                receive(value)
            elif kind == "result":
                results[rank] = value
            else:
                _raise_error(rank, value, processes)
    return [results[rank] for rank in range(size)]


def _raise_error(rank: int, value: Exception | str, processes: list[Any]) -> None:
    """Raise the error of a rank, or the death of another rank that it follows from."""
    if isinstance(value, UserError):
        raise value
    wait([process.sentinel for process in processes], _GRACE_SECONDS)  # a rank that reports an error does not end
    dead = [other for other, process in enumerate(processes) if process.exitcode is not None]
    if dead:
        raise _death(dead[0], processes)
    raise RuntimeError(
        f"rank {rank} of {len(processes)} of the training failed; nothing of this stage is saved\n{value}"
    )


def _death(rank: int, processes: list[Any]) -> RankDied:
    """The error of a rank that has ended."""
    processes[rank].join(_GRACE_SECONDS)
    code = processes[rank].exitcode
    how = f"was killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended with code {code}"
    hint = "; the system kills processes when memory runs out: lower train.micro_batch_tokens or train.processes"
    return RankDied(
        f"rank {rank} of {len(processes)} of the training {how}{hint if code == -9 else ''}. Nothing of this stage is "
        "saved, except for checkpoints (train.checkpoint_steps); run the same command again"
    )


def _serve(job: Job, rank: int, size: int, device: str, group: Path, connection: Connection) -> None:
    """Run the job in this process, as one rank, and send its result or its error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends this process
    threading.Thread(target=_end_with_parent, args=(connection,), daemon=True).start()
    try:
        _join_group(rank, size, device, group)
        result = job(rank, size, lambda value: connection.send(("report", value)))
        connection.send(("result", result))
    except Exception as error:
        connection.send(("error", error if _is_sendable(error) else traceback.format_exc()))
    # The parent ends this process: if it ended by itself after an error, the others would fail too, and in their
    # errors its own would be hard to find.
    while True:
        time.sleep(3600)


def _end_with_parent(connection: Connection) -> None:
    """End this process when the parent has ended, however it did."""
    try:
        connection.recv()  # the parent sends nothing: this returns when the pipe is closed
    except (EOFError, OSError):
        os._exit(1)


def _join_group(rank: int, size: int, device: str, group: Path) -> None:
    """Join the process group of the ranks, over the loopback interface."""
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), "lo")
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, loopback)
    import torch
    import torch.distributed as dist

    if device == "cuda":
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // size))  # the ranks share the cores
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, f"file://{group}", _COLLECTIVE, size, rank)


def _is_sendable(error: Exception) -> bool:
    """Whether an error is for the user and arrives in another process as it is."""
    try:
        return isinstance(error, UserError) and str(pickle.loads(pickle.dumps(error))) == str(error)
    except Exception:  # whatever a class of somebody else's raises when it is pickled
        return False
