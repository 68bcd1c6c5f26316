r"""Completion to verdict. The only import of math_verify, and only in worker processes.

math-verify guards itself with SIGALRM, which fails off the main thread and cancels other alarms of its
process; sympy can spend hours or gigabytes on a short string. So a judgement runs in a spawned worker, with
a bounded address space, that is killed at a wall limit. Timeouts and errors are verdicts of their own:
nothing is taken for a wrong answer because the judge failed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, CancelledError
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.util import Finalize
from types import SimpleNamespace
from typing import Any, cast

from ogls.config import Verdict, VerifyConfig
from ogls.errors import ConfigError
from ogls.progress import Progress, no_progress
from ogls.verifiers.answers import find_answer
from ogls.verifiers.custom import load_checker, run_checker
from ogls.verifiers.math import answers_match, init_worker

_TASKS_PER_WORKER = 5000  # sympy's caches grow
_STALL_SECONDS = 60.0  # beyond the limit of one judgement: a worker starts in 3, on a busy machine in 20
_ATTEMPTS = 3  # at an answer whose worker is killed from outside, or who was out of time once


@dataclass(frozen=True)
class Judgement:
    """A verdict, and the answer that it was passed on (None if none was found)."""

    verdict: Verdict
    answer: str | None = None


@dataclass(frozen=True)
class Case:
    """A completion to judge."""

    text: str
    finish_reason: str
    expected: str


class Verifier:
    """Judges completions in worker processes. Safe from any thread; use `shared` to keep workers warm."""

    def __init__(self, config: VerifyConfig):
        self.config = config
        self._pool = self._new_pool()

    def _new_pool(self) -> Any:
        from multiprocessing import get_context

        from pebble import ProcessPool
        from pebble.pool import process

        # pebble takes its limits by the wall clock: where that jumps, an answer would count as timed out.
        cast(Any, process).time = SimpleNamespace(time=time.monotonic, sleep=time.sleep)
        return ProcessPool(
            max_workers=self.config.workers,
            max_tasks=_TASKS_PER_WORKER,
            initializer=init_worker,
            initargs=[self.config.memory_mb],
            context=get_context("spawn"),
        )

    def _renew_pool(self) -> None:
        """A worker killed while it held the pool's pipe breaks the pool, or leaves the others waiting for ever."""
        with suppress(Exception):
            self._pool.stop()
            self._pool.join(timeout=10)
        self._pool = self._new_pool()

    def judge(self, cases: Sequence[Case], progress: Progress = no_progress) -> list[Judgement]:
        """One judgement a case, in order. Equal (answer, expected) pairs are judged once."""
        answers = [find_answer(c.text[-self.config.tail_chars :], self.config.require_boxed) for c in cases]
        open_ = [c.finish_reason != "length" and a is not None for c, a in zip(cases, answers, strict=True)]
        pairs = [(a or "", c.expected) for c, a in zip(cases, answers, strict=True)]
        verdicts = self._decide(list(dict.fromkeys(p for p, o in zip(pairs, open_, strict=True) if o)), progress)
        judged = []
        for case, answer, pair, is_open in zip(cases, answers, pairs, open_, strict=True):
            undecided: Verdict = "truncated" if case.finish_reason == "length" else "no_answer"
            judged.append(Judgement(verdicts[pair] if is_open else undecided, answer))
        return judged

    def can_verify(self, answers: Sequence[str]) -> list[bool]:
        """Whether each expected answer can be parsed and equals itself."""
        verdicts = self._decide(list(dict.fromkeys((a, a) for a in answers)), no_progress)
        return [verdicts[a, a] == "correct" for a in answers]

    def _decide(self, pairs: list[tuple[str, str]], progress: Progress) -> dict[tuple[str, str], Verdict]:
        """A verdict a pair. One whose worker was killed by a signal, or was out of time, is judged again after all
        others: a machine that stalls says nothing of the answer. Out of time twice is the verdict `timeout`."""
        verdicts: dict[tuple[str, str], Verdict] = {}
        late: set[tuple[str, str]] = set()
        left = pairs
        for _ in range(_ATTEMPTS):
            left = self._attempt(left, verdicts, late, lambda: progress(len(verdicts), len(pairs)))
            if not left:
                return verdicts
        return verdicts | {pair: "timeout" if pair in late else "error" for pair in left}

    def _attempt(
        self,
        pairs: list[tuple[str, str]],
        verdicts: dict[tuple[str, str], Verdict],
        late: set[tuple[str, str]],
        progress: Callable[[], None],
    ) -> list[tuple[str, str]]:
        """Judge each pair; those to judge again are returned, and those out of time are in `late`."""
        from pebble import ProcessExpired

        again: list[tuple[str, str]] = []
        if not self._pool.active:
            self._renew_pool()
        judge = partial(run_checker, self.config.checker) if self.config.checker else answers_match
        futures = [self._pool.schedule(judge, args=list(p), timeout=self.config.timeout_seconds) for p in pairs]
        for place, (pair, future) in enumerate(zip(pairs, futures, strict=True)):
            try:
                verdicts[pair] = (
                    "correct" if future.result(self.config.timeout_seconds + _STALL_SECONDS) else "incorrect"
                )
            except FutureTimeout:  # math-verify's alarm, the wall limit, or nobody is at it any more
                if not future.done():
                    self._renew_pool()
                    return [*again, *pairs[place:]]
                if pair in late:
                    verdicts[pair] = "timeout"
                else:
                    late.add(pair)
                    again.append(pair)
            except (CancelledError, BrokenExecutor):
                again.append(pair)
            except ProcessExpired as gone:
                if (gone.exitcode or 0) < 0:
                    again.append(pair)
                else:  # its own end, at its memory limit
                    verdicts[pair] = "error"
            except Exception:  # whatever sympy raised
                verdicts[pair] = "error"
            progress()
        return again

    def validate_checker(self) -> None:
        """Raise ConfigError if the checker of the configuration cannot be loaded where it is to run."""
        if self.config.checker:
            try:
                self._pool.schedule(load_checker, args=[self.config.checker]).result(_STALL_SECONDS)
            except Exception as error:  # whatever importing somebody's module raises
                raise ConfigError(f"verify.checker: cannot load {self.config.checker}: {error}") from None

    def close(self) -> None:
        self._pool.stop()
        self._pool.join()


_shared: dict[VerifyConfig, Verifier] = {}


_sharing = threading.Lock()


def shared_verifier(config: VerifyConfig) -> Verifier:
    """This process's verifier for a configuration, its workers started once and stopped at exit."""
    with _sharing:
        if config not in _shared:
            _shared[config] = Verifier(config)
            # A finalizer and not atexit: a process that multiprocessing started runs only the former, and would
            # wait for ever for the workers at its end.
            Finalize(None, _shared[config].close, exitpriority=100)
            try:
                _shared[config].validate_checker()
            except ConfigError:
                del _shared[config]
                raise
        return _shared[config]
