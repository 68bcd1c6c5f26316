"""A checker of the user's own in place of math-verify. Runs in worker processes only (`pool.py`)."""

from __future__ import annotations

import os
from collections.abc import Callable

_checkers: dict[str, Callable[[str, str], object]] = {}  # of the user's own, by name


def load_checker(checker: str) -> None:
    """Import the user's function: the first time from the working directory too."""
    import sys
    from importlib import import_module

    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    module, name = checker.split(":")
    _checkers[checker] = getattr(import_module(module), name)


def run_checker(checker: str, answer: str, expected: str) -> bool:
    """What the user's function says. Anything but True or False is an error of its own."""
    if checker not in _checkers:
        load_checker(checker)
    said = _checkers[checker](answer, expected)
    if not isinstance(said, bool):
        raise TypeError(f"{checker} returned {said!r}, neither True nor False")
    return said
