"""Reads and writes files under a root: a directory, or an object store (`s3://bucket/path`, `gs://`, `az://`).

Object stores are accessed with obstore. Credentials come from the environment or from the role of the machine. The
endpoint of S3 comes from the environment (`AWS_ENDPOINT_URL`) or from the URL:
`s3://bucket/path?endpoint_override=http://127.0.0.1:9000&region=us-east-1`. `memory://name` is for tests.
"""

from __future__ import annotations

import errno
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    NotSupportedError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)

from ogls.errors import ConfigError, StoreError, StoreUnavailable
from ogls.store.atomic import replace_atomically
from ogls.store.ranges import HashingWriter, RangeReader
from ogls.store.remote import open_store

if TYPE_CHECKING:
    import pyarrow as pa

_CONDITIONAL_ATTEMPTS = 4  # obstore does not repeat a conditional write whose connection was lost
_ERRORS = (OSError, BaseError, NotImplementedError)
_NO_CONDITIONS = (
    "the store ignores or refuses conditional writes, so two processes could hold one run; use a store that has them "
    "(S3, Google Cloud Storage, Azure, MinIO) or a local folder"
)


Tag = dict[str, str]  # a version of an object, as obstore names it: `e_tag` (S3, Azure), `version` (Google)


class ObjectChanged(Exception):
    """A conditional write was refused: another process has written the object."""


