"""Reads and writes files under a root: a directory, `s3://bucket/path` or any other fsspec URL.

S3 uses the client of pyarrow. The endpoint comes from the environment (`AWS_ENDPOINT_URL`) or from the URL, in the
syntax of pyarrow: `s3://bucket/path?endpoint_override=http://127.0.0.1:9000&region=us-east-1`. Credentials come from
the environment or from the role of the machine, as for the AWS tools.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import fsspec
import pyarrow as pa
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from ogls.errors import ConfigError, StoreError, StoreUnavailable
from ogls.store.atomic import replace_atomically

_ATTEMPTS = 8  # about a minute in total, for stores that throttle requests (SlowDown)
_CONNECT_SECONDS, _REQUEST_SECONDS = 10, 60
_S3_OPTIONS = ("endpoint_override", "region", "scheme")


class Storage:
    """The files under one root, by relative path."""

    def __init__(self, root: str):
        self.root = root
        self.fs, self.path = open_root(root)
        self.local = isinstance(self.fs, LocalFileSystem)

    def read_bytes(self, path: str) -> bytes | None:
        """The content of a file, or None if it does not exist.

        Raises StoreUnavailable if a remote store does not respond.
        """
        full = f"{self.path}/{path}"
        try:
            content: bytes = Path(full).read_bytes() if self.local else self.fs.cat_file(full)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except OSError as error:
            raise self._failure("read", full, error) from error
        return content

    def write_bytes(self, path: str, data: bytes | pa.Buffer) -> None:
        """Write a file completely or not at all.

        Raises StoreError if the disk is full or read-only, StoreUnavailable if a remote store does not respond.
        """
        full = f"{self.path}/{path}"
        try:
            if not self.local:
                self.fs.pipe_file(full, bytes(data))
                return
            with replace_atomically(Path(full)) as temporary, open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise self._failure("write", full, error) from error

    def remove(self, path: str) -> None:
        """Remove a file, if it exists. Raises StoreError as `write_bytes` does."""
        full = f"{self.path}/{path}"
        try:
            self.fs.rm_file(full)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise self._failure("remove", full, error) from error

    def list_names(self, path: str) -> list[str]:
        """The names of the files and folders in a folder, sorted; empty if the folder does not exist."""
        full = f"{self.path}/{path}".rstrip("/")
        try:
            if self.local:
                return sorted(os.listdir(full))
            return sorted(Path(p).name for p in self.fs.ls(full, detail=False, refresh=True))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise self._failure("list", full, error) from error

    def _failure(self, action: str, path: str, error: OSError) -> StoreError:
        """The error to raise: StoreError for a local disk, StoreUnavailable if a retry may succeed (remote stores)."""
        if self.local or isinstance(error, FileNotFoundError | PermissionError):
            return StoreError(_local_failure(action, path, error))
        summary = " ".join(str(error).split())[:300]
        return StoreUnavailable(f"cannot {action} {self.fs.unstrip_protocol(path)}: {summary}; finished work is kept")


def _local_failure(action: str, path: str, error: OSError) -> str:
    advice = {
        errno.ENOSPC: "the disk is full: free some space",
        errno.EDQUOT: "the disk quota is used up: free some space",
        errno.EROFS: "the file system is read-only: set root to a folder that can be written",
        errno.EACCES: "permission denied: set root to a folder that can be written",
        errno.EPERM: "permission denied: set root to a folder that can be written",
        errno.ENOTDIR: "there is a file where a folder is needed: set root to another folder",
        errno.EEXIST: "there is a file where a folder is needed: set root to another folder",
    }.get(error.errno or 0, str(error))
    return f"cannot {action} {path}: {advice}, then run the same command again; finished work is kept"


def open_root(root: str) -> tuple[AbstractFileSystem, str]:
    """The file system of `root`, and the path of `root` in it.

    Raises ConfigError for an S3 URL with an unknown option.
    """
    if not root.startswith("s3://"):
        fs, path = fsspec.core.url_to_fs(root)
        return fs, str(path)
    from fsspec.implementations.arrow import ArrowFSWrapper
    from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem

    url = urlsplit(root)
    options = dict(parse_qsl(url.query))
    if unknown := sorted(set(options) - set(_S3_OPTIONS)) or ([url.username] if url.username else []):
        raise ConfigError(
            f"root: {unknown[0]} is not allowed in an S3 URL (allowed: {', '.join(_S3_OPTIONS)}); credentials come "
            "from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
        )
    s3 = S3FileSystem(
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS),
        connect_timeout=_CONNECT_SECONDS,
        request_timeout=_REQUEST_SECONDS,
        **options,
    )
    return ArrowFSWrapper(s3), (url.netloc + url.path).rstrip("/")
