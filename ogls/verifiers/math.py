"""Comparing two answers with math-verify. Runs in worker processes only (`pool.py`)."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

_CPU_SECONDS = 2.0  # for one answer, about a hundred times what a usual one needs; cheaper than killing a worker


class OutOfTime(Exception):
    """An answer took too much CPU time."""


def init_worker(memory_mb: int) -> None:
    """Prepare a worker: load math-verify, then limit the memory to `memory_mb` MiB and disable core dumps."""
    import logging
    import resource

    logging.disable(logging.CRITICAL)
    with suppress(Exception):
        answers_match("1", "1")  # load what the first judgement needs before the memory limit and the time limit apply
    resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def answers_match(answer: str, expected: str) -> bool:
    """Whether math-verify finds the answer equal to the expected one. An answer that cannot be parsed is not equal.

    Raises OutOfTime after two seconds of CPU time. Main thread of a process only.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
    from math_verify.errors import TimeoutException

    def parse_answer(text: str) -> Any:
        latex = LatexExtractionConfig(boxed_match_priority=0)
        boxed = rf"\boxed{{{text}}}"
        return parse(boxed, [latex, ExprExtractionConfig()], parsing_timeout=None, raise_on_error=True)

    try:
        with _cpu_limit(TimeoutException):
            gold = parse_answer(expected)
            return bool(gold) and verify(gold, parse_answer(answer), timeout_seconds=None, raise_on_error=True)
    except TimeoutException:
        raise OutOfTime from None
    except (MemoryError, RecursionError):
        os._exit(1)  # the caches of this worker are unreliable now; a new worker replaces it


@contextmanager
def _cpu_limit(error: type[BaseException]) -> Iterator[None]:
    """Raise `error` after _CPU_SECONDS of CPU time.

    math-verify's own limits are alarms of the wall clock: on a busy machine they stop answers that need milliseconds,
    and the verdicts of a round then depend on what else ran.
    """

    def stop(signum: int, frame: Any) -> None:
        raise error

    previous = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, _CPU_SECONDS, 0.1)  # again and again, because sympy swallows exceptions
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)
