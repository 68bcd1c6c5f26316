"""A lease on a run, for stores that have no locks and whose writes cannot be made conditional.

Every process that wants the run writes a claim and then reads the claims of the others (after Lamport's bakery
algorithm, 1974; the store must list everything written before, as S3, GCS and Azure do). Of two processes, the one that
reads last sees the other's claim, however long either paused between the two steps, so two processes never hold the
run. Among processes that do not hold it yet, the one with the smallest claim name continues and the others withdraw.

    <root>/<run>/lock/<name>.json      a claim: process, purpose, expiry, and whether the run is held

Clocks differ between machines, and jump. A claim that has expired by this machine's clock is observed for as long as a
live process takes to renew it before it is ignored. A process that pauses longer than the lease loses the run.
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
    """Hold a run while the block runs. Raises RunLocked, naming the holder, if a live process has it."""
    claim = _Claim(storage, run, info)
    claim.write()
    with claim.renewed():
        dead = claim.win()
        claim.held = True
        claim.write()
        for name in dead:
            storage.remove(f"{run}/lock/{name}")
        yield


def active_claim(storage: Storage, run: str) -> bytes | None:
    """A claim that has not expired by this machine's clock, the holder's if there is one; None if there is no such
    claim."""
    claims = [raw for raw in _claims(storage, run).values() if _is_active(raw)]
    return max(claims, key=_is_held, default=None)


class _Claim:
    """One process's claim on a run."""

    def __init__(self, storage: Storage, run: str, info: Mapping[str, Any]):
        self.storage, self.run, self.info = storage, run, info
        self.name, self.held = f"{uuid4().hex}.json", False
        self._writing = threading.Lock()

    def write(self) -> None:
        with self._writing:  # the renewing thread must not overwrite a newer state
            claim = {**self.info, "held": self.held, "expires": time.time() + LEASE_SECONDS}
            self.storage.write_bytes(f"{self.run}/lock/{self.name}", json.dumps(claim).encode())

    @contextlib.contextmanager
    def renewed(self) -> Iterator[None]:
        """Renew the claim while the block runs, then withdraw it."""
        stop = threading.Event()

        def keep() -> None:
            while not stop.wait(RENEW_SECONDS):
                with contextlib.suppress(StoreError):  # the next renewal makes up for a missed one
                    self.write()

        thread = threading.Thread(target=keep, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            self.storage.remove(f"{self.run}/lock/{self.name}")

    def win(self) -> set[str]:
        """Wait until no other live claim is left, and return the names of the dead ones.

        Raises RunLocked if another process holds the run or precedes this one."""
        dead: dict[str, bytes] = {}
        give_up = time.monotonic() + LEASE_SECONDS
        while True:
            others = {name: raw for name, raw in _claims(self.storage, self.run).items() if name != self.name}
            rivals = {name: raw for name, raw in others.items() if _is_active(raw)}
            if not rivals and (unseen := {name: raw for name, raw in others.items() if dead.get(name) != raw}):
                rivals = self._renewals(unseen)
                dead |= {name: raw for name, raw in unseen.items() if name not in rivals}
            if not rivals:
                return set(dead)
            first = max(rivals, key=lambda name: (_is_held(rivals[name]), name < self.name))
            if _is_held(rivals[first]) or first < self.name or time.monotonic() > give_up:
                advice = f"wait until it ends; if it died, retry after {LEASE_SECONDS:g} s"
                raise RunLocked(f"run {self.run} is held by {describe_holder(rivals[first])}; {advice}")
            time.sleep(RENEW_SECONDS / 20)  # a claim with a larger name withdraws, or holds the run by now

    def _renewals(self, lapsed: Mapping[str, bytes]) -> dict[str, bytes]:
        """The claims among `lapsed` that are renewed within the time that a live process needs for it."""
        deadline = time.monotonic() + 1.5 * RENEW_SECONDS
        while time.monotonic() < deadline:
            time.sleep(RENEW_SECONDS / 20)
            now = _claims(self.storage, self.run)
            if renewed := {name: now[name] for name, raw in lapsed.items() if name in now and now[name] != raw}:
                return renewed
        return {}


def _claims(storage: Storage, run: str) -> dict[str, bytes]:
    read = {name: storage.read_bytes(f"{run}/lock/{name}") for name in storage.list_names(f"{run}/lock")}
    return {name: raw for name, raw in read.items() if raw is not None}


def _is_active(raw: bytes) -> bool:
    """Whether a claim expires in the future by this machine's clock, and no later than a full lease."""
    expires = parse_holder(raw).get("expires")
    return isinstance(expires, int | float) and 0 < expires - time.time() <= LEASE_SECONDS


def _is_held(raw: bytes) -> bool:
    return bool(parse_holder(raw).get("held"))
