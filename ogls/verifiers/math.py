"""Comparing two answers with math-verify. Runs in worker processes only (`pool.py`)."""

from __future__ import annotations

import os
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from typing import Any

_INNER_SECONDS = 1  # math-verify's alarm for each parse and comparison: cheaper than killing a worker


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
    """Whether math-verify finds the answer equal to the expected one. An answer that cannot be parsed is not equal."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
    from math_verify.errors import TimeoutException

    def parse_answer(text: str) -> Any:
        latex = LatexExtractionConfig(boxed_match_priority=0)
        boxed = rf"\boxed{{{text}}}"
        return parse(boxed, [latex, ExprExtractionConfig()], parsing_timeout=_INNER_SECONDS, raise_on_error=True)

    try:
        gold = parse_answer(expected)
        return bool(gold) and verify(gold, parse_answer(answer), timeout_seconds=_INNER_SECONDS, raise_on_error=True)
    except TimeoutException:
        raise FutureTimeout from None
    except (MemoryError, RecursionError):
        os._exit(1)  # the caches of this worker are unreliable now; a new worker replaces it
