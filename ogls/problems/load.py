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
    """What was left out, by reason, and the first few names of each."""

    counts: Counter[str] = field(default_factory=Counter)
    named: dict[str, list[str]] = field(default_factory=dict)

    def note(self, reason: str, name: str) -> None:
        self.counts[reason] += 1
        self.named.setdefault(reason, [])
        if len(self.named[reason]) < MAX_LISTED:
            self.named[reason].append(name)

    def words(self, reason: str) -> str:
        more = self.counts[reason] - len(self.named[reason])
        return ", ".join(self.named[reason]) + (f" and {more} more" if more else "")


def load_problems(source: DataSource, split: str, report: Exclusions) -> list[Problem]:
    """The source's problems, without those of equal text and those without text or answer (both reported).

    Raises DataError for a file that is missing or malformed (with line numbers), for a column that is not
    there, and for one id given to two problems.
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
            report.note("empty problem" if not text else "no answer", f"{problem.problem_id} (row {number})")
        elif text in problems:
            report.note("duplicate", problem.problem_id)
        elif problem.problem_id in ids:
            report.note("one id, two problems", problem.problem_id)
        else:
            problems[text] = problem
            ids[problem.problem_id] = text
    if n := report.counts["one id, two problems"]:
        raise DataError(
            f"{source.source}: {n} ids stand for two different problems: {report.words('one id, two problems')}; "
            "make ids unique, or set columns.id to a name that is not there to have them made"
        )
    return list(problems.values())


def _problem(row: dict[str, Any], source: DataSource, split: str) -> Problem:
    def text(column: str) -> str:
        value = row.get(column)
        clean = "" if value is None else str(value).strip()
        return clean.encode("utf-8", "replace").decode()  # a lone surrogate fits in JSON, and in no table

    columns = source.columns
    problem, solution = text(columns.problem), text(columns.solution)
    made = "p-" + hashlib.sha256(normalize_text(problem).encode(errors="replace")).hexdigest()[:12]
    return Problem(text(columns.id) or made, problem, _answer(text(columns.answer), solution), solution or None, split)


def _answer(answer: str, solution: str) -> str:
    """The answer's own box or ####, the answer bare, or the box or #### of the solution."""
    return find_answer(answer) or answer or find_answer(solution) or ""


def normalize_text(text: str) -> str:
    """Text for comparison: compatibility forms unified, case, white space and math delimiters ignored."""
    return _MARKUP.sub("", unicodedata.normalize("NFKC", text).casefold())
