"""The runs under one root.

    <root>/<run>/<table>/round=003/part-0000.parquet    shards, written to a temporary name and renamed
    <root>/<run>/<table>/round=003/manifest.json        written last: the only proof that a stage is done
    <root>/<run>/<table>/round=003/partial.json         the finished shards of a stage that is running

`root` is a directory or any fsspec URL. An object store publishes an object completely or not at all, so no rename is
needed there.
"""

from __future__ import annotations

from ogls.store.run_store import RunStore
from ogls.store.storage import Storage


class Store:
    """All runs under one root. Raises ConfigError for a root that cannot be understood."""

    def __init__(self, root: str):
        self.root = root
        self.storage = Storage(root)

    def run(self, name: str) -> RunStore:
        """The folder of one run, which need not exist yet."""
        return RunStore(self.storage, name)

    def runs(self) -> list[RunStore]:
        """The runs that exist, oldest first."""
        found = [
            (info["created"], name) for name in self.storage.list_names("") if (info := self.run(name).read_info())
        ]
        return [self.run(name) for _, name in sorted(found)]
