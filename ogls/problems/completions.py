"""Reading completions that exist: which column has what, and one record per completion, every bad line counted.

A row has a problem and one or more completions: in one column as a text or a list, in several columns, or as the last
message of a chat. Rows with the same problem form a group.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ogls.config import Columns, DataSource, PromptsConfig
from ogls.errors import DataError
from ogls.problems.load import Exclusions, is_chat, normalize_text, read_problem
from ogls.problems.sources import Row, read_lines
from ogls.records import Problem

_LABELS = dict.fromkeys(("true", "yes", "1", "1.0", "correct"), True) | dict.fromkeys(
    ("false", "no", "0", "0.0", "incorrect", "wrong", "failed"), False
)
_NO_LABELS = ("", "none", "null", "undecided")
_BESIDE = ("correct", "finish_reason", "token_ids", "logprobs")  # columns with one entry for each completion
_CUT = ("length", "max_tokens", "max_output_tokens", "truncated")


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


@dataclass
class _Groups:
    """The problems found so far, and what is wrong with them."""

    by_text: dict[str, Problem] = field(default_factory=dict)
    ids: dict[str, str] = field(default_factory=dict)
    conflicts: set[str] = field(default_factory=set)
    samples: dict[str, int] = field(default_factory=dict)


def read_completions(
    source: DataSource,
    columns: CompletionColumns,
    prompts: PromptsConfig,
    report: Exclusions,
    pattern: str = "",
    further: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Rows of the table imported. Lines that cannot be used are left out and reported by number.

    The template `prompts.student` around the problem in a chat is removed, because the run adds it. `pattern` finds
    answers that are neither boxed nor after #### (`find_answer`); `further` are columns to keep with the problem.
    Raises DataError for a missing or empty source, for a missing column, and if no completion is left.
    """
    lines, malformed = read_lines(source)
    for number, reason in malformed:
        report.add("malformed", f"line {number} ({reason})")
    columns = _expand(columns, [row for _, row in lines], source.source, further) if lines else columns
    groups, rows = _Groups(), []
    for number, row in lines[: source.limit]:
        try:
            problem = _problem(row, columns, prompts, groups, pattern, further)
            found = list(_completions(row, columns))
            if not found:
                raise ValueError("no completion")
        except ValueError as error:
            reason, _, detail = str(error).partition(": ")
            report.add(reason, f"line {number}" + (f" ({detail})" if detail else ""))
            continue
        for completion in found:
            if isinstance(completion, str):
                reason, _, detail = completion.partition(": ")
                report.add(reason, f"line {number}" + (f" ({detail})" if detail else ""))
                continue
            sample = groups.samples[problem.problem_id] = groups.samples.get(problem.problem_id, -1) + 1
            rows.append({"line": number, "sample": sample, **_columns_of(problem), **completion})
    conflicting = {groups.by_text[text].problem_id for text in groups.conflicts}
    rows = [row for row in rows if row["problem_id"] not in conflicting]
    if not rows:
        raise DataError(f"{source.source}: no usable completion ({describe_bad_lines(report)})")
    return rows


def describe_bad_lines(report: Exclusions) -> str:
    """The reasons for which lines were left out, with their numbers."""
    listed = [f"{count} {reason}: {report.describe(reason)}" for reason, count in report.counts.items()]
    return "; ".join(listed) or "no line was left out"


def _columns_of(problem: Problem) -> dict[str, Any]:
    return {
        "problem_id": problem.problem_id,
        "problem": problem.problem,
        "solution": problem.solution,
        "expected": problem.answer,
        "columns": json.dumps(problem.columns) if problem.columns else None,
    }


def _expand(columns: CompletionColumns, rows: Sequence[Row], source: str, further: Sequence[str]) -> CompletionColumns:
    """The columns without `*`. Raises DataError if a column is missing, or if their numbers differ."""
    names = list(dict.fromkeys(name for row in rows for name in row))

    def exists(path: str) -> bool:
        return any(_cell(row, path) is not None for row in rows)

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
        raise DataError(
            f"{source} has no column {', '.join(absent)}, which a pool of teacher.pools reads, or steer.sources "
            f"depends on; it has {', '.join(names)}"
        )
    completion = () if columns.messages else expand("completion", columns.completion)
    others = {}
    for name in _BESIDE:
        paths = others[name] = expand(name.replace("_", "-"), getattr(columns, name))
        if len(paths) not in (0, max(1, len(completion))):
            raise DataError(
                f"{source}: {len(completion)} completion columns, but {len(paths)} of --{name.replace('_', '-')}: "
                "name one for each, in the same order"
            )
    return CompletionColumns(columns.problem, completion, messages=columns.messages, **others)


def _cell(row: Any, path: str) -> Any:
    """The value of a column; `a.b` is the field b of the column a, or of every entry of a list in it."""
    if isinstance(row, dict) and path in row:
        return row[path]
    name, dot, rest = path.partition(".")
    inner = row.get(name) if isinstance(row, dict) and dot else None
    if isinstance(inner, list):
        values = [_cell(entry, rest) for entry in inner]
        return values if any(v is not None for v in values) else None
    return _cell(inner, rest) if isinstance(inner, dict) else None


