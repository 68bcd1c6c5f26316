"""Reading completions that exist: which column has what, and one record per completion, every bad line counted.

A row has a problem and one or more completions: in one column as a text or a list, in several columns, or as the last
message of a chat. Rows with the same problem form a group.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Any

from ogls.config import Columns, DataSource, PromptsConfig
from ogls.errors import DataError
from ogls.problems.completion_columns import BESIDE, CompletionColumns, cell_of, expand_columns
from ogls.problems.load import Exclusions, is_chat, normalize_text, read_problem
from ogls.problems.sources import Row, read_lines
from ogls.records import Problem

_LABELS = dict.fromkeys(("true", "yes", "1", "1.0", "correct"), True) | dict.fromkeys(
    ("false", "no", "0", "0.0", "incorrect", "wrong", "failed"), False
)
_NO_LABELS = ("", "none", "null", "undecided")
_CUT = ("length", "max_tokens", "max_output_tokens", "truncated")


@dataclass
class _Groups:
    """The problems of the source by their text; each has the answer of its first row that has one."""

    by_text: dict[str, Problem] = field(default_factory=dict)
    conflicts: dict[str, str] = field(default_factory=dict)  # by text: another answer that a later row has
    ids: dict[str, str] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)

    def add(self, problem: Problem) -> None:
        """Add the problem of a row."""
        text = normalize_text(problem.problem)
        first = self.by_text.setdefault(text, problem)
        if problem.answer and not first.answer:
            self.by_text[text] = problem
        elif problem.answer and not _same_answer(problem.answer, first.answer):
            self.conflicts.setdefault(text, problem.answer)

    def problem_of(self, problem: Problem) -> Problem:
        """The problem of a row's group. Raises ValueError (`reason: detail`) if the group cannot be used."""
        text = normalize_text(problem.problem)
        if not text:
            raise ValueError("empty problem")
        first = self.by_text[text]
        if not first.answer:
            raise ValueError("no answer")
        if text in self.conflicts:
            raise ValueError(
                f"two answers: {first.answer[:20]!r} and {self.conflicts[text][:20]!r}; the problem is left out"
            )
        if self.ids.setdefault(first.problem_id, text) != text:
            raise ValueError(f"one id, two problems: {first.problem_id}")
        return first


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
    lines = lines[: source.limit]
    for number, reason in malformed:
        if source.limit is None or (lines and number < lines[-1][0]):
            report.add("malformed", f"line {number} ({reason})")
    columns = expand_columns(columns, [row for _, row in lines], source.source, further) if lines else columns
    groups, rows = _Groups(), []
    read: list[Problem | ValueError] = []
    for _, row in lines:
        try:
            problem = _problem(row, columns, prompts, pattern, further)
        except ValueError as error:
            read.append(error)
        else:
            groups.add(problem)
            read.append(problem)
    for (number, row), of_row in zip(lines, read, strict=True):
        try:
            if isinstance(of_row, ValueError):
                raise of_row
            problem = groups.problem_of(of_row)
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


def _problem(
    row: Row,
    columns: CompletionColumns,
    prompts: PromptsConfig,
    pattern: str,
    further: Sequence[str],
) -> Problem:
    """The problem of a row; without an answer if the row has none. Raises ValueError (`reason: detail`)."""
    named = columns.problem
    cell = cell_of(row, columns.messages or named.problem)
    if columns.messages or is_chat(cell):
        cell = _without_template(_last_message(cell, "user"), prompts.student)
    plain = {"problem": cell} | {n: cell_of(row, getattr(named, n)) for n in ("id", "solution", "answer")}
    plain = {name: cell_of(row, name) for name in further} | plain
    try:
        return read_problem(plain, Columns(), "train", pattern, further)
    except ValueError as error:
        raise ValueError(f"not text: {error}") from None


def _same_answer(a: str, b: str) -> bool:
    """Whether two answers are equal as text or as numbers."""
    if normalize_text(a) == normalize_text(b):
        return True
    try:
        return Decimal(a) == Decimal(b)
    except InvalidOperation:
        return False


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
        cell = cell_of(row, path)
        if columns.messages or is_chat(cell):
            cell = _last_message(cell, "assistant")
        several = len(cell) if isinstance(cell, list) else None
        facts = {name: _beside(row, columns, name, index, several) for name in BESIDE}
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
    value = cell_of(row, paths[index]) if paths else None
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
