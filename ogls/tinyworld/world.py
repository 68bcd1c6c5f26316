r"""Chains of operations modulo ten, and the pretraining texts of the seed model, which contain errors.

A problem such as `3+4\times2-5` is solved strictly left to right. Its solution has one line per step and ends in a
boxed answer. In the pretraining texts, each fact (a, op, b) has its own error rate and always the same wrong result, so
the seed model learns the procedure and stays uncertain about the facts. Half of the texts show a solution in the
context and then repeat it, some of them tersely (only the boxed answer). This reproduces, in a measurable form, the
style shift that privileged text causes in real models.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

OPERATIONS = ("+", "-", r"\times")


@dataclass(frozen=True)
class World:
    """The facts, their error rates, and the kinds of pretraining texts."""

    seed: int = 0
    error_rates: tuple[float, ...] = (0.0, 0.1, 0.3, 0.6)  # a fact's error rate is one of these
    error_shares: tuple[float, ...] = (0.52, 0.20, 0.16, 0.12)  # probability of each error rate
    context_share: float = 0.5  # share of texts with a solution in the context
    terse_share: float = 0.5  # share of these with a terse completion

    @cached_property
    def mistakes(self) -> dict[tuple[int, str, int], tuple[float, int]]:
        """Error rate and wrong result of each fact (a, op, b)."""
        rng = np.random.default_rng([self.seed, 1])
        table = {}
        for a in range(10):
            for op in OPERATIONS:
                for b in range(10):
                    rate = float(rng.choice(self.error_rates, p=self.error_shares))
                    table[a, op, b] = rate, int((apply_operation(a, op, b) + rng.integers(1, 10)) % 10)
        return table

    def solution(self, problem: Problem, rng: np.random.Generator | None = None) -> str:
        """Return one line per step and the boxed answer. With an rng, facts are wrong at their error rates."""
        value, lines = problem.start, []
        for op, operand in problem.steps:
            result = apply_operation(value, op, operand)
            if rng is not None:
                rate, wrong = self.mistakes[value, op, operand]
                result = wrong if rng.random() < rate else result
            lines.append(f"{value}{op}{operand}={result}")
            value = result
        return "\n".join([*lines, boxed(value)])

    def pretraining_text(self, rng: np.random.Generator) -> tuple[Problem, str | None, str]:
        """Return a random problem, the solution shown in the context (or None), and the completion."""
        problem = random_problem(rng)
        solution = self.solution(problem, rng)
        if rng.random() >= self.context_share:
            return problem, None, solution
        terse = rng.random() < self.terse_share
        return problem, solution, solution.rsplit("\n", 1)[1] if terse else solution


@dataclass(frozen=True)
class Problem:
    """A chain of operations: a first digit, then (operation, digit) steps."""

    start: int
    steps: tuple[tuple[str, int], ...]

    @property
    def text(self) -> str:
        """The question."""
        return f"Modulo 10, left to right: ${self.start}{''.join(f'{op}{b}' for op, b in self.steps)}$"

    @property
    def answer(self) -> str:
        """The correct result, one digit."""
        value = self.start
        for op, operand in self.steps:
            value = apply_operation(value, op, operand)
        return str(value)


def apply_operation(a: int, op: str, b: int) -> int:
    """Return the result of `a op b` modulo ten."""
    return {"+": a + b, "-": a - b, r"\times": a * b}[op] % 10


def boxed(value: int) -> str:
    r"""Return `\boxed{value}`."""
    return rf"\boxed{{{value}}}"


def random_problem(rng: np.random.Generator) -> Problem:
    """Return a random problem of three to six steps."""
    steps = tuple((OPERATIONS[rng.integers(3)], int(rng.integers(10))) for _ in range(rng.integers(3, 7)))
    return Problem(int(rng.integers(10)), steps)


def problem_rows(world: World, count: int, seed: int, exclude: frozenset[str] = frozenset()) -> list[dict[str, str]]:
    """Return `count` distinct problems as rows for a JSONL file, without those with a text in `exclude`."""
    rng = np.random.default_rng([world.seed, 2, seed])
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < count:
        problem = random_problem(rng)
        if problem.text not in exclude:
            rows.setdefault(
                problem.text,
                {"problem": problem.text, "solution": world.solution(problem), "answer": problem.answer},
            )
    return [{"id": f"tiny-{seed}-{i:04d}", **row} for i, row in enumerate(rows.values())]
