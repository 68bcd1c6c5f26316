"""The type of a progress callback, and a callback that does nothing."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]  # called as progress(done, total)


def no_progress(done: int, total: int) -> None:
    """A progress callback that does nothing."""


_WORTH_SECONDS, _WORTH_SHARE = 5.0, 0.05


def seconds_left(done: int, total: int, elapsed: float) -> float | None:
    """The time left of a stage at its mean rate; None before it is worth something: five seconds and 5% of the work."""
    if elapsed < _WORTH_SECONDS or done < max(1, _WORTH_SHARE * total):
        return None
    return elapsed / done * (total - done)
