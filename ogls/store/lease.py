"""A lease on a run, for stores that have no locks and whose writes cannot be made conditional.

Every process that requests the run writes a claim and then reads the claims of the others (after Lamport's bakery
algorithm, 1974; a list must return everything written before, as on S3, GCS and Azure). Of two processes, the one that
reads last sees the claim of the other, even after a long pause between the two steps, so two processes never hold the
run. Among processes that do not hold it yet, the one with the smallest claim name continues and the others withdraw.

    <root>/<run>/lock/<name>.json      a claim: process, purpose, expiry, and whether the run is held

Clocks differ between machines and can jump. So a claim that has expired by the clock of this machine is ignored only
after it has not been renewed for longer than RENEW_SECONDS. A process that pauses longer than the lease loses the run.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any
from uuid import uuid4

from ogls.errors import RunLocked, StoreError
from ogls.store.holder import describe_holder, parse_holder
from ogls.store.storage import Storage

LEASE_SECONDS = 120.0
RENEW_SECONDS = LEASE_SECONDS / 4


@contextlib.contextmanager
def hold_lease(storage: Storage, run: str, info: Mapping[str, Any]) -> Iterator[None]:
    """Hold a run while the block runs. Raises RunLocked, naming the holder, if a live process holds it."""
    claim = _Claim(storage, run, info)
    claim.write()
    with claim.renewed():
        dead = claim.wait_for_rivals()
        claim.held = True
        claim.write()
        for name in dead:
            storage.remove(f"{run}/lock/{name}")
        yield


def active_claim(storage: Storage, run: str) -> bytes | None:
    """A claim that has not expired by the clock of this machine, if possible that of the holder; None without one."""
    claims = [raw for raw in _claims(storage, run).values() if _is_active(raw)]
    return max(claims, key=_is_held, default=None)


class _Claim:
    """The claim of this process on a run."""

    def __init__(self, storage: Storage, run: str, info: Mapping[str, Any]):
        self.storage, self.run, self.info = storage, run, info
        self.name, self.held = f"{uuid4().hex}.json", False
        self._writing = threading.Lock()

    def write(self) -> None:
        with self._writing:  # so that the renewing thread never overwrites a newer claim
            claim = {**self.info, "held": self.held, "expires": time.time() + LEASE_SECONDS}
            self.storage.write_bytes(f"{self.run}/lock/{self.name}", json.dumps(claim).encode())

    @contextlib.contextmanager
    def renewed(self) -> Iterator[None]:
        """Renew the claim while the block runs, then withdraw it."""
        stop = threading.Event()

        def renew() -> None:
            while not stop.wait(RENEW_SECONDS):
                with contextlib.suppress(StoreError):  # a lease outlasts several missed renewals
                    self.write()

        thread = threading.Thread(target=renew, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            self.storage.remove(f"{self.run}/lock/{self.name}")

    def wait_for_rivals(self) -> set[str]:
        """Wait until no other claim is live. Returns the names of the dead claims.

        Raises RunLocked if another process holds the run or has a smaller claim name, or after LEASE_SECONDS.
        """
        dead: dict[str, bytes] = {}
        deadline = time.monotonic() + LEASE_SECONDS
        while True:
            others = {name: raw for name, raw in _claims(self.storage, self.run).items() if name != self.name}
            rivals = {name: raw for name, raw in others.items() if _is_active(raw)}
            if not rivals and (expired := {name: raw for name, raw in others.items() if dead.get(name) != raw}):
                rivals = self._find_renewed(expired)
                dead |= {name: raw for name, raw in expired.items() if name not in rivals}
            if not rivals:
                return set(dead)
            first = max(rivals, key=lambda name: (_is_held(rivals[name]), name < self.name))
            if _is_held(rivals[first]) or first < self.name or time.monotonic() > deadline:
                advice = f"wait until it ends; if it was killed, retry after {LEASE_SECONDS:g} s"
                raise RunLocked(f"run {self.run} is held by {describe_holder(rivals[first])}; {advice}")
            time.sleep(RENEW_SECONDS / 20)  # the owner of a larger name withdraws, or already holds the run

    def _find_renewed(self, expired: Mapping[str, bytes]) -> dict[str, bytes]:
        """The first claims of `expired` that are renewed within 1.5 * RENEW_SECONDS; empty if all are dead."""
        deadline = time.monotonic() + 1.5 * RENEW_SECONDS
        while time.monotonic() < deadline:
            time.sleep(RENEW_SECONDS / 20)
            current = _claims(self.storage, self.run)
            if renewed := {name: current[name] for name, raw in expired.items() if current.get(name, raw) != raw}:
                return renewed
        return {}


def _claims(storage: Storage, run: str) -> dict[str, bytes]:
    read = {name: storage.read_bytes(f"{run}/lock/{name}") for name in storage.list_names(f"{run}/lock")}
    return {name: raw for name, raw in read.items() if raw is not None}


def _is_active(raw: bytes) -> bool:
    """Whether a claim expires in the future by the clock of this machine, but within LEASE_SECONDS."""
    expires = parse_holder(raw).get("expires")
    return isinstance(expires, int | float) and 0 < expires - time.time() <= LEASE_SECONDS


def _is_held(raw: bytes) -> bool:
    return bool(parse_holder(raw).get("held"))
