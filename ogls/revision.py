"""The version of the package, and the git revision of a source checkout."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

from ogls import __version__


@cache
def code_version() -> dict[str, str | None]:
    """`version`, and `revision`: the commit of the checkout (with a + if tracked files differ from it), or None
    outside a checkout."""
    return {"version": __version__, "revision": _revision(Path(__file__).resolve().parents[1])}


def _revision(folder: Path) -> str | None:
    if not (folder / ".git").exists():
        return None
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None  # git is not installed, or refuses to read this checkout
    return f"{commit}+" if changed else commit


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
