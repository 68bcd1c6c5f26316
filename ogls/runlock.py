"""One live process a run. On a local disk the kernel keeps the lock, so a killed holder frees it at once;
on other stores it is a lease that its holder renews and that lapses."""

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
    if other := _live_lease(store, run, mine):
        raise RunLocked(f"run {run} is held by {other}; wait for it, or {LEASE_SECONDS:g} s after it died")
    stop = threading.Event()

    def renew() -> None:
        lease = {**_about(purpose), "owner": mine, "expires": time.time() + LEASE_SECONDS}
        store.write_bytes(f"{run}/lock.json", json.dumps(lease).encode())

    def keep() -> None:
        while not stop.wait(LEASE_SECONDS / 4):
            with contextlib.suppress(StoreError):  # a missed renewal is made up for by the next
                renew()

    renew()
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
    raw = store.read_bytes(f"{run}/lock.json")
    try:
        lease = json.loads(raw or b"{}")
    except ValueError:
        return None
    live = lease.get("expires", 0) > time.time() and lease.get("owner") != mine
    return _words(raw or b"") if live else None
