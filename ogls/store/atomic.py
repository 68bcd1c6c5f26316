"""Local files and folders that are written completely or not at all. The only atomic writer of the project."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ogls.errors import UserError


@contextmanager
def replace_atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; it becomes `path` when the block ends, and is removed if the
    block fails. Raises OSError."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(temporary)
        yield temporary
        os.replace(temporary, path)
    finally:
        with suppress(OSError):  # the folder itself may not be writable
            _remove(temporary)


@contextmanager
def atomic_write(path: Path, replace: bool = False, errors: tuple[type[Exception], ...] = (OSError,)) -> Iterator[Path]:
    """`replace_atomically` for files and folders that a user asked for.

    Raises UserError if `path` exists and `replace` is false, or if the block raises one of `errors`.
    """
    if path.exists() and not replace:
        raise UserError(f"{path} already exists: choose another name or remove it")
    try:
        with replace_atomically(path) as temporary:
            yield temporary
    except errors as error:
        raise UserError(f"cannot write {path}: {str(error).strip()}") from None


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
