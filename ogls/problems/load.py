"""Loading problems from a source: cleaned, without duplicates, every excluded row counted by reason."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from ogls.config import DataSource
from ogls.errors import DataError
from ogls.problems.sources import MAX_LISTED, read_rows
from ogls.records import Problem
from ogls.verifiers.answers import find_answer

_MARKUP = re.compile(r"\s|\$|\\[()\[\],!;]")


@dataclass
class Exclusions:
    """Rows that were excluded: a count by reason, and the first names of each reason."""

    counts: Counter[str] = field(default_factory=Counter)
    named: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        """Count a row under a reason; its name is kept if it is one of the first."""
        self.counts[reason] += 1
        self.named.setdefault(reason, [])
        if len(self.named[reason]) < MAX_LISTED:
            self.named[reason].append(name)

    def describe(self, reason: str) -> str:
        """The first names under a reason, and how many more there are."""
        remaining = self.counts[reason] - len(self.named[reason])
        return ", ".join(self.named[reason]) + (f" and {remaining} more" if remaining else "")


def load_problems(source: DataSource, split: str, report: Exclusions) -> list[Problem]:
    """The problems of a source, without duplicates of equal text and rows without text or answer (both are reported).

    Raises DataError for a missing or malformed file (with line numbers), for a missing column, and if one id stands for
    two problems.
    """
    columns = source.columns
    rows = list(read_rows(source))
    if rows and not any(columns.problem in row for row in rows):
        raise DataError(
            f"{source.source} has no column {columns.problem}; it has {', '.join(sorted(rows[0]))}: "
            "set the names under columns"
        )
    problems: dict[str, Problem] = {}
    ids: dict[str, str] = {}
    for number, row in enumerate(rows[: source.limit], start=1):
        problem = _problem(row, source, split)
        text = normalize_text(problem.problem)
        if not text or not problem.answer:
            report.add("empty problem" if not text else "no answer", f"{problem.problem_id} (row {number})")
        elif text in problems:
            report.add("duplicate", problem.problem_id)
        elif problem.problem_id in ids:
            report.add("one id, two problems", problem.problem_id)
        else:
            problems[text] = problem
            ids[problem.problem_id] = text
    if n := report.counts["one id, two problems"]:
        raise DataError(
            f"{source.source}: {n} ids stand for two different problems: {report.describe('one id, two problems')}; "
            "make the ids unique, or set columns.id to a column that does not exist to derive ids from the text"
        )
    return list(problems.values())


def _problem(row: dict[str, Any], source: DataSource, split: str) -> Problem:
    def text(column: str) -> str:
        value = row.get(column)
        clean = "" if value is None else str(value).strip()
        return clean.encode("utf-8", "replace").decode()  # JSON may contain a lone surrogate, Arrow strings may not

    columns = source.columns
    problem, solution = text(columns.problem), text(columns.solution)
    derived_id = "p-" + hashlib.sha256(normalize_text(problem).encode(errors="replace")).hexdigest()[:12]
    return Problem(
        text(columns.id) or derived_id, problem, _answer(text(columns.answer), solution), solution or None, split
    )


def _answer(answer: str, solution: str) -> str:
    """The boxed or #### part of the answer, else the whole answer, else the boxed or #### part of the solution."""
    return find_answer(answer) or answer or find_answer(solution) or ""


def normalize_text(text: str) -> str:
    """Text for comparison: NFKC, case-folded, without white space and math delimiters."""
    return _MARKUP.sub("", unicodedata.normalize("NFKC", text).casefold())
