"""One live process a run. On a local disk the kernel keeps the lock, so a killed holder frees it at once;
on other stores it is a lease that its holder renews and that lapses.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ogls.errors import RunLocked, StoreError
from ogls.lease import lease, living, words

if TYPE_CHECKING:
    from ogls.store import Store


@contextlib.contextmanager
def hold(store: Store, run: str, purpose: str) -> Iterator[None]:
    """Hold a run while the block runs. Raises RunLocked, naming the holder, if a live process has it."""
    with _flock(store, run, purpose) if store.local else lease(store, run, _about(purpose)):
        yield


def holder(store: Store, run: str) -> str | None:
    """Who holds the run, in words; None if nobody does."""
    path = _path(store, run)
    if not store.local:
        claim = living(store, run)
        return words(claim) if claim else None
    try:
        with open(path, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return words(file.read())
    except FileNotFoundError:
        pass
    return None


def _path(store: Store, run: str) -> str:
    return f"{store.path}/{run}/lock.json"


def _about(purpose: str) -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "purpose": purpose,
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


@contextlib.contextmanager
def _flock(store: Store, run: str, purpose: str) -> Iterator[None]:
    path = _path(store, run)
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        file = open(path, "a+b")  # noqa: SIM115 - closed below, after the lock is let go
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}; set root to a folder that can be written") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise RunLocked(f"run {run} is held by {words(file.read())}; wait for it or stop it") from None
        file.truncate(0)
        file.write(json.dumps(_about(purpose)).encode())
        file.flush()
        yield
