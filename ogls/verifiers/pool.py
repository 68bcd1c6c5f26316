"""Judging completions in guarded worker processes.

sympy can spend hours or gigabytes on a short string, and what stops it in its own process needs the main thread. So
each judgement runs in a spawned worker with a memory limit and a limit of CPU time, and a worker that exceeds the limit
of the wall clock is killed. Timeouts and errors are separate verdicts: a failure of the verifier is never counted as
a wrong answer.
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
from ogls.verifiers.guard import require_main_guard
from ogls.verifiers.math import OutOfTime, answers_match, init_worker
from ogls.verifiers.score import Score, describe_failure

_TASKS_PER_WORKER = 5000  # sympy's caches grow
_STALL_SECONDS = 60.0  # beyond the limit of one judgement; a worker starts in 3 s, on a busy machine in 20
_ATTEMPTS = 3  # attempts at an answer whose worker was killed from outside or timed out


@dataclass(frozen=True)
class Judgement:
    """A verdict, and the answer that was judged (None if none was found)."""

    verdict: Verdict
    answer: str | None = None
    raised: str = ""  # the exception that a custom checker raised
    reward: float | None = None  # what a custom checker gave
    feedback: str = ""  # what is wrong: from a custom checker, or for a failed completion from the verifier


@dataclass(frozen=True)
class Case:
    """A completion to judge, and the expected answer."""

    text: str
    finish_reason: str
    expected: str


class Verifier:
    """Judges completions in worker processes. Safe from any thread; use `shared_verifier` to reuse started workers."""

    def __init__(self, config: VerifyConfig):
        require_main_guard()
        self.config = config
        self.raised: dict[tuple[str, str], str] = {}  # exceptions of a custom checker, by (answer, expected)
        self.scores: dict[tuple[str, str], Score] = {}  # what a custom checker said beside the verdict
        self._pool = self._new_pool()

    def _new_pool(self) -> Any:
        from multiprocessing import get_context

        from pebble import ProcessPool
        from pebble.pool import process

        # pebble measures its limits with the wall clock; if that jumps, an answer would count as timed out.
        cast(Any, process).time = SimpleNamespace(time=time.monotonic, sleep=time.sleep)
        return ProcessPool(
            max_workers=self.config.workers,
            max_tasks=_TASKS_PER_WORKER,
            initializer=init_worker,
            initargs=[self.config.memory_mb],
            context=get_context("spawn"),
        )

    def _renew_pool(self) -> None:
        """Replace the pool.

        A worker that is killed while it holds the pipe breaks the pool or blocks the other workers.
        """
        with suppress(Exception):
            self._pool.stop()
            self._pool.join(timeout=10)
        self._pool = self._new_pool()

    def judge(self, cases: Sequence[Case], progress: Progress = no_progress) -> list[Judgement]:
        """One judgement a case, in order. Equal (answer, expected) pairs are judged only once."""
        config = self.config
        answers = [
            find_answer(c.text[-config.tail_chars :], config.require_boxed, config.answer_pattern) for c in cases
        ]
        decidable = [c.finish_reason != "length" and a is not None for c, a in zip(cases, answers, strict=True)]
        pairs = [(a or "", c.expected) for c, a in zip(cases, answers, strict=True)]
        verdicts = self._judge_pairs(
            list(dict.fromkeys(p for p, d in zip(pairs, decidable, strict=True) if d)), progress
        )
        judged = []
        for case, answer, pair, is_decidable in zip(cases, answers, pairs, decidable, strict=True):
            undecided: Verdict = "truncated" if case.finish_reason == "length" else "no_answer"
            verdict = verdicts[pair] if is_decidable else undecided
            raised = self.raised.get(pair, "") if is_decidable else ""
            score = self.scores.get(pair) if is_decidable else None
            built_in = describe_failure(verdict, answer, case.expected, self.config.reveal_answer)
            feedback = score.feedback if score and score.feedback else built_in
            judged.append(Judgement(verdict, answer, raised, score.reward if score else None, feedback))
        return judged

    def can_verify(self, answers: Sequence[str]) -> list[bool]:
        """Whether each expected answer can be parsed and equals itself.

        Raises ConfigError if a custom checker raises: that is a fault of the checker, not of the answers.
        """
        pairs = list(dict.fromkeys((a, a) for a in answers))
        verdicts = self._judge_pairs(pairs, no_progress)
        if raised := [(pair[0], self.raised[pair]) for pair in pairs if pair in self.raised]:
            raise ConfigError(
                f"verify.checker: {self.config.checker} raised an exception for {len(raised)} of {len(pairs)} expected "
                f"answers, first for {raised[0][0][:60]!r}: {raised[0][1]}; it must return True, False or a Score"
            )
        return [verdicts[a, a] == "correct" for a in answers]

    def _judge_pairs(self, pairs: list[tuple[str, str]], progress: Progress) -> dict[tuple[str, str], Verdict]:
        """One verdict for each pair.

        A pair whose worker was killed by a signal or timed out is judged again after all others, because a stalled
        machine is no evidence about the answer. Two timeouts, or too much CPU time, give the verdict `timeout`.
        """
        verdicts: dict[tuple[str, str], Verdict] = {}
        timed_out: set[tuple[str, str]] = set()
        remaining = pairs
        for _ in range(_ATTEMPTS):
            remaining = self._try_pairs(remaining, verdicts, timed_out, lambda: progress(len(verdicts), len(pairs)))
            if not remaining:
                return verdicts
        return verdicts | {pair: "timeout" if pair in timed_out else "error" for pair in remaining}

    def _try_pairs(
        self,
        pairs: list[tuple[str, str]],
        verdicts: dict[tuple[str, str], Verdict],
        timed_out: set[tuple[str, str]],
        progress: Callable[[], None],
    ) -> list[tuple[str, str]]:
        """Judge each pair. Returns the pairs to judge again; those that timed out are added to `timed_out`."""
        from pebble import ProcessExpired

        retry: list[tuple[str, str]] = []
        if not self._pool.active:
            self._renew_pool()
        judge = partial(run_checker, self.config.checker) if self.config.checker else answers_match
        futures = [self._pool.schedule(judge, args=list(p), timeout=self.config.timeout_seconds) for p in pairs]
        for index, (pair, future) in enumerate(zip(pairs, futures, strict=True)):
            try:
                result = future.result(self.config.timeout_seconds + _STALL_SECONDS)
                if isinstance(result, Score):
                    self.scores[pair] = result
                    result = result.passes(self.config.threshold)
                verdicts[pair] = "correct" if result else "incorrect"
            except FutureTimeout:  # the limit of the wall clock, or a lost worker
                if not future.done():
                    self._renew_pool()
                    return [*retry, *pairs[index:]]
                if pair in timed_out:
                    verdicts[pair] = "timeout"
                else:
                    timed_out.add(pair)
                    retry.append(pair)
            except OutOfTime:
                verdicts[pair] = "timeout"
            except (CancelledError, BrokenExecutor):
                retry.append(pair)
            except ProcessExpired as error:
                if (error.exitcode or 0) < 0:
                    retry.append(pair)
                else:  # it exited at its memory limit
                    verdicts[pair] = "error"
            except Exception as error:  # any error that sympy or a custom checker raises
                verdicts[pair] = "error"
                if self.config.checker:
                    self.raised[pair] = f"{type(error).__name__}: {error}"[:300]
            progress()
        return retry

    def validate_checker(self) -> None:
        """Raise ConfigError if a worker cannot load `verify.checker`."""
        if self.config.checker:
            try:
                self._pool.schedule(load_checker, args=[self.config.checker]).result(_STALL_SECONDS)
            except Exception as error:  # any error that importing a user's module raises
                raise ConfigError(f"verify.checker: cannot load {self.config.checker}: {error}") from None

    def close(self) -> None:
        """Stop the workers."""
        self._pool.stop()
        self._pool.join()


_shared: dict[VerifyConfig, Verifier] = {}
_shared_lock = threading.Lock()


def shared_verifier(config: VerifyConfig) -> Verifier:
    """The verifier of this process for a configuration. Its workers start once and stop at exit."""
    with _shared_lock:
        if config not in _shared:
            _shared[config] = Verifier(config)
            # A finalizer and not atexit: a child process of multiprocessing runs only finalizers, and without one it
            # would wait forever for the workers when it exits.
            Finalize(None, _shared[config].close, exitpriority=100)
            try:
                _shared[config].validate_checker()
            except ConfigError:
                del _shared[config]
                raise
        return _shared[config]
