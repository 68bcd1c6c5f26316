r"""Chains of operations modulo ten, and the imperfect texts about them that the seed model is raised on.

A problem is `3+4\times2-5`, solved strictly left to right; its solution writes out every step and ends in a
boxed answer. Each fact (a, op, b) has its own error rate in the pretraining text and one wrong result that it
is mistaken for, so the seed model learns the procedure and stays unsure of facts. Half the texts show a
solution in the context first and then repeat it, some of them tersely (the boxed answer alone): the style
shift that privileged text causes in real models, made visible.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

OPERATIONS = ("+", "-", r"\times")


@dataclass(frozen=True)
class World:
    """The facts and how often the pretraining text gets each wrong."""

    seed: int = 0
    error_rates: tuple[float, ...] = (0.0, 0.1, 0.3, 0.6)
    error_shares: tuple[float, ...] = (0.52, 0.20, 0.16, 0.12)
    context_share: float = 0.5
    terse_share: float = 0.5

    @cached_property
    def mistakes(self) -> dict[tuple[int, str, int], tuple[float, int]]:
        """Per fact its error rate and the wrong digit it is mistaken for."""
        rng = np.random.default_rng([self.seed, 1])
        table = {}
        for a in range(10):
            for op in OPERATIONS:
                for b in range(10):
                    rate = float(rng.choice(self.error_rates, p=self.error_shares))
                    table[a, op, b] = rate, int((apply(a, op, b) + rng.integers(1, 10)) % 10)
        return table

    def solution(self, problem: Problem, rng: np.random.Generator | None = None) -> str:
        """Every step and the boxed answer; with an rng, facts go wrong at their rates."""
        value, lines = problem.start, []
        for op, operand in problem.steps:
            result = apply(value, op, operand)
            if rng is not None:
                rate, wrong = self.mistakes[value, op, operand]
                result = wrong if rng.random() < rate else result
            lines.append(f"{value}{op}{operand}={result}")
            value = result
        return "\n".join([*lines, boxed(value)])

    def pretraining_text(self, rng: np.random.Generator) -> tuple[Problem, str | None, str]:
        """One text: a problem, the solution shown in the context (or None), and the completion."""
        problem = draw(rng)
        solution = self.solution(problem, rng)
        if rng.random() >= self.context_share:
            return problem, None, solution
        terse = rng.random() < self.terse_share
        return problem, solution, solution.rsplit("\n", 1)[1] if terse else solution


@dataclass(frozen=True)
class Problem:
    """A chain: a first digit and three to six (operation, digit) steps."""

    start: int
    steps: tuple[tuple[str, int], ...]

    @property
    def text(self) -> str:
        return f"Modulo 10, left to right: ${self.start}{''.join(f'{op}{b}' for op, b in self.steps)}$"

    @property
    def answer(self) -> str:
        value = self.start
        for op, operand in self.steps:
            value = apply(value, op, operand)
        return str(value)


def apply(a: int, op: str, b: int) -> int:
    """One fact, modulo ten."""
    return {"+": a + b, "-": a - b, r"\times": a * b}[op] % 10


def boxed(value: int) -> str:
    return rf"\boxed{{{value}}}"


def draw(rng: np.random.Generator) -> Problem:
    """A random chain."""
    steps = tuple((OPERATIONS[rng.integers(3)], int(rng.integers(10))) for _ in range(rng.integers(3, 7)))
    return Problem(int(rng.integers(10)), steps)


def problem_rows(world: World, count: int, seed: int, exclude: frozenset[str] = frozenset()) -> list[dict[str, str]]:
    """`count` distinct problems as rows for JSONL, none of whose texts is in `exclude`."""
    rng = np.random.default_rng([world.seed, 2, seed])
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < count:
        problem = draw(rng)
        if problem.text not in exclude:
            rows.setdefault(
                problem.text,
                {"problem": problem.text, "solution": world.solution(problem), "answer": problem.answer},
            )
    return [{"id": f"tiny-{seed}-{i:04d}", **row} for i, row in enumerate(rows.values())]
