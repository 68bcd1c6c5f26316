"""One live process a run. On a local disk the kernel keeps the lock, so a killed holder frees it at once;
on other stores it is a lease that its holder renews and that lapses.

Clocks differ between machines, and jump: a lease that has lapsed by this machine's clock is watched for as long as
a living holder takes to renew it before it is taken over.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ogls.errors import RunLocked, StoreError

if TYPE_CHECKING:
    from ogls.store import Store

LEASE_SECONDS = 120.0
RENEW_SECONDS = LEASE_SECONDS / 4
SETTLE_SECONDS = 1.0  # two who ask at once have both written by then, and see whose write was last


@contextlib.contextmanager
def hold(store: Store, run: str, purpose: str) -> Iterator[None]:
    """Hold a run while the block runs. Raises RunLocked, naming the holder, if a live process has it."""
    with _flock(store, run, purpose) if store.local else _lease(store, run, purpose):
        yield


def holder(store: Store, run: str) -> str | None:
    """Who holds the run, in words; None if nobody does."""
    path = _path(store, run)
    if not store.local:
        return _live_lease(store, run, mine="")
    try:
        with open(path, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return _words(file.read())
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


def _words(raw: bytes) -> str:
    try:
        about = json.loads(raw)
        return f"process {about['pid']} on {about['host']} ({about['purpose']}, since {about['since']})"
    except (ValueError, KeyError):
        return "another process"


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
            raise RunLocked(f"run {run} is held by {_words(file.read())}; wait for it or stop it") from None
        file.truncate(0)
        file.write(json.dumps(_about(purpose)).encode())
        file.flush()
        yield


@contextlib.contextmanager
def _lease(store: Store, run: str, purpose: str) -> Iterator[None]:
    mine = f"{socket.gethostname()}-{os.getpid()}-{time.monotonic_ns()}"
    if other := _live_lease(store, run, mine) or _renewed(store, run):
        raise RunLocked(f"run {run} is held by {other}; wait for it, or {LEASE_SECONDS:g} s after it died")
    stop = threading.Event()

    def renew() -> None:
        lease = {**_about(purpose), "owner": mine, "expires": time.time() + LEASE_SECONDS}
        store.write_bytes(f"{run}/lock.json", json.dumps(lease).encode())

    def keep() -> None:
        while not stop.wait(RENEW_SECONDS):
            with contextlib.suppress(StoreError):  # a missed renewal is made up for by the next
                renew()

    renew()
    time.sleep(SETTLE_SECONDS)
    if other := _live_lease(store, run, mine):  # two asked at once: whoever wrote last has it
        raise RunLocked(f"run {run} is held by {other}")
    thread = threading.Thread(target=keep, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        store.remove(f"{run}/lock.json")


def _live_lease(store: Store, run: str, mine: str) -> str | None:
    """Who holds a lease that has not lapsed by this machine's clock."""
    raw = store.read_bytes(f"{run}/lock.json") or b"{}"
    left, owner = _left(raw)
    return _words(raw) if owner != mine and 0 < left <= LEASE_SECONDS else None


def _renewed(store: Store, run: str) -> str | None:
    """Who renews the lease that lies there, lapsed or from a clock ahead of this one; None if nobody does."""
    raw = store.read_bytes(f"{run}/lock.json")
    deadline = time.monotonic() + 1.5 * RENEW_SECONDS
    while raw and time.monotonic() < deadline:
        time.sleep(RENEW_SECONDS / 20)
        now = store.read_bytes(f"{run}/lock.json")
        if now != raw:
            return _words(now) if now else None
    return None


def _left(raw: bytes) -> tuple[float, str]:
    """Seconds that a lease has left, and whose it is."""
    try:
        lease = json.loads(raw)
        return float(lease["expires"]) - time.time(), str(lease["owner"])
    except (ValueError, KeyError, TypeError):
        return 0.0, ""
