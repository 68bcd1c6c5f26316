"""Which GPU of its machine a process uses, so that runs at the same time use different ones."""

from __future__ import annotations

import fcntl
import os
import socket
import sys
import tempfile
from itertools import count
from pathlib import Path
from typing import IO

from ogls.config import RunConfig

_taken: tuple[str, IO[str]] | None = None  # the GPU of this process, and the file whose lock says so


def visible_gpus() -> list[str]:
    """The GPUs that this process may use: those of CUDA_VISIBLE_DEVICES, or the numbers of all of the machine."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [gpu.strip() for gpu in visible.split(",") if gpu.strip() not in ("", "-1")]
    driver = Path("/proc/driver/nvidia/gpus")
    return [str(number) for number in range(len(list(driver.iterdir())))] if driver.is_dir() else []


def uses_one_gpu(config: RunConfig) -> bool:
    """Whether a run uses one device, whatever the machine has."""
    one = config.rollout.vllm.tensor_parallel == 1 or config.rollout.engine != "vllm"
    return one and config.execution.workers == "local" and config.train.parallel == "none"


def take_gpu(config: RunConfig) -> str:
    """Restrict this process and its children to one GPU of several: that which the fewest others of the user use.

    The process keeps it until it ends. Returns its id; an empty string if the run uses more than one, the machine does
    not have several, or torch has opened a GPU before.
    """
    global _taken
    if _taken:
        return _taken[0]
    gpus, torch = visible_gpus(), sys.modules.get("torch")
    if len(gpus) < 2 or not uses_one_gpu(config) or (torch and torch.cuda.is_initialized()):
        return ""
    folder = Path(tempfile.gettempdir()) / f"ogls-gpus-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    places = ((folder / f"{gpu}.{place}", gpu) for place in count() for gpu in gpus)
    _taken = next(taken for file, gpu in places if (taken := _take(file, gpu)))
    os.environ["CUDA_VISIBLE_DEVICES"] = _taken[0]
    return _taken[0]


def _take(file: Path, gpu: str) -> tuple[str, IO[str]] | None:
    """Lock a file for as long as this process lives; None if another process has locked it."""
    opened = file.open("w")
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        opened.close()
        return None
    return gpu, opened


def limits_of(limit: str) -> list[str]:
    """The concurrency limits that a stage waits for: on a machine with several GPUs, that of each GPU that it may use.

    They are named `limit`-HOST-GPU, and are created with one slot if Prefect does not have them.
    """
    gpus = [_taken[0]] if _taken else visible_gpus()
    if not _taken and len(gpus) < 2:
        return [limit]
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    names = [f"{limit}-{socket.gethostname()}-{gpu}" for gpu in gpus]
    with get_client(sync_client=True) as client:
        for name in names:
            try:
                client.read_global_concurrency_limit_by_name(name)
            except ObjectNotFound:
                client.upsert_global_concurrency_limit_by_name(name, 1)
    return names
