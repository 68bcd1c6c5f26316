"""Verification: finding answers, verdicts, and completions that try to hang, crash or slow down a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import REPO

from ogls.config import VerifyConfig
from ogls.errors import ConfigError
from ogls.verifiers.answers import find_answer
from ogls.verifiers.pool import Case, Verifier, shared_verifier

GSM8K = REPO.parent / "shared" / "data" / "gsm8k"
LIMIT = 3.0


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    verifier = Verifier(VerifyConfig(timeout_seconds=LIMIT, memory_mb=1024))
    verifier.can_verify(["1"])  # start the workers before a test measures time
    yield verifier
    verifier.close()


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{2}", "2"),
        (r"\boxed{1} then \boxed{\frac{1}{2}} end", r"\frac{1}{2}"),
        (r"\boxed{7} and \boxed{8", "7"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{}", None),
        ("so\n#### 42 \n", "42"),
        ("no answer", None),
        ("", None),
    ],
)
def test_the_last_complete_box_is_the_answer(text: str, answer: str | None) -> None:
    assert find_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("3 + 5 = 8\nA: 8", "8"),
        ("A: 7\nso\nA: 2,000 \nthat is it", "2,000"),
        ("A: 7\n#### 8", "8"),
        (r"A: 7, or \boxed{9}", "9"),
        ("the letter A: 7", None),
    ],
)
def test_a_pattern_finds_the_answer_of_other_forms(text: str, answer: str | None) -> None:
    assert find_answer(text, pattern="^A: (.+)$") == answer


def test_unboxed_text_is_an_answer_only_if_allowed() -> None:
    assert find_answer("it is 5", require_boxed=False) == "it is 5"


@pytest.mark.parametrize(
    ("text", "finish", "expected", "verdict"),
    [
        (r"\boxed{0.5}", "stop", r"\frac{1}{2}", "correct"),
        (r"\boxed{1,080}", "stop", "1080", "correct"),
        (r"\boxed{x+1}", "stop", "1+x", "correct"),
        (r"\boxed{6}", "stop", "7", "incorrect"),
        (r"\boxed{gibberish of words}", "stop", "7", "incorrect"),
        ("seven", "stop", "7", "no_answer"),
        (r"\boxed{7} and so on and on", "length", "7", "truncated"),
    ],
)
def test_verdicts(verifier: Verifier, text: str, finish: str, expected: str, verdict: str) -> None:
    assert verifier.judge([Case(text, finish, expected)])[0].verdict == verdict


HOSTILE = {
    "tower": r"\boxed{9^{9^{9^{9^9}}}}",
    "huge exponent": r"\boxed{10^{10^{10}}}",
    "factorial": r"\boxed{1000000!}",
    "sum": r"\boxed{\sum_{n=1}^{10^9} n!}",
    "integral": r"\boxed{\int_0^1 x^{x^{x^x}} dx}",
    "100,000 characters": r"\boxed{" + "7" * 100_000 + "}",
    "1,900 digits": r"\boxed{" + "7" * 1900 + "}",
    "deep fractions": r"\boxed{" + r"\frac{1}{" * 100 + "1" + "}" * 101,
    "deep parentheses": r"\boxed{" + "(" * 900 + "1" + ")" * 900 + "}",
    "deep roots": r"\boxed{" + r"\sqrt{" * 200 + "2" + "}" * 201,
    "a thousand boxes": r"\boxed{6}" * 1000,
    "NULs": "\\boxed{\x00\x00\x01}",
    "lone surrogate": "\\boxed{\ud800}",
    "unbalanced braces": r"\boxed{{{{{7" + "}" * 3,
    "only braces": "{" * 5000 + "}" * 5000,
    "a large set": r"\boxed{\{" + ",".join(map(str, range(450))) + r"\}}",
    "a large matrix": r"\boxed{\begin{pmatrix}" + "&".join(["1"] * 400) + r"\end{pmatrix}}",
    "minus signs": r"\boxed{" + "-" * 1500 + "1}",
    "python": r"\boxed{__import__('os').system('touch /tmp/pwned')}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_completions_get_a_verdict_within_the_limit(verifier: Verifier, name: str) -> None:
    started = time.monotonic()
    (judgement,) = verifier.judge([Case(HOSTILE[name], "stop", "7")])
    assert judgement.verdict in ("incorrect", "no_answer", "timeout", "error")
    assert time.monotonic() - started < 2 * LIMIT + 25  # two attempts, and the restart of a worker


def test_a_worker_that_ignores_signals_is_killed_and_replaced(verifier: Verifier, monkeypatch) -> None:
    """The time limit of the worker stops what the limit of CPU time cannot; the next case is judged normally."""
    import ogls.verifiers.pool as module

    monkeypatch.setattr(module, "answers_match", _ignore_signals)
    started = time.monotonic()
    assert verifier.judge([Case(r"\boxed{1}", "stop", "2")])[0].verdict == "timeout"
    assert time.monotonic() - started < 2 * LIMIT + 25
    monkeypatch.setattr(module, "answers_match", _allocate_too_much)
    assert verifier.judge([Case(r"\boxed{1}", "stop", "3")])[0].verdict == "error"
    monkeypatch.undo()
    assert verifier.judge([Case(r"\boxed{7}", "stop", "7")])[0].verdict == "correct"


@pytest.mark.parametrize("busy", [False, True])
def test_the_limit_of_an_answer_is_cpu_time(monkeypatch: pytest.MonkeyPatch, busy: bool) -> None:
    """Waiting for a busy machine does not count: verdicts must not depend on what else runs."""
    import math_verify

    from ogls.verifiers import math

    def compute() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            pass

    def parse_slowly(*args: Any, **kwargs: Any) -> list[str]:
        if busy:
            with suppress(BaseException):  # as a bare `except` of sympy would
                compute()
            compute()
        time.sleep(0.4)
        return ["7"]

    monkeypatch.setattr(math, "_CPU_SECONDS", 0.2)
    monkeypatch.setattr(math_verify, "parse", parse_slowly)
    with pytest.raises(math.OutOfTime) if busy else nullcontext():
        assert math.answers_match("7", "7")


def test_a_timeout_is_judged_again(verifier: Verifier, tmp_path: Path, monkeypatch) -> None:
    """A stalled machine must not make a good answer unusable or undecided."""
    import ogls.verifiers.pool as module

    monkeypatch.setattr(module, "answers_match", _time_out_once)
    assert verifier.judge([Case(rf"\boxed{{{tmp_path}/judged}}", "stop", "7")])[0].verdict == "correct"
    assert verifier.can_verify([f"{tmp_path}/expected"]) == [True]


def _time_out_once(answer: str, expected: str) -> bool:
    if not Path(answer).exists():
        Path(answer).touch()
        raise FutureTimeout  # as a wait for a stalled machine does
    return True


def _ignore_signals(answer: str, expected: str) -> bool:
    import signal

    signal.signal(signal.SIGPROF, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        time.sleep(1)


def _allocate_too_much(answer: str, expected: str) -> bool:
    return len(bytearray(4 << 30)) > 0


def test_judging_from_a_thread_works(verifier: Verifier) -> None:
    verdicts: list[str] = []
    cases = [Case(rf"\boxed{{{i}}}", "stop", "3") for i in range(6)]
    threads = [threading.Thread(target=lambda: verdicts.extend(j.verdict for j in verifier.judge(cases))) for _ in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(verdicts) == ["correct"] * 2 + ["incorrect"] * 10


def test_usable_answers(verifier: Verifier) -> None:
    assert verifier.can_verify(["7", r"\frac{1}{2}", "", "}{"]) == [True, True, False, False]


@pytest.mark.skipif(not GSM8K.exists(), reason="GSM8K is not in shared/data")
def test_all_gsm8k_references_are_correct(verifier: Verifier) -> None:
    rows = [json.loads(line) for name in ("train", "test") for line in (GSM8K / f"{name}.jsonl").open()]
    cases = [Case(r["answer"], "stop", r["answer"].rsplit("####", 1)[1].strip()) for r in rows]
    assert len(cases) == 8792
    assert {j.verdict for j in verifier.judge(cases)} == {"correct"}
    wrong = [Case(c.text, "stop", f"{c.expected}1") for c in cases[:500]]
    assert "correct" not in {j.verdict for j in verifier.judge(wrong)}


def test_a_user_defined_checker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_checker.py").write_text(
        "def same_letters(answer, expected):\n"
        "    if answer == 'odd': return 'maybe'\n"
        "    return sorted(answer) == sorted(expected)\n"
    )
    monkeypatch.chdir(tmp_path)
    verifier = shared_verifier(VerifyConfig(workers=1, checker="my_checker:same_letters"))
    cases = [Case(f"so \\boxed{{{a}}}", "stop", "tea") for a in ("eat", "eaten", "odd")]
    assert [j.verdict for j in verifier.judge(cases)] == ["correct", "incorrect", "error"]
    assert verifier.can_verify(["tea"]) == [True]


@pytest.mark.parametrize(
    ("checker", "error"), [("nobody:f", "No module named 'nobody'"), ("json:f", "no attribute 'f'")]
)
def test_a_missing_checker_is_refused(checker: str, error: str) -> None:
    with pytest.raises(ConfigError, match=rf"verify\.checker: cannot load {checker}: .*{error}"):
        shared_verifier(VerifyConfig(workers=1, checker=checker))


def test_a_checker_that_raises_is_shown_and_the_data_is_not_blamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "def equal(answer, expected):\n    return {'8': True}.get(answer) or {}['units']\n"
    (tmp_path / "raising_checker.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    verifier = shared_verifier(VerifyConfig(workers=1, checker="raising_checker:equal"))
    judged = verifier.judge([Case(r"\boxed{7}", "stop", "7"), Case(r"\boxed{8}", "stop", "8")])
    assert [(j.verdict, j.raised) for j in judged] == [("error", "KeyError: 'units'"), ("correct", "")]
    message = r"raised an exception for 1 of 2 expected answers, first for '7': KeyError: 'units'"
    with pytest.raises(ConfigError, match=message):
        verifier.can_verify(["8", "7"])


SCRIPT = r"""
from ogls.config import VerifyConfig
from ogls.verifiers.pool import Case, Verifier
{guard}:
    verifier = Verifier(VerifyConfig(workers=1))
    print(verifier.judge([Case(r"\boxed{{7}}", "stop", "7")]))
    verifier.close()
"""


@pytest.mark.parametrize("guard", ["if True", 'if __name__ == "__main__"'])
def test_a_script_without_a_main_guard_is_refused_at_once(tmp_path: Path, guard: str) -> None:
    """Without the check its workers would run the script again, which starts workers, and so on."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(guard=guard))
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    command = [sys.executable, str(script)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    if guard == "if True":
        assert result.returncode == 1
        assert "each of them imports this script; put its code under `if __name__" in result.stderr
    else:
        assert "verdict='correct'" in result.stdout
