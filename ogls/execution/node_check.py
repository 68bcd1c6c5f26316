"""Whether a node can carry out shards of a run: it sees the store, and has the code and the models of the driver.

Does not need Ray. The process that holds the run (the driver) writes a token into the store; a worker reads it before
it writes anything. A later driver writes another token, so a worker that has outlived its driver writes nothing more.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from uuid import uuid4

from ogls.config import RunConfig
from ogls.digests import FileFacts, remember_files
from ogls.errors import StoreError, UserError
from ogls.revision import code_version
from ogls.store.storage import Storage


@dataclass(frozen=True)
class Expected:
    """What the driver has, for comparison on the nodes. Everything in it can be pickled."""

    config: RunConfig  # its root is absolute
    folder: str  # the working directory of the driver, to which paths of the configuration are relative
    token_path: str  # relative to the root
    token: str
    code: Mapping[str, str | None]
    contents: Mapping[str, str]  # digests of models and checkers, by dotted setting
    files: Mapping[str, FileFacts]  # digests of their files; a node with the same files need not read them
    read_contents: Callable[[RunConfig], Mapping[str, str]]


def write_token(storage: Storage, path: str) -> str:
    """Write a new token into the store. Returns it."""
    token = uuid4().hex
    storage.write_bytes(path, token.encode())
    return token


def remove_token(expected: Expected) -> None:
    """Remove the token from the store, if it is still the one of this driver."""
    storage = Storage(expected.config.root)
    if _read_token(storage, expected) == expected.token:
        storage.remove(expected.token_path)


def require_token(expected: Expected) -> None:
    """Raise StoreError unless the store has the token of the driver: another process may have taken the run."""
    if _read_token(Storage(expected.config.root), expected) != expected.token:
        raise StoreError(
            f"run {expected.config.name}: this worker belongs to a process that has ended or lost the run, and writes "
            "nothing"
        )


def enter_folder(expected: Expected) -> None:
    """Change to the working directory of the driver, if this node has it."""
    if os.path.isdir(expected.folder):
        os.chdir(expected.folder)


def find_problems(expected: Expected) -> list[str]:
    """Why this node cannot carry out shards of the run, a sentence each; empty if it can."""
    code = code_version()
    if code != dict(expected.code):
        # What follows is meaningless with other code.
        return [f"it runs {_describe(code)}, and the driver {_describe(expected.code)}: install the same version"]
    return [*_store_problems(expected), *_content_problems(expected)]


def _store_problems(expected: Expected) -> list[str]:
    storage = Storage(expected.config.root)
    try:
        token = _read_token(storage, expected)
    except UserError as error:
        return [str(error)]
    if token == expected.token:
        return []
    found = "has the token of another process" if token else "has no token of this run"
    return [
        f"it does not see the store: {storage.url} {found} there; set root to a folder that all nodes share, "
        "under the same path, or to an object store"
    ]


def _content_problems(expected: Expected) -> list[str]:
    remember_files(expected.files)
    try:
        found = expected.read_contents(expected.config)
    except (UserError, OSError, ValueError) as error:
        return [f"{type(error).__name__}: {error}"]
    problems = []
    for setting, content in expected.contents.items():
        if setting not in found:
            problems.append(f"{setting} is not there: copy it to the same path, or use a folder that all nodes share")
        elif found[setting] != content:
            problems.append(
                f"{setting} differs from that of the driver ({found[setting][:24]} instead of {content[:24]}): copy it "
                "again"
            )
    return problems


def _read_token(storage: Storage, expected: Expected) -> str:
    return (storage.read_bytes(expected.token_path) or b"").decode(errors="replace")


def _describe(code: Mapping[str, str | None]) -> str:
    revision = code.get("revision")
    return f"ogls-sd {code.get('version')}" + (f" at {revision[:12]}{'+' * revision.endswith('+')}" if revision else "")
