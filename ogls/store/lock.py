"""The lock of a run: only one live process holds it.

On a local disk it is an flock, which the kernel releases when its holder ends or is killed. In an object store it is a
lease, which its holder renews and which expires.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import time
from collections.abc import Iterator
from typing import IO

from ogls.errors import RunLocked, StoreError
from ogls.store.holder import describe_holder, holder_info
from ogls.store.lease import active_lease, hold_lease
from ogls.store.storage import Storage


@contextlib.contextmanager
def hold_run(storage: Storage, run: str, purpose: str) -> Iterator[None]:
    """Hold a run while the block runs. Raises RunLocked, naming the holder, if a live process holds it."""
    with _flock(storage, run, purpose) if storage.local else hold_lease(storage, run, holder_info(purpose)):
        yield


def find_holder(storage: Storage, run: str) -> str | None:
    """The process that holds the run, as one line; None if the run is free."""
    if not storage.local:
        lease = active_lease(storage, run)
        return describe_holder(lease) if lease else None
    try:
        with open(_lock_path(storage, run), "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return describe_holder(file.read())
    except FileNotFoundError:
        pass
    return None


def _lock_exclusively(file: IO[bytes]) -> bool:
    """Lock the file, unless a process holds it. `find_holder` locks it for a moment to look: that is waited for."""
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return False  # held exclusively
            fcntl.flock(file, fcntl.LOCK_UN)
            time.sleep(random.uniform(0.001, 0.01))


def _lock_path(storage: Storage, run: str) -> str:
    return f"{storage.path}/{run}/lock.json"


@contextlib.contextmanager
def _flock(storage: Storage, run: str, purpose: str) -> Iterator[None]:
    path = _lock_path(storage, run)
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        file = open(path, "a+b")  # noqa: SIM115 - closed below, after the lock is released
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}; set root to a folder that can be written") from error
    with file:
        if not _lock_exclusively(file):
            file.seek(0)
            raise RunLocked(f"run {run} is held by {describe_holder(file.read())}; wait for it or stop it")
        file.truncate(0)
        file.write(json.dumps(holder_info(purpose)).encode())
        file.flush()
        yield
