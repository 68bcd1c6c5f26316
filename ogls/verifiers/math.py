"""Whether two answers are equal, by math-verify. Runs in worker processes only (`pool.py`)."""

from __future__ import annotations

import os
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from typing import Any

_INNER_SECONDS = 1  # math-verify's own alarm, per parse and comparison: cheaper than killing a worker


def init_worker(memory_mb: int) -> None:
    import logging
    import resource

    logging.disable(logging.CRITICAL)
    with suppress(Exception):
        answers_match("1", "1")  # what the first judgement loads is loaded before the limit, and before its clock
    resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def answers_match(answer: str, expected: str) -> bool:
    """Whether math-verify takes the answer for the expected one. An answer it cannot parse is not equal."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
    from math_verify.errors import TimeoutException

    def parsed(text: str) -> Any:
        latex = LatexExtractionConfig(boxed_match_priority=0)
        form = rf"\boxed{{{text}}}"
        return parse(form, [latex, ExprExtractionConfig()], parsing_timeout=_INNER_SECONDS, raise_on_error=True)

    try:
        gold = parsed(expected)
        return bool(gold) and verify(gold, parsed(answer), timeout_seconds=_INNER_SECONDS, raise_on_error=True)
    except TimeoutException:
        raise FutureTimeout from None
    except (MemoryError, RecursionError):
        os._exit(1)  # the caches are of no use any more: a fresh worker takes over