def _problem(
    row: Row,
    columns: CompletionColumns,
    prompts: PromptsConfig,
    groups: _Groups,
    pattern: str,
    further: Sequence[str],
) -> Problem:
    """The problem of a row: of the group that it belongs to, or of a new one.

    Raises ValueError (`reason: detail`) if the row has no usable problem.
    """
    named = columns.problem
    cell = _cell(row, columns.messages or named.problem)
    if columns.messages or is_chat(cell):
        cell = _without_template(_last_message(cell, "user"), prompts.student)
    plain = {"problem": cell} | {n: _cell(row, getattr(named, n)) for n in ("id", "solution", "answer")}
    plain = {name: _cell(row, name) for name in further} | plain
    try:
        problem = read_problem(plain, Columns(), "train", pattern, further)
    except ValueError as error:
        raise ValueError(f"not text: {error}") from None
    text = normalize_text(problem.problem)
    if not text:
        raise ValueError("empty problem")
    first = groups.by_text.get(text)
    if first is None and not problem.answer:
        raise ValueError("no answer")
    if first is None:
        if problem.problem_id in groups.ids:
            raise ValueError(f"one id, two problems: {problem.problem_id}")
        groups.by_text[text] = problem
        groups.ids[problem.problem_id] = text
        return problem
    if problem.answer and normalize_text(problem.answer) != normalize_text(first.answer):
        groups.conflicts.add(text)
        raise ValueError(f"two answers: {first.answer[:20]!r} and {problem.answer[:20]!r}; the problem is left out")
    return first


def _last_message(messages: Any, role: str) -> str:
    """The content of the last message of a role, which is a text or a list of text parts.

    Raises ValueError if there is none. An assistant's message must be the last one that is not a system message.
    """
    if not is_chat(messages):
        raise ValueError(f"no chat: a {type(messages).__name__}, not a list of messages with role and content")
    turns = [m for m in messages if m["role"] in ("user", "assistant")]
    found = [m for m in turns if m["role"] == role]
    if not found or (role == "assistant" and turns[-1] is not found[-1]):
        raise ValueError("no completion" if role == "assistant" else "no problem: the chat has no user message")
    return _content(found[-1].get("content"))


def _content(content: Any) -> str:
    """The text of a message. Raises ValueError if it has parts that are no text."""
    if isinstance(content, list):
        if any(not isinstance(p, dict) or not isinstance(p.get("text"), str) for p in content):
            raise ValueError("not text: a message has parts that are no text")
        return "".join(p["text"] for p in content)
    if not isinstance(content, str):
        raise ValueError(f"not text: the content of a message is a {type(content).__name__}")
    return content


def _without_template(text: str, template: str) -> str:
    """The problem in a rendered student prompt; the text itself if it is none."""
    before, _, after = template.partition("{problem}")
    fits = len(text) > len(before) + len(after) and text.startswith(before) and text.endswith(after)
    return text[len(before) : len(text) - len(after)] if fits else text


def _completions(row: Row, columns: CompletionColumns) -> Iterator[dict[str, Any] | str]:
    """The completions of a row as columns of the table imported, or why one cannot be used (`reason: detail`)."""
    for index, path in enumerate(columns.completion or (columns.messages,)):
        cell = _cell(row, path)
        if columns.messages or is_chat(cell):
            cell = _last_message(cell, "assistant")
        several = len(cell) if isinstance(cell, list) else None
        facts = {name: _beside(row, columns, name, index, several) for name in _BESIDE}
        for number, text in enumerate(cell if isinstance(cell, list) else [cell]):
            try:
                yield _completion(text, **{name: values[number] for name, values in facts.items()})
            except ValueError as error:
                yield str(error)


def _beside(row: Row, columns: CompletionColumns, name: str, index: int, several: int | None) -> list[Any]:
    """What a column has beside each completion of the column `index`; `several` is their number if it has a list.

    Raises ValueError if it has not as many entries.
    """
    paths = getattr(columns, name)
    value = _cell(row, paths[index]) if paths else None
    if several is None:
        return [value]
    if value is None or (name == "finish_reason" and isinstance(value, str)):
        return [value] * several
    if not isinstance(value, list) or len(value) != several:
        given = len(value) if isinstance(value, list) else "one value"
        raise ValueError(f"list lengths: {several} completions, but {given} in {paths[index]}")
    return value


def _completion(text: Any, correct: Any, finish_reason: Any, token_ids: Any, logprobs: Any) -> dict[str, Any]:
    """One completion. Raises ValueError (`reason: detail`) if it cannot be used."""
    if is_chat(text):
        text = _last_message(text, "assistant")
    if text is None or text == "":
        raise ValueError("no completion")
    if not isinstance(text, str):
        raise ValueError(f"not text: the completion is a {type(text).__name__}")
    ids, known = token_ids or [], logprobs or []
    if not all(isinstance(i, int) and i >= 0 for i in ids):
        raise ValueError("wrong token ids: they are no list of integers from 0")
    if known and (len(known) != len(ids) or not all(isinstance(p, float | int) for p in known)):
        raise ValueError(f"wrong log-probs: {len(known)} values for {len(ids)} token ids")
    return {
        "text": text.encode("utf-8", "replace").decode(),  # JSON may contain a lone surrogate, Arrow may not
        "finish_reason": "length" if str(finish_reason).lower() in _CUT else "stop",
        "correct": _label(correct),
        "token_ids": list(ids),
        "logprobs": [float(p) for p in known],
    }


def _label(value: Any) -> bool | None:
    """Whether a completion is labelled correct; None without a label. Raises ValueError for anything else."""
    text = str(value).strip().lower()
    if text in _NO_LABELS:
        return None
    if text not in _LABELS:
        raise ValueError(f"wrong label: {str(value)[:40]!r} is neither true nor false")
    return _LABELS[text]
