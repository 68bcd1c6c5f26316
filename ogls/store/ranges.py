"""Files that are never in memory as a whole: one that is read in parts, and one that is hashed as it is written."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from typing import Any, BinaryIO


class RangeReader(io.RawIOBase):
    """A file of `size` bytes, of which `read(start, end)` reads a part. Raises what `read` raises."""

    def __init__(self, read: Callable[[int, int], bytes], size: int):
        self.read_range, self.size = read, size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        end = min(self._position + len(buffer), self.size)
        if end <= self._position:
            return 0
        content = self.read_range(self._position, end)
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)


class HashingWriter(io.RawIOBase):
    """Writes to another file, and counts and hashes what is written."""

    def __init__(self, file: BinaryIO):
        self.file, self.size, self._hash = file, 0, hashlib.sha256()

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.size

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.file.write(view)
        self._hash.update(view)
        self.size += len(view)
        return len(view)
