"""Loading problems from a source: cleaned, without duplicates, every excluded row counted by reason."""

from __future__ import annotations

import difflib
import hashlib
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ogls.config import READS, Columns, DataSource
from ogls.errors import DataError
from ogls.problems.sources import MAX_LISTED, Row, read_rows
from ogls.records import Problem
from ogls.verifiers.answers import find_answer

_MARKUP = re.compile(r"\s|\$|\\[()\[\],!;]")
_NO_ANSWER, _NO_TEXT, _CONFLICT, _ID_CONFLICT = "no answer", "not text", "two answers", "one id, two problems"
# Reasons that count toward problems.max_unusable; `splits` finds the last two.
UNUSABLE = (_NO_ANSWER, _NO_TEXT, "unusable answer", "too long")


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

    def extend(self, other: Exclusions) -> None:
        """Add the rows of another report."""
        self.counts += other.counts
        for reason, names in other.named.items():
            self.named[reason] = [*self.named.get(reason, []), *names][:MAX_LISTED]

    def describe(self, reason: str) -> str:
        """The first names under a reason, and how many more there are."""
        remaining = self.counts[reason] - len(self.named[reason])
        return ", ".join(self.named[reason]) + (f" and {remaining} more" if remaining else "")


def load_problems(
    source: DataSource, split: str, report: Exclusions, pattern: str = "", further: Sequence[str] = ()
) -> list[Problem]:
    """The problems of a source. Rows without text or answer, duplicates, and problems with two different answers are
    left out and reported. `pattern` finds answers that are neither boxed nor after #### (`find_answer`). `further` are
    the names of columns to keep as text in `Problem.columns`.

    Raises DataError for a missing, empty or malformed source, for a missing column, and if one id stands for two
    problems.
    """
    rows = read_rows(source)
    _require_columns(rows, source, further)
    problems: dict[str, Problem] = {}
    ids: dict[str, str] = {}
    conflicts: set[str] = set()
    for number, row in enumerate(rows[: source.limit], start=1):
        try:
            problem = read_problem(row, source.columns, split, pattern, further)
        except ValueError as error:
            report.add(_NO_TEXT, f"row {number} ({error})")
            continue
        text = normalize_text(problem.problem)
        if not text or not problem.answer:
            report.add("empty problem" if not text else _NO_ANSWER, f"{problem.problem_id} (row {number})")
        elif text in problems:
            first = problems[text]
            if normalize_text(first.answer) == normalize_text(problem.answer):
                report.add("duplicate", problem.problem_id)
            else:
                conflicts.add(text)
                report.add(_CONFLICT, f"{first.problem_id} ({first.answer[:20]!r} and {problem.answer[:20]!r})")
        elif problem.problem_id in ids:
            report.add(_ID_CONFLICT, problem.problem_id)
        else:
            problems[text] = problem
            ids[problem.problem_id] = text
    if n := report.counts[_ID_CONFLICT]:
        raise DataError(
            f"{source.source}: {n} ids stand for two different problems: {report.describe(_ID_CONFLICT)}; "
            "make the ids unique, or set columns.id to a column that does not exist to derive ids from the text"
        )
    return [problem for text, problem in problems.items() if text not in conflicts]


def _require_columns(rows: list[Row], source: DataSource, further: Sequence[str]) -> None:
    """Raise DataError if no row has the column of the problem, of an answer or a solution, or one of `further`."""
    columns, names = source.columns, {name for row in rows for name in row}
    listed = ", ".join(sorted(map(str, names)))
    if columns.problem not in names:
        chat = next((name for name in ("messages", "prompt") if name in names), None)
        advice = f'columns.problem = "{chat}"' if chat else "columns.problem"
        raise DataError(f"{source.source} has no column {columns.problem}; it has {listed}: set {advice}")
    if not {columns.answer, columns.solution} & names and not is_chat(rows[0].get(columns.problem)):
        raise DataError(
            f"{source.source} has neither a column {columns.answer} nor a column {columns.solution}; it has {listed}: "
            "set columns.answer or columns.solution"
        )
    if absent := [name for name in further if name not in names]:
        raise absent_columns(source.source, absent, sorted(map(str, names)))


def read_problem(row: Row, columns: Columns, split: str, pattern: str = "", further: Sequence[str] = ()) -> Problem:
    """The problem of a row. Raises ValueError if a cell is no text."""
    cell: Any = row.get(columns.problem)
    solution = _text(row, columns.solution)
    if is_chat(cell):
        problem, reply = _from_chat(cell)
        solution = solution or reply
    else:
        problem = _text(row, columns.problem)
    derived_id = "p-" + hashlib.sha256(normalize_text(problem).encode(errors="replace")).hexdigest()[:12]
    answer = _answer(_text(row, columns.answer), solution, pattern)
    kept = {name: text for name in further if (text := _text(row, name))}
    return Problem(_text(row, columns.id) or derived_id, problem, answer, solution or None, split, kept)


def _text(row: Row, column: str) -> str:
    """A cell as text; empty if it is missing. Raises ValueError if it is neither text nor a finite number."""
    value = row.get(column)
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{column} is a {type(value).__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{column} is {value}")
    return str(value).strip().encode("utf-8", "replace").decode()  # JSON may contain a lone surrogate, Arrow may not


def is_chat(cell: Any) -> bool:
    """Whether a cell is a list of chat messages."""
    return isinstance(cell, list) and bool(cell) and all(isinstance(m, dict) and "role" in m for m in cell)


def _from_chat(messages: list[dict[str, Any]]) -> tuple[str, str]:
    """(the user's message, the assistant's reply or an empty string). Raises ValueError for several turns."""
    by_role: dict[Any, list[str]] = {}
    for message in messages:
        by_role.setdefault(message["role"], []).append(_text(message, "content"))
    users, replies = by_role.get("user", []), by_role.get("assistant", [])
    if len(users) != 1 or len(replies) > 1:
        raise ValueError(f"a chat with {len(users)} user and {len(replies)} assistant messages, not one of each")
    return users[0], replies[0] if replies else ""


def _answer(answer: str, solution: str, pattern: str) -> str:
    """The marked part of the answer (`find_answer`), else the whole answer, else the marked part of the solution."""
    return find_answer(answer, pattern=pattern) or answer or find_answer(solution, pattern=pattern) or ""


def absent_columns(source: str, absent: Sequence[str], names: Sequence[str]) -> DataError:
    """The error for columns that pools read and that a source with the columns `names` lacks."""
    near = difflib.get_close_matches(absent[0], [*READS, *names], n=1, cutoff=0.7)
    hint = f"; did you mean {near[0]}?" if near else ""
    return DataError(
        f"{source} has no column {', '.join(absent)}, which a pool of teacher.pools reads, or steer.sources depends "
        f"on; it has {', '.join(names)}{hint}"
    )


def normalize_text(text: str) -> str:
    """Text for comparison: NFKC, case-folded, without white space and math delimiters."""
    return _MARKUP.sub("", unicodedata.normalize("NFKC", text).casefold())
