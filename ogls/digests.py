"""SHA-256 of files and folders. A file is read again only if its size or its modification time has changed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

# (size in bytes, modification time in ns, SHA-256 in hex) by absolute path.
FileFacts = tuple[int, int, str]
_known: dict[str, FileFacts] = {}


def file_digest(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    key, stat = str(path.absolute()), path.stat()
    facts = _known.get(key)
    if facts is None or facts[:2] != (stat.st_size, stat.st_mtime_ns):
        with open(path, "rb") as file:
            facts = stat.st_size, stat.st_mtime_ns, hashlib.file_digest(file, "sha256").hexdigest()
        _known[key] = facts
    return facts[2]


def path_digest(path: Path) -> str:
    """The SHA-256 of a file, or of the relative names and SHA-256 of all files in a folder, without hidden files."""
    if path.is_file():
        return file_digest(path)
    files = sorted((p.relative_to(path), p) for p in path.rglob("*") if p.is_file())
    lines = [f"{name} {file_digest(p)}\n" for name, p in files if not any(s.startswith(".") for s in name.parts)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def known_files(paths: list[Path]) -> dict[str, FileFacts]:
    """What is known of the files at or below `paths`, to be remembered by another process (`remember_files`)."""
    below = [str(p.absolute()) for p in paths]
    return {k: v for k, v in _known.items() if any(k == b or k.startswith(f"{b}/") for b in below)}


def remember_files(facts: Mapping[str, FileFacts]) -> None:
    """Take over what another process learned of files. Facts of files that have changed since are not used."""
    _known.update({path: (size, time, digest) for path, (size, time, digest) in facts.items()})
