"""A user-defined checker in place of math-verify. Runs in worker processes only (`pool.py`)."""

from __future__ import annotations

import os
from collections.abc import Callable

from ogls.verifiers.score import Score

_checkers: dict[str, Callable[[str, str], object]] = {}  # loaded checkers, by name


def add_working_directory() -> None:
    """Let the working directory be searched for the module of a checker."""
    import sys

    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def load_checker(checker: str) -> None:
    """Import the checker, also from the working directory."""
    from importlib import import_module

    add_working_directory()
    module, name = checker.split(":")
    _checkers[checker] = getattr(import_module(module), name)


def run_checker(checker: str, answer: str, expected: str) -> bool | Score:
    """The result of the checker. Raises TypeError if it is neither True, False nor a Score."""
    if checker not in _checkers:
        load_checker(checker)
    result = _checkers[checker](answer, expected)
    if not isinstance(result, bool | Score):
        raise TypeError(f"{checker} returned {result!r}, expected True, False or a Score")
    return result
