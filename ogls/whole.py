"""Files for people, written whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ogls.errors import UserError


@contextmanager
def whole(path: Path, replace: bool = False, errors: tuple[type[Exception], ...] = (OSError,)) -> Iterator[Path]:
    """A place beside `path` for a file or folder that becomes `path` when the block ends, and is gone if it fails.

    Raises UserError if `path` is there already and not to be replaced, and for `errors`: that it cannot be written.
    """
    if path.exists() and not replace:
        raise UserError(f"{path} is there already: take another name, or remove it")
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(temporary)
        yield temporary
        os.replace(temporary, path)
    except errors as error:
        raise UserError(f"cannot write {path}: {str(error).strip()}") from None
    finally:
        with suppress(OSError):  # it may be what cannot be written
            _remove(temporary)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
