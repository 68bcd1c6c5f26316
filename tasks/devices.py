"""Which GPU of its machine a process uses, so that runs at the same time use different ones."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import IO, Any

from ogls.config import RunConfig

_VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass
class _Taken:
    """The GPU of this process, the file whose lock says so to others, and what the process could see before."""

    gpu: str
    file: IO[str]
    visible_before: str | None


_taken: _Taken | None = None


@cache
def machine_gpus() -> list[str]:
    """The numbers of the GPUs of the machine, without starting CUDA in this process."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    listed = subprocess.run([command, "-L"], capture_output=True, text=True, check=False).stdout
    return [str(number) for number, line in enumerate(line for line in listed.splitlines() if line.startswith("GPU "))]


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; without it, all of the machine."""
    visible = os.environ.get(_VISIBLE)
    if visible is None:
        return machine_gpus()
    return [gpu.strip() for gpu in visible.split(",") if gpu.strip() not in ("", "-1")]


def uses_one_gpu(config: RunConfig) -> bool:
    """Whether a run uses one GPU, however many the machine has."""
    one_engine = config.rollout.vllm.tensor_parallel == 1 or config.rollout.engine in ("transformers", "server")
    local = config.execution.workers == "local" and config.train.parallel == "none"
    return config.model.device != "cpu" and one_engine and local


def take_gpu(config: RunConfig) -> str:
    """Restrict this process and its children to one GPU of several: one that the fewest runs of this user have taken.

    The process keeps it until it ends, or carries out a run that uses several. Returns the id of the GPU; an empty
    string if the run does not use exactly one, the machine does not have several, or torch has opened a GPU before.
    """
    global _taken
    if not uses_one_gpu(config):
        _give_back()
        return ""
    if _taken:
        return _taken.gpu
    gpus, torch = visible_gpus(), sys.modules.get("torch")
    if len(gpus) < 2 or (torch and torch.cuda.is_initialized()):
        return ""
    folder = Path(tempfile.gettempdir()) / f"ogls-gpus-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    with (folder / "choice").open("w") as choice:
        fcntl.flock(choice, fcntl.LOCK_EX)
        gpu = min(gpus, key=lambda gpu: sum(_lock(file) is None for file in folder.glob(f"{gpu}.*")))
        file = next(locked for n in count() if (locked := _lock(folder / f"{gpu}.{n}")))  # one file for each run on it
    _taken = _Taken(gpu, file, os.environ.get(_VISIBLE))
    os.environ[_VISIBLE] = gpu
    return gpu


def _lock(path: Path) -> IO[str] | None:
    """Lock a file for as long as it is open; None if another process has locked it."""
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def _give_back() -> None:
    """See all GPUs again, in processes that are started from now on."""
    global _taken
    if _taken:
        _taken.file.close()
        os.environ.pop(_VISIBLE)
        if _taken.visible_before is not None:
            os.environ[_VISIBLE] = _taken.visible_before
        _taken = None


def limits_of(limit: str) -> list[str]:
    """The concurrency limits that a stage waits for: on a machine with several GPUs, that of each GPU that it may use.

    They are named `limit`-HOST-GPU, and are created with one slot if Prefect does not have them.
    """
    gpus = visible_gpus()
    if len(gpus) < 2 and len(machine_gpus()) < 2:
        return [limit]
    from prefect.client.orchestration import get_client

    names = [f"{limit}-{socket.gethostname()}-{gpu}" for gpu in gpus]
    with get_client(sync_client=True) as client:
        for name in names:
            create_limit(client, name)
    return names


def create_limit(client: Any, name: str) -> None:
    """Create a concurrency limit with one slot, unless it exists: a limit that was raised is kept."""
    from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

    try:
        client.read_global_concurrency_limit_by_name(name)
    except ObjectNotFound:
        with suppress(ObjectAlreadyExists):  # another process was faster
            client.upsert_global_concurrency_limit_by_name(name, 1)
