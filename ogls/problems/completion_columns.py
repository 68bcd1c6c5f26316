"""Which columns of a source hold the problem, its completions, and what stands beside each completion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ogls.config import Columns
from ogls.errors import DataError
from ogls.problems.load import absent_columns
from ogls.problems.sources import Row

BESIDE = ("correct", "finish_reason", "token_ids", "logprobs")  # columns with one entry for each completion


@dataclass(frozen=True)
class CompletionColumns:
    """The columns of a source of completions.

    `a.b` is the field b of the column a, or of each entry of a list in it; `*.b` stands for every column that has a
    field b. `correct`, `token_ids` and `logprobs` have one column, or as many as `completion`, in the same order.
    """

    problem: Columns = field(default_factory=Columns)
    completion: tuple[str, ...] = ("completion",)
    correct: tuple[str, ...] = ()
    finish_reason: tuple[str, ...] = ()
    token_ids: tuple[str, ...] = ()
    logprobs: tuple[str, ...] = ()
    messages: str = ""  # a chat whose last user message is the problem, and whose last message is the completion


def expand_columns(
    columns: CompletionColumns, rows: Sequence[Row], source: str, further: Sequence[str]
) -> CompletionColumns:
    """The columns without `*`. Raises DataError if a column is missing, or if their numbers differ."""
    names = list(dict.fromkeys(name for row in rows for name in row))

    def exists(path: str) -> bool:
        return any(cell_of(row, path) is not None for row in rows)

    def expand(option: str, paths: Sequence[str]) -> tuple[str, ...]:
        found: list[str] = []
        for path in paths:
            named = [f"{name}.{path[2:]}" for name in names] if path.startswith("*.") else [path]
            existing = [p for p in named if exists(p)]
            if not existing:
                raise DataError(f"{source} has no column {path}; it has {', '.join(names)}: set --{option}")
            found += existing
        return tuple(found)

    one = columns.messages or columns.problem.problem
    expand("messages" if columns.messages else "problem", [one])
    if absent := [name for name in further if not exists(name)]:
        raise absent_columns(source, absent, names)
    defaults = Columns()
    for name in ("answer", "solution", "id"):
        if (path := getattr(columns.problem, name)) != getattr(defaults, name):
            expand(name, [path])
    completion = () if columns.messages else expand("completion", columns.completion)
    others = {}
    for name in BESIDE:
        paths = others[name] = expand(name.replace("_", "-"), getattr(columns, name))
        if len(paths) not in (0, max(1, len(completion))):
            raise DataError(
                f"{source}: {len(completion)} completion columns, but {len(paths)} of --{name.replace('_', '-')}: "
                "name one for each, in the same order"
            )
    return CompletionColumns(columns.problem, completion, messages=columns.messages, **others)


def cell_of(row: Any, path: str) -> Any:
    """The value of a column; `a.b` is the field b of the column a, or of every entry of a list in it."""
    if isinstance(row, dict) and path in row:
        return row[path]
    name, dot, rest = path.partition(".")
    inner = row.get(name) if isinstance(row, dict) and dot else None
    if isinstance(inner, list):
        values = [cell_of(entry, rest) for entry in inner]
        return values if any(v is not None for v in values) else None
    return cell_of(inner, rest) if isinstance(inner, dict) else None
