"""A user-defined checker in place of math-verify. Runs in worker processes only (`pool.py`)."""

from __future__ import annotations

from collections.abc import Callable

from ogls.custom import load_function
from ogls.verifiers.score import Score

_checkers: dict[str, Callable[[str, str], object]] = {}  # loaded checkers, by name


def load_checker(checker: str) -> None:
    """Import the checker, also from the working directory."""
    _checkers[checker] = load_function(checker)


def run_checker(checker: str, answer: str, expected: str) -> bool | Score:
    """The result of the checker. Raises TypeError if it is neither True, False nor a Score."""
    if checker not in _checkers:
        load_checker(checker)
    result = _checkers[checker](answer, expected)
    if not isinstance(result, bool | Score):
        raise TypeError(f"{checker} returned {result!r}, expected True, False or a Score")
    return result
