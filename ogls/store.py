"""The record store: the only place that spells a path.

    <root>/<run>/<table>/round=003/part-0000.parquet    shards, written to a temporary name and renamed
    <root>/<run>/<table>/round=003/manifest.json        written last: the only proof that a stage is done
    <root>/<run>/<table>/round=003/partial.json         the shards of a stage that is under way

`root` is a directory or any fsspec URL. Object stores publish an object whole or not at all, so there the
rename is left out.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from ogls.errors import StoreAway, StoreError
from ogls.filesystem import open_root
from ogls.runstore import RunStore


class Store:
    """All runs under one root."""

    def __init__(self, root: str):
        self.root = root
        self.fs, self.path = open_root(root)
        self.local = isinstance(self.fs, LocalFileSystem)

    def run(self, name: str) -> RunStore:
        return RunStore(self, name)

    def runs(self) -> list[RunStore]:
        """The runs, oldest first."""
        names = self.names_in("")
        found = [(about["created"], name) for name in names if (about := self.run(name).about())]
        return [self.run(name) for _, name in sorted(found)]

    def sql(self, statement: str, run: str | None = None) -> pa.Table:
        """The answer to one SELECT over the tables of all runs or one, as an Arrow table.

        `.to_pandas()` and `polars.from_arrow()` make data frames of it. Raises UserError for anything but one SELECT.
        """
        from ogls.query import query

        return query(self, statement, run)

    def read_bytes(self, path: str) -> bytes | None:
        """A file's content, or None if there is none. Raises StoreAway if a remote store does not answer."""
        full = f"{self.path}/{path}"
        try:
            content: bytes = Path(full).read_bytes() if self.local else self.fs.cat_file(full)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except OSError as error:
            raise self._failure("read", full, error) from error
        return content

    def write_bytes(self, path: str, data: bytes | pa.Buffer) -> None:
        """Publish a file whole or not at all.

        Raises StoreError if the disk is full or may not be written, StoreAway if a remote store does not answer.
        """
        full = f"{self.path}/{path}"
        try:
            if not self.local:
                self.fs.pipe_file(full, bytes(data))
                return
            self.fs.makedirs(os.path.dirname(full), exist_ok=True)
            temporary = f"{full}.tmp"
            try:
                with open(temporary, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, full)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
                raise
        except OSError as error:
            raise self._failure("write", full, error) from error

    def remove(self, path: str) -> None:
        full = f"{self.path}/{path}"
        try:
            self.fs.rm_file(full)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise self._failure("remove", full, error) from error

    def names_in(self, path: str) -> list[str]:
        """Names in a folder, sorted; none if there is no folder."""
        full = f"{self.path}/{path}".rstrip("/")
        try:
            if self.local:
                return sorted(os.listdir(full))
            return sorted(Path(p).name for p in self.fs.ls(full, detail=False, refresh=True))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise self._failure("list", full, error) from error

    def _failure(self, what: str, path: str, error: OSError) -> StoreError:
        """The error to raise: a local disk's is the user's to mend, a remote store may answer again."""
        if self.local or isinstance(error, FileNotFoundError | PermissionError):
            return StoreError(_local_failure(what, path, error))
        first = " ".join(str(error).split())[:300]
        return StoreAway(f"cannot {what} {self.fs.unstrip_protocol(path)}: {first}; what was finished is kept")


def _local_failure(what: str, path: str, error: OSError) -> str:
    advice = {
        errno.ENOSPC: "the disk is full: free some space",
        errno.EDQUOT: "the disk quota is used up: free some space",
        errno.EROFS: "the file system is read-only: set root to a folder that can be written",
        errno.EACCES: "permission denied: set root to a folder that can be written",
        errno.EPERM: "permission denied: set root to a folder that can be written",
        errno.ENOTDIR: "a file stands where a folder is needed: set root to another folder",
        errno.EEXIST: "a file stands where a folder is needed: set root to another folder",
    }.get(error.errno or 0, str(error))
    return f"cannot {what} {path}: {advice}, then run the same command again; what was finished is kept"
