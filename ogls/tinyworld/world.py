r"""Chains of operations modulo ten, and the pretraining texts of the seed model, which contain errors.

A problem such as `3+4\times2-5` is solved strictly left to right. Its solution has one line per step and ends in a
boxed answer. In the pretraining texts, each fact (a, op, b) has its own error rate and always the same wrong result, so
the seed model learns the procedure and stays uncertain about the facts. Half of the texts show a solution in the
context and then repeat it, some of them tersely (only the boxed answer). This reproduces, in a measurable form, the
style shift that privileged text causes in real models. Three more shares change how the model writes after a text that
it has read: it is terse, it comments on an attempt (reflection), or the solutions take a route that the model does not
take by itself (foreign). With the default shares no random number is drawn for the last two, so the shipped texts and
problems stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

OPERATIONS = ("+", "-", r"\times")
REFLECTIONS = (
    "The attempt says {result} here.",
    "Wait, the attempt has {fact}={result}.",
    "Let me check {fact}: the attempt says {result}.",
)


@dataclass(frozen=True)
class World:
    """The facts, their error rates, and the kinds of pretraining texts."""

    seed: int = 0
    error_rates: tuple[float, ...] = (0.0, 0.1, 0.3, 0.6)  # a fact's error rate is one of these
    error_shares: tuple[float, ...] = (0.52, 0.20, 0.16, 0.12)  # probability of each error rate
    context_share: float = 0.5  # share of texts with a solution in the context
    terse_share: float = 0.5  # share of these with a terse completion
    reflection_share: float = 0.0  # share of these whose completion comments on the solution that was read
    foreign_share: float = 0.0  # share of solutions, in contexts and in the problems' files, that take another route
    steps: tuple[int, int] = (3, 6)  # fewest and most steps of a problem

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

    def results(self, problem: Problem, rng: np.random.Generator | None = None) -> list[int]:
        """Return the result of each step. With an rng, facts are wrong at their error rates."""
        value, results = problem.start, []
        for op, operand in problem.steps:
            result = apply_operation(value, op, operand)
            if rng is not None:
                rate, wrong = self.mistakes[value, op, operand]
                result = wrong if rng.random() < rate else result
            results.append(result)
            value = result
        return results

    def solution(self, problem: Problem, rng: np.random.Generator | None = None) -> str:
        """Return one line per step and the boxed answer. With an rng, facts are wrong at their error rates."""
        return _own_solution(problem, self.results(problem, rng))

    def pretraining_text(self, rng: np.random.Generator) -> tuple[Problem, str | None, str]:
        """Return a random problem, the solution shown in the context (or None), and the completion."""
        problem = random_problem(rng, self.steps)
        results = self.results(problem, rng)
        solution = _own_solution(problem, results)
        if rng.random() >= self.context_share:
            return problem, None, solution
        shown = self._shown(problem, results, rng)
        if rng.random() < self.terse_share:
            return problem, shown, boxed(results[-1])
        if shown != solution:  # a foreign solution is copied half the time; else the model finds its own way to the end
            return problem, shown, shown if rng.random() < 0.5 else solution
        if self.reflection_share and rng.random() < self.reflection_share:
            return problem, shown, reflect(problem, results, rng)
        return problem, shown, solution

    def reference(self, problem: Problem, rng: np.random.Generator) -> str:
        """Return the correct solution by its own route or, at `foreign_share`, by the foreign one."""
        return self._shown(problem, self.results(problem), rng)

    def _shown(self, problem: Problem, results: list[int], rng: np.random.Generator) -> str:
        if self.foreign_share and rng.random() < self.foreign_share:
            return foreign_solution(problem, results)
        return _own_solution(problem, results)


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


def foreign_solution(problem: Problem, results: list[int]) -> str:
    """Return a solution in other words and by another route: two steps a line, so every second result is not written.

    The model never writes it unless it has read one, and cannot compute two steps at once.
    """
    values = [problem.start, *results]
    lines = []
    for first in range(0, len(results), 2):
        pair = problem.steps[first : first + 2]
        fact = f"{values[first]}{''.join(f'{op}{b}' for op, b in pair)}"
        lines.append(f"{fact} makes {values[first + len(pair)]}.")
    return "\n".join([*lines, f"So the answer is {boxed(results[-1])}"])


def reflect(problem: Problem, results: list[int], rng: np.random.Generator) -> str:
    """Return the solution with comments on the text that was read, each before the line that it speaks of.

    A random half of the lines gets one, and at least one line; what a comment says is the same for right and wrong
    results, so it is style and carries no outcome.
    """
    lines = _equations(problem, results)
    chosen = rng.random(len(lines)) < 0.5
    chosen[rng.integers(len(lines))] = True
    out = []
    for line, commented in zip(lines, chosen, strict=True):
        if commented:
            fact, result = line.split("=")
            out.append(REFLECTIONS[rng.integers(len(REFLECTIONS))].format(fact=fact, result=result))
        out.append(line)
    return "\n".join([*out, boxed(results[-1])])


def _own_solution(problem: Problem, results: list[int]) -> str:
    """Return a line for each step and the boxed answer."""
    return "\n".join([*_equations(problem, results), boxed(results[-1])])


def _equations(problem: Problem, results: list[int]) -> list[str]:
    """Return a line for each step, such as `3+4=7`."""
    values = [problem.start, *results]
    return [f"{a}{op}{b}={result}" for a, (op, b), result in zip(values[:-1], problem.steps, results, strict=True)]


def random_problem(rng: np.random.Generator, length: tuple[int, int] = (3, 6)) -> Problem:
    """Return a random problem with a number of steps from `length[0]` to `length[1]`."""
    count = rng.integers(length[0], length[1] + 1)
    steps = tuple((OPERATIONS[rng.integers(3)], int(rng.integers(10))) for _ in range(count))
    return Problem(int(rng.integers(10)), steps)


def problem_rows(world: World, count: int, seed: int, exclude: frozenset[str] = frozenset()) -> list[dict[str, str]]:
    """Return `count` distinct problems as rows for a JSONL file, without those with a text in `exclude`."""
    rng = np.random.default_rng([world.seed, 2, seed])
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < count:
        problem = random_problem(rng, world.steps)
        if problem.text not in exclude and problem.text not in rows:
            solution = world.reference(problem, rng)
            rows[problem.text] = {"problem": problem.text, "solution": solution, "answer": problem.answer}
    return [{"id": f"tiny-{seed}-{i:04d}", **row} for i, row in enumerate(rows.values())]
