"""A lease on a run, for stores that have no locks and whose writes cannot be made conditional.

Each who asks writes a claim of its own, and then looks at the others' (after Lamport's bakery, 1974; the store must
list what was written before, as S3, GCS and Azure do). Of two, whoever looks last sees the other's claim, however
long either was stalled between its steps, so that never both hold the run. Of several who only ask, the least
name goes on and the others withdraw.

    <root>/<run>/lock/<name>.json      a claim: who, for what, until when, and whether it is held or asked for

Clocks differ between machines, and jump: a claim that has lapsed by this machine's clock is watched for as long as
a living process takes to renew it before it counts for nothing. Whoever is stalled for longer than that loses
the run, as with every lease.
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
    """A claim that has not lapsed by this machine's clock: the holder's if there is one."""
    claims = [raw for raw in _claims(storage, run).values() if _is_active(raw)]
    return max(claims, key=_is_held, default=None)


class _Claim:
    """One process's claim on a run."""

    def __init__(self, storage: Storage, run: str, info: Mapping[str, Any]):
        self.storage, self.run, self.info = storage, run, info
        self.name, self.held = f"{uuid4().hex}.json", False
        self._writing = threading.Lock()

    def write(self) -> None:
        with self._writing:  # the thread that renews must not write what was so before
            claim = {**self.info, "held": self.held, "expires": time.time() + LEASE_SECONDS}
            self.storage.write_bytes(f"{self.run}/lock/{self.name}", json.dumps(claim).encode())

    @contextlib.contextmanager
    def renewed(self) -> Iterator[None]:
        """Renew the claim while the block runs, then withdraw it."""
        stop = threading.Event()

        def keep() -> None:
            while not stop.wait(RENEW_SECONDS):
                with contextlib.suppress(StoreError):  # a missed renewal is made up for by the next
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
        """Wait until no other living claim stands; the dead ones' names. Raises RunLocked if another goes first."""
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
                free = f"wait for it, or {LEASE_SECONDS:g} s after it died"
                raise RunLocked(f"run {self.run} is held by {describe_holder(rivals[first])}; {free}")
            time.sleep(RENEW_SECONDS / 20)  # a greater name that asks withdraws, or holds the run by now

    def _renewals(self, lapsed: Mapping[str, bytes]) -> dict[str, bytes]:
        """Which of these claims are renewed while a living process would have renewed them."""
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
    """Whether a claim has seconds left by this machine's clock, and no more than anyone is given."""
    expires = parse_holder(raw).get("expires")
    return isinstance(expires, int | float) and 0 < expires - time.time() <= LEASE_SECONDS


def _is_held(raw: bytes) -> bool:
    return bool(parse_holder(raw).get("held"))
