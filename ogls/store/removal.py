"""Removing a whole run. A crash in the middle leaves no run and no finished stage, only files that nothing reads."""

from __future__ import annotations

import shutil

from ogls.records import TABLES
from ogls.store.run_store import RunStore

_CONTROL = ("run.json", "manifest.json", "partial.json")
_LOCKS = ("lock.json", "lease.json")


def remove_run(run: RunStore, purpose: str = "rm") -> None:
    """Remove a run with all its files. Raises RunLocked if another process holds it."""
    with run.lock(purpose):
        names = run.storage.list_files(run.name)
        # run.json first, so that it is no run; then the proofs that stages are done; then everything else.
        order = {name: index for index, name in enumerate(_CONTROL)}
        for name in sorted(names, key=lambda n: (order.get(n.rsplit("/", 1)[-1], len(order)), n)):
            if name not in _LOCKS:
                run.storage.remove(f"{run.name}/{name}")
    for name in _LOCKS:
        run.storage.remove(f"{run.name}/{name}")
    if run.storage.local:
        shutil.rmtree(f"{run.storage.path}/{run.name}", ignore_errors=True)  # its empty folders


def run_bytes(run: RunStore) -> int:
    """The bytes of all files that the manifests of a run list."""
    tables = [table.name for table in TABLES.values() if table.manifest_table == table.name]
    return sum(entry.bytes for table in tables for m in run.manifests(table) for entry in m.present_files)
