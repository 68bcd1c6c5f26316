"""A storage whose changes go to another one: a stage can be computed again without touching the files of its run."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import BinaryIO

import pyarrow as pa

from ogls.store.storage import Storage, Tag


class Overlay(Storage):
    """Reads from `base`, except for what was written or removed through the overlay, which `scratch` holds.

    It is not covered by a lease on the run in `base`, because nothing is written there.
    """

    def __init__(self, base: Storage, scratch: Storage):
        self.base, self.scratch = base, scratch
        self.root, self.local, self.url = base.root, True, f"overlay of {base.url}"
        self.removed: set[str] = set()

    def read_tagged(self, path: str) -> tuple[bytes | None, Tag | None]:
        if path in self.removed:
            return None, None
        content = self.scratch.read_bytes(path)
        return (self.base.read_bytes(path) if content is None else content), None

    def size(self, path: str) -> int | None:
        content, _ = self.read_tagged(path)
        return None if content is None else len(content)

    def open_file(self, path: str) -> BinaryIO | None:
        content, _ = self.read_tagged(path)
        return None if content is None else io.BytesIO(content)

    def write_file(self, path: str, write: Callable[[BinaryIO], None]) -> tuple[int, str]:
        written = self.scratch.write_file(path, write)
        self.removed.discard(path)
        return written

    def write_bytes(self, path: str, data: bytes | pa.Buffer) -> None:
        self.scratch.write_bytes(path, data)
        self.removed.discard(path)

    def remove(self, path: str) -> None:
        self.scratch.remove(path)
        self.removed.add(path)

    def list_names(self, path: str) -> list[str]:
        names = {*self.base.list_names(path), *self.scratch.list_names(path)}
        return sorted(n for n in names if f"{path}/{n}" not in self.removed)

    def list_files(self, path: str) -> list[str]:
        names = {*self.base.list_files(path), *self.scratch.list_files(path)}
        return sorted(n for n in names if f"{path}/{n}" not in self.removed)