class Storage:
    """The files under one root, by relative path. `url` is the absolute path or URL of the root."""

    def __init__(self, root: str):
        if not root:
            raise ConfigError("root is empty: set it to a local folder, or to the URL of an object store")
        self.root = root
        self.scheme = root.partition("://")[0] if "://" in root else "file"
        self.local = self.scheme == "file"
        if self.local:
            self.path = self.url = os.path.abspath(root.removeprefix("file://"))
        else:
            self.store, self.path, self.url = open_store(root)

    def read_bytes(self, path: str) -> bytes | None:
        """The content of a file, or None if it does not exist.

        Raises StoreUnavailable if a remote store does not respond.
        """
        return self.read_tagged(path)[0]

    def read_tagged(self, path: str) -> tuple[bytes | None, Tag | None]:
        """The content of a file and the tag of this version; (None, None) if it does not exist.

        A file on a local disk has no tag. Raises as `read_bytes`.
        """
        try:
            if self.local:
                return Path(self._full(path)).read_bytes(), None
            found = obstore.get(self.store, self._full(path))
            return bytes(found.bytes()), _tag(found.meta)
        except (NotADirectoryError, IsADirectoryError):
            return None, None
        except FileNotFoundError as error:
            if _is_missing_bucket(error):
                raise self._failure("read", path, error) from error
            return None, None
        except _ERRORS as error:
            raise self._failure("read", path, error) from error

    def size(self, path: str) -> int | None:
        """The bytes of a file without reading it; None if it does not exist. Raises as `read_bytes`."""
        try:
            if self.local:
                return os.stat(self._full(path)).st_size
            return int(obstore.head(self.store, self._full(path))["size"])
        except (FileNotFoundError, NotADirectoryError):
            return None
        except _ERRORS as error:
            raise self._failure("read", path, error) from error

    def open_file(self, path: str) -> BinaryIO | None:
        """A file to read parts of, or None if it does not exist. Raises as `read_bytes`; reading may raise OSError."""
        try:
            if self.local:
                return open(self._full(path), "rb")
            size = int(obstore.head(self.store, self._full(path))["size"])
            return cast(BinaryIO, RangeReader(lambda start, end: self._read_range(path, start, end), size))
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except _ERRORS as error:
            raise self._failure("read", path, error) from error

    def _read_range(self, path: str, start: int, end: int) -> bytes:
        try:
            return bytes(obstore.get_range(self.store, self._full(path), start=start, end=end))
        except _ERRORS as error:
            raise self._failure("read", path, error) from error

    def write_file(self, path: str, write: Callable[[BinaryIO], None]) -> tuple[int, str]:
        """Write a file completely or not at all, with what `write` writes into it. Returns its bytes and SHA-256.

        The content is never in memory as a whole: it goes to a temporary file on a disk. Raises as `write_bytes`.
        """
        full = self._full(path)
        try:
            if self.local:
                with replace_atomically(Path(full)) as temporary, open(temporary, "wb") as file:
                    hashed = HashingWriter(file)
                    write(cast(BinaryIO, hashed))
                    file.flush()
                    os.fsync(file.fileno())
                return hashed.size, hashed.sha256
            with tempfile.TemporaryFile() as spool:
                hashed = HashingWriter(spool)
                write(cast(BinaryIO, hashed))
                spool.seek(0)
                obstore.put(self.store, full, spool)
                return hashed.size, hashed.sha256
        except _ERRORS as error:
            raise self._failure("write", path, error) from error

    def write_bytes(self, path: str, data: bytes | pa.Buffer) -> None:
        """Write a file completely or not at all.

        Raises StoreError if the disk is full or read-only, StoreUnavailable if a remote store does not respond.
        """
        full = self._full(path)
        try:
            if not self.local:
                obstore.put(self.store, full, memoryview(data).cast("B"))
                return
            with replace_atomically(Path(full)) as temporary, open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except _ERRORS as error:
            raise self._failure("write", path, error) from error

    def replace_bytes(self, path: str, data: bytes, tag: Tag | None) -> Tag:
        """Write an object if its version is still `tag` (None: if it does not exist). Returns its new tag.

        Only for remote stores. No other process may write the same `data`: after a lost response, the object is read to
        find out which write arrived. Raises ObjectChanged if another process has written it; else as `write_bytes`.
        """
        for attempt in range(1, _CONDITIONAL_ATTEMPTS + 1):
            try:
                return self._put_if(path, data, tag)
            except _ERRORS as error:
                content, found = self.read_tagged(path)
                if content == data and found:  # this write arrived, its response did not
                    return found
                if found != tag or isinstance(error, AlreadyExistsError | PreconditionError):
                    raise ObjectChanged(path) from error
                if attempt == _CONDITIONAL_ATTEMPTS:
                    raise self._failure("write", path, error) from error
            time.sleep(0.2 * attempt)
        raise AssertionError

    def require_conditions(self, path: str) -> None:
        """Raise StoreError if the store ignores the conditions of writes. `path` is a JSON object that exists."""
        content = (self.read_bytes(path) or b"") + b"\n"  # not harmful where it is written
        for wrong_tag in (None, {"e_tag": f'"{"0" * 32}"', "version": "1"}):
            with suppress(ObjectChanged):
                self.replace_bytes(path, content, wrong_tag)
                raise StoreError(f"{self.url}: {_NO_CONDITIONS}")

    def _put_if(self, path: str, data: bytes, tag: Tag | None) -> Tag:
        mode: Any = tag or "create"
        return _tag(obstore.put(self.store, self._full(path), data, mode=mode))

    def remove(self, path: str) -> None:
        """Remove a file, if it exists. Raises StoreError as `write_bytes` does."""
        try:
            if self.local:
                Path(self._full(path)).unlink()
            else:
                obstore.delete(self.store, self._full(path))
        except FileNotFoundError:
            pass
        except _ERRORS as error:
            raise self._failure("remove", path, error) from error

    def list_names(self, path: str) -> list[str]:
        """The names of the files and folders in a folder, sorted; empty if the folder does not exist."""
        try:
            if self.local:
                return sorted(os.listdir(self._full(path)))
            listed = obstore.list_with_delimiter(self.store, self._full(path))
            paths = [*listed["common_prefixes"], *(found["path"] for found in listed["objects"])]
            return sorted(p.rsplit("/", 1)[-1] for p in paths)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except _ERRORS as error:
            raise self._failure("list", path, error) from error

    def list_files(self, path: str) -> list[str]:
        """The paths of all files below a folder, relative to the folder."""
        full = self._full(path)
        try:
            if self.local:
                return [str(p.relative_to(full)) for p in Path(full).rglob("*") if p.is_file()]
            return [str(m["path"])[len(full) + 1 :] for batch in obstore.list(self.store, full) for m in batch]
        except _ERRORS as error:
            raise self._failure("list", path, error) from error

    def file_system(self) -> Any:
        """A remote store as a file system of fsspec, for DuckDB; it opens URLs that begin with `url`."""
        from obstore.fsspec import FsspecStore

        store = self.store

        class Files(FsspecStore):
            def _construct_store(self, bucket: str) -> Any:
                return store

        return Files(self.scheme)  # type: ignore[call-overload]

    def _full(self, path: str) -> str:
        return f"{self.path}/{path}".strip("/") if not self.local else f"{self.path}/{path}".rstrip("/")

    def _failure(self, action: str, path: str, error: Exception) -> StoreError:
        """The error to raise: StoreError for a local disk, StoreUnavailable if a retry may succeed (remote stores)."""
        if self.local:
            return StoreError(_local_failure(action, self._full(path), error))
        # obstore appends the debugging form of the error
        summary = " ".join(str(error).partition("Debug source")[0].split())[:300]
        text = f"cannot {action} {self.url}/{path}: {summary}"
        if isinstance(error, NotImplementedError | NotSupportedError):
            return StoreError(f"{text}: {_NO_CONDITIONS}")
        if _is_missing_bucket(error):
            return StoreError(f"{text}: NoSuchBucket; create the bucket, or set root to another one")
        if isinstance(error, PermissionDeniedError | UnauthenticatedError | PermissionError):
            return StoreError(f"{text}; check the credentials, then run the same command again; finished work is kept")
        return StoreUnavailable(f"{text}; finished work is kept")


def _tag(meta: Any) -> Tag:
    return {key: meta[key] for key in ("e_tag", "version") if meta[key] is not None}


def _is_missing_bucket(error: Exception) -> bool:
    return "NoSuchBucket" in str(error)


def _local_failure(action: str, path: str, error: Exception) -> str:
    advice = {
        errno.ENOSPC: "the disk is full: free some space",
        errno.EDQUOT: "the disk quota is used up: free some space",
        errno.EROFS: "the file system is read-only: set root to a folder that can be written",
        errno.EACCES: "permission denied: set root to a folder that can be written",
        errno.EPERM: "permission denied: set root to a folder that can be written",
        errno.ENOTDIR: "there is a file where a folder is needed: set root to another folder",
        errno.EEXIST: "there is a file where a folder is needed: set root to another folder",
    }.get(getattr(error, "errno", None) or 0, str(error))
    return f"cannot {action} {path}: {advice}, then run the same command again; finished work is kept"
