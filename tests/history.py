"""Long runs without training them: rounds that are copies of a finished one, and a count of what a call reads."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ogls.records.stages import STAGES
from ogls.stages.rounds import record_round
from ogls.stages.run import Run, open_run
from ogls.store import RunStore
from ogls.store.manifest import Manifest
from ogls.store.storage import Storage


def make_history(source: Run, root: str, rounds: int, summary: bool = True) -> Run:
    """A run of `rounds` rounds in the store `root`: the finished run `source`, and copies of its newest round.

    Every copy has the files and manifests of the round under another number, so tables are read and policies loaded as
    those of any run. With `summary`, the summary of rounds is there, as `publish` leaves it.
    """
    records, storage = source.records, Storage(root)
    target = RunStore(storage, records.name)
    for name in records.storage.list_files(records.name):
        if name != "lock.json":
            _write(target, name, records.storage.read_bytes(f"{records.name}/{name}") or b"")
    newest = records.newest_manifest("updates")
    assert newest
    template = [m for s in STAGES if (m := records.manifest(s.table, newest.round)) and s.table != "problems"]
    content = {f.path: records.read_verified(f)[0] for m in template for f in m.files}
    for round_ in range(newest.round + 1, rounds + 1):
        for manifest in template:
            _copy_stage(target, manifest, content, round_)
    run = open_run(root, records.name)
    if summary:
        for round_ in dict.fromkeys([*range(49, rounds, 50), rounds]):  # a file of the summary has 50 rounds
            record_round(run.records, round_)
    return run


def _copy_stage(target: RunStore, manifest: Manifest, content: dict[str, bytes], round_: int) -> None:
    """The files and the manifest of a stage under another round."""
    old, new = f"/round={manifest.round:03d}/", f"/round={round_:03d}/"
    files = []
    for entry in manifest.files:
        files.append(replace(entry, path=entry.path.replace(old, new)))
        _write(target, files[-1].path, content[entry.path])
    copied = replace(manifest, round=round_, files=tuple(files), fingerprint=f"copy of round {manifest.round}")
    table = next(stage.table for stage in STAGES if stage.name == manifest.stage)
    _write(target, f"{target.folder(table, round_)}/manifest.json", json.dumps(asdict(copied)).encode())


def _write(target: RunStore, path: str, content: bytes) -> None:
    """Write a file; on a disk without waiting until it is on the disk, which would take most of the time."""
    if not target.storage.local:
        target.storage.write_bytes(f"{target.name}/{path}", content)
        return
    file = Path(target.url(path))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


@dataclass
class Cost:
    """Requests to a store, and bytes. `paths` has what was read."""

    reads: int = 0
    read_bytes: int = 0
    lists: int = 0
    writes: int = 0
    written_bytes: int = 0
    paths: tuple[str, ...] = ()

    @property
    def requests(self) -> tuple[int, int, int]:
        """Reads, listings and writes."""
        return self.reads, self.lists, self.writes


class _CountedFile(io.RawIOBase):
    """A file of which each read is a request."""

    def __init__(self, file: Any, cost: Cost):
        self.file, self.cost = file, cost
        self.seek, self.tell = file.seek, file.tell  # type: ignore[method-assign]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        content: bytes = self.file.read(size)
        self.cost.reads, self.cost.read_bytes = self.cost.reads + 1, self.cost.read_bytes + len(content)
        return content


@contextmanager
def counted() -> Iterator[Cost]:
    """Count what this process reads from and writes to stores. A read of a part of a file counts its bytes."""
    cost, originals = (
        Cost(),
        {name: getattr(Storage, name) for name in ("read_tagged", "list_names", "list_files", "open_file")},
    )
    originals |= {name: getattr(Storage, name) for name in ("write_bytes", "replace_bytes", "remove")}

    def read_tagged(self: Storage, path: str) -> Any:
        found = originals["read_tagged"](self, path)
        cost.reads, cost.read_bytes = cost.reads + 1, cost.read_bytes + len(found[0] or b"")
        cost.paths += (path,)
        return found

    def listing(name: str) -> Any:
        def call(self: Storage, path: str) -> Any:
            cost.lists += 1
            return originals[name](self, path)

        return call

    def writing(name: str) -> Any:
        def call(self: Storage, path: str, *data: Any) -> Any:
            cost.writes += 1
            cost.written_bytes += len(data[0]) if data else 0
            return originals[name](self, path, *data)

        return call

    def open_file(self: Storage, path: str) -> Any:
        file = originals["open_file"](self, path)
        cost.paths += (path,)
        return file and _CountedFile(file, cost)

    replaced = {"read_tagged": read_tagged, "open_file": open_file} | {
        n: listing(n) for n in ("list_names", "list_files")
    }
    replaced |= {n: writing(n) for n in ("write_bytes", "replace_bytes", "remove")}
    try:
        for name, method in replaced.items():
            setattr(Storage, name, method)
        yield cost
    finally:
        for name, method in originals.items():
            setattr(Storage, name, method)
