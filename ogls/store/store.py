"""The runs under one root.

    <root>/<run>/<table>/round=003/part-0000.parquet    shards, written to a temporary name and renamed
    <root>/<run>/<table>/round=003/manifest.json        written last: the only proof that a stage is done
    <root>/<run>/<table>/round=003/partial.json         the finished shards of a stage that is running
    <root>/<run>/ahead/round=004/                       rollouts of the next round, sampled beside an evaluation

`root` is a directory or the URL of an object store. Object stores write an object completely or not at all, so they
need no rename; there, shards are in a folder of the epoch of their writer (`round=003/e7/part-0000.parquet`).
"""

from __future__ import annotations

import os

from ogls.errors import StoreError
from ogls.store.run_store import RunStore
from ogls.store.storage import Storage


def existing_store(root: str) -> Store:
    """The store at `root`, to read from. Raises StoreError if there is nothing, as for a mistyped root."""
    store = Store(root)
    if not store.storage.list_names("") and not (store.storage.local and os.path.isdir(store.storage.path)):
        raise StoreError(f"no store at {store.storage.url}; give --root, or train a run first")
    return store


class Store:
    """All runs under one root. Raises ConfigError if `root` is a URL that is not supported."""

    def __init__(self, root: str):
        self.root = root
        self.storage = Storage(root)

    def run(self, name: str) -> RunStore:
        """The folder of one run. The run does not have to exist."""
        return RunStore(self.storage, name)

    def runs(self) -> list[RunStore]:
        """The existing runs, oldest first."""
        created = [
            (info["created"], name) for name in self.storage.list_names("") if (info := self.run(name).read_info())
        ]
        return [self.run(name) for _, name in sorted(created)]
