"""Which code this is: the package's version, and the git revision where it runs from a checkout."""

from __future__ import annotations

import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path


@cache
def code_version() -> dict[str, str | None]:
    """`version`, and `revision`: the commit of the checkout (with + if files differ from it), None without one."""
    return {"version": version("ogls-sd"), "revision": _revision(Path(__file__).resolve().parents[1])}


def _revision(folder: Path) -> str | None:
    if not (folder / ".git").exists():
        return None
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None  # no git on this machine, or a checkout that is not ours to read
    return f"{commit}+" if changed else commit


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
