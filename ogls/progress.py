"""The type of a progress callback, and a callback that does nothing."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]  # called as progress(done, total)


def no_progress(done: int, total: int) -> None:
    """A progress callback that does nothing."""
