"""A lease on a run in an object store: one holder, and no write of a former holder lands.

    <root>/<run>/lease.json    epoch, holder, expiry, and `writing`: the control files that the holder may be writing

Every write of the lease is conditional: it succeeds only if the object is still the version that the writer has seen.
A process takes the run by writing the lease with the next epoch, so of several processes one succeeds. Clocks only
decide when a lease may be taken, not whether two processes hold it: a lease that has expired by the clock of this
machine is taken after it has not been renewed for longer than RENEW_SECONDS.

A conditional write of one object says nothing about another one, so a former holder that wakes up could still write a
manifest. `Lease.write`, the only way to write a control file (a manifest, partial.json, run.json), rules this out:

1. It reads the version of the file.
2. It writes the lease with `writing` = this file. This fails if the run was taken; then the holder stops.
3. It writes the file, on the condition that it is still the version of step 1.

A successor takes the lease, reads in it which file its predecessor may be writing, and rewrites that file with its own
epoch (`_seal`) before it does anything else. Let a former holder wake up at any point. Before step 2: step 2 fails,
because the lease is another version. After step 2: the successor has found the file in `writing` and sealed it, so step
3 fails; or step 3 came before the seal, and thus before the successor read anything: then the write is complete and
belongs to the predecessor. No version comes back: every control file contains the epoch of its writer, and none is
removed (`RunStore.void` empties it).

Data files are written without conditions, into a folder of the epoch (`round=003/e7/part-0000.parquet`). A former
holder can only add files to folders of its own epoch, which no manifest lists, and removes none of a later epoch.
The report page, which is made from the records, is written without a condition too.
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
from ogls.store.holder import describe_holder, parse_object
from ogls.store.storage import ObjectChanged, Storage, Tag

LEASE_SECONDS = 120.0
RENEW_SECONDS = LEASE_SECONDS / 4
_held: dict[tuple[str, str], Lease] = {}  # the leases of this process, by URL of the store and name of the run


def held_lease(storage: Storage, run: str) -> Lease | None:
    """The lease of this process on a run; None on a local disk, and if this process has not locked the run."""
    return _held.get((storage.url, run))


@contextlib.contextmanager
def hold_lease(storage: Storage, run: str, info: Mapping[str, Any]) -> Iterator[None]:
    """Hold a run while the block runs. Raises RunLocked, naming the holder, if a live process holds it."""
    lease = Lease(storage, run, info)
    lease.take()
    with lease.renewed():
        _held[storage.url, run] = lease
        try:
            yield
        finally:
            del _held[storage.url, run]


def active_lease(storage: Storage, run: str) -> bytes | None:
    """The lease of a run, if it has not expired by the clock of this machine; else None. Writes nothing."""
    raw = storage.read_bytes(f"{run}/lease.json")
    return raw if raw and _is_active(raw) else None


class Lease:
    """The lease of this process on a run."""

    def __init__(self, storage: Storage, run: str, info: Mapping[str, Any]):
        self.storage, self.run = storage, run
        self.path = f"{run}/lease.json"
        self.epoch = 0
        self._content = {**info, "holder": uuid4().hex}
        self._writing: set[str] = set()  # stays until the write has an outcome: a request may arrive late
        self._tag: Tag | None = None
        self._renewed = 0.0  # when the last renewal began, on the monotonic clock
        self._lock, self._write_lock = threading.Lock(), threading.Lock()

    def take(self) -> None:
        """Take the lease, and seal the files that the previous holder may be writing.

        Raises RunLocked if a live process holds the run, StoreError if the store ignores conditional writes.
        """
        raw, self._tag = self.storage.read_tagged(self.path)
        if raw and not _is_free(raw) and (_is_active(raw) or self._is_renewed()):
            raise self._locked()
        before = parse_object(raw or b"{}")
        self.epoch = int(before.get("epoch", 0)) + 1
        self._writing = set(before.get("writing", ()))  # in case that this process ends before it has sealed them
        try:
            self._put()
        except ObjectChanged:  # another process was faster
            raise self._locked() from None
        self.storage.require_conditions(self.path)
        for path in self._writing:
            self._seal(path)
        self._writing.clear()

    @contextlib.contextmanager
    def renewed(self) -> Iterator[None]:
        """Renew the lease while the block runs, then free it."""
        stop = threading.Event()

        def renew() -> None:
            while not stop.wait(RENEW_SECONDS):
                # `check` raises in the thread that writes; a store that does not respond may respond the next time.
                with contextlib.suppress(StoreError):
                    self._renew()

        thread = threading.Thread(target=renew, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            with contextlib.suppress(StoreError):  # it was taken, or expires
                self._renew(free=True)

    def check(self) -> None:
        """Raise RunLocked if another process has taken the run. Renews a lease whose last renewal has failed.

        Raises StoreUnavailable if it cannot be renewed.
        """
        if time.monotonic() - self._renewed > 2 * RENEW_SECONDS:
            self._renew()

    def write(self, path: str, value: Mapping[str, Any]) -> None:
        """Write a control file, stamped with the epoch, if this process still holds the run (see the module).

        `path` is relative to the run. Raises RunLocked if another process has taken the run.
        """
        full = f"{self.run}/{path}"
        with self._write_lock:
            _, tag = self.storage.read_tagged(full)
            self._writing.add(path)
            self._renew()
            try:
                self.storage.replace_bytes(full, _stamp(value, self.epoch), tag)
            except ObjectChanged:
                self._renew()  # raises if this process has lost the run
                raise StoreError(
                    f"{self.storage.url}/{full} was changed by a process that does not hold run {self.run}; end it, "
                    "then run the same command again"
                ) from None
            self._writing.discard(path)

    def _renew(self, free: bool = False) -> None:
        """Write the lease anew. Raises RunLocked if another process has taken it."""
        try:
            self._put(free)
        except ObjectChanged:
            raise self._lost() from None

    def _put(self, free: bool = False) -> None:
        """Write the next version of the lease. Raises ObjectChanged if another process has written it."""
        with self._lock:
            content = {**self._content, "epoch": self.epoch, "writing": sorted(self._writing)}
            while True:
                started = time.monotonic()
                content["expires"] = 0 if free else time.time() + LEASE_SECONDS
                content["version"] = uuid4().hex  # two versions always differ
                try:
                    self._tag = self.storage.replace_bytes(self.path, json.dumps(content).encode(), self._tag)
                    self._renewed = started
                    return
                except ObjectChanged:
                    raw, tag = self.storage.read_tagged(self.path)
                    if parse_object(raw or b"").get("holder") != self._content["holder"]:
                        raise
                    self._tag = tag  # an earlier write of this process has arrived late

    def _seal(self, path: str) -> None:
        """Rewrite a control file with the epoch of this process, which voids a write that is on its way."""
        full = f"{self.run}/{path}"
        while True:
            raw, tag = self.storage.read_tagged(full)
            with contextlib.suppress(ObjectChanged):  # that write has arrived: seal its result
                self.storage.replace_bytes(full, _stamp(parse_object(raw or b"{}"), self.epoch), tag)
                return

    def _is_renewed(self) -> bool:
        """Whether the lease that was read is renewed within 1.5 * RENEW_SECONDS."""
        deadline = time.monotonic() + 1.5 * RENEW_SECONDS
        while time.monotonic() < deadline:
            time.sleep(RENEW_SECONDS / 20)
            if self.storage.read_tagged(self.path)[1] != self._tag:
                return True
        return False

    def _locked(self) -> RunLocked:
        advice = f"wait until it ends; if it was killed, retry after {LEASE_SECONDS:g} s"
        holder = describe_holder(self.storage.read_bytes(self.path) or b"")
        return RunLocked(f"run {self.run} is held by {holder}; {advice}")

    def _lost(self) -> RunLocked:
        raw = self.storage.read_bytes(self.path) or b""
        return RunLocked(
            f"this process lost run {self.run}: it did not renew its lease in time, and {describe_holder(raw)} has "
            f"taken the run (epoch {parse_object(raw).get('epoch')}, this process had {self.epoch}); this process "
            "writes nothing more, the other one continues the run"
        )


def _stamp(value: Mapping[str, Any], epoch: int) -> bytes:
    return json.dumps({**value, "epoch": epoch}, indent=1).encode()


def _is_free(raw: bytes) -> bool:
    return parse_object(raw).get("expires") == 0


def _is_active(raw: bytes) -> bool:
    """Whether a lease expires in the future by the clock of this machine, but within LEASE_SECONDS."""
    expires = parse_object(raw).get("expires")
    return isinstance(expires, int | float) and 0 < expires - time.time() <= LEASE_SECONDS
