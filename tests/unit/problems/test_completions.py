"""Reading completions that exist: the mapping of columns, groups, labels, and bad lines by number and reason."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import REPO

from ogls.config import Columns, DataSource, PromptsConfig, VerifyConfig
from ogls.errors import DataError
from ogls.problems.completion_columns import CompletionColumns
from ogls.problems.completions import read_completions
from ogls.problems.load import Exclusions
from ogls.records import IMPORTED
from ogls.records.schema import to_arrow
from ogls.verifiers.pool import Case, shared_verifier

GSM8K = REPO.parent / "shared" / "data" / "gsm8k" / "model_solutions.jsonl"
PLAIN = [
    {"id": "a", "problem": "1+1?", "answer": "2", "completion": r"\boxed{2}", "ok": True},
    {"id": "a", "problem": "1 + 1?", "answer": "$2$", "completion": r"\boxed{3}", "ok": False},
    {"id": "b", "problem": "2+2?", "answer": "4", "completion": r" \boxed{4}", "ok": None},
]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


def read(
    source: str, columns: CompletionColumns | None = None, limit: int | None = None, **more: Any
) -> tuple[list[dict[str, Any]], Exclusions]:
    report = Exclusions()
    from_ = DataSource(source=source, limit=limit)
    rows = read_completions(from_, columns or CompletionColumns(), PromptsConfig(), report, **more)
    return to_arrow(IMPORTED, rows).to_pylist(), report


def test_rows_of_one_problem_form_a_group(tmp_path: Path) -> None:
    rows, report = read(write(tmp_path / "c.jsonl", PLAIN), CompletionColumns(correct=("ok",)))
    assert [(r["line"], r["problem_id"], r["sample"], r["correct"]) for r in rows] == [
        *((1, "a", 0, True), (2, "a", 1, False), (3, "b", 0, None)),
    ]
    assert rows[1]["problem"] == "1+1?"  # of the first row of the group
    assert rows[2]["text"] == r" \boxed{4}"  # a completion is not stripped
    assert {r["finish_reason"] for r in rows} == {"stop"}
    assert not report.counts


def test_parquet_csv_and_folders_give_the_same_rows(tmp_path: Path) -> None:
    expected, _ = read(write(tmp_path / "c.jsonl", PLAIN), CompletionColumns(correct=("ok",)))
    pq.write_table(pa.Table.from_pylist(PLAIN), tmp_path / "c.parquet")
    with open(tmp_path / "c.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(PLAIN[0]))
        writer.writeheader()
        writer.writerows(PLAIN)
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "train.jsonl", PLAIN)
    for name in ("c.parquet", "c.csv", "folder"):
        assert read(str(tmp_path / name), CompletionColumns(correct=("ok",)))[0] == expected


def test_a_list_of_completions_is_a_group(tmp_path: Path) -> None:
    row = {"problem": "1+1?", "answer": "2", "said": ["2", "3"], "ok": [1, 0], "why": ["stop", "length"]}
    path = write(tmp_path / "c.jsonl", [row, {**row, "problem": "2+0?", "ok": [1]}])
    rows, report = read(path, CompletionColumns(completion=("said",), correct=("ok",), finish_reason=("why",)))
    assert [(r["sample"], r["text"], r["correct"], r["finish_reason"]) for r in rows] == [
        *((0, "2", True, "stop"), (1, "3", False, "length")),
    ]
    assert report.named == {"list lengths": ["line 2 (2 completions, but 1 in ok)"]}


def test_fields_of_a_list_of_objects_are_completions(tmp_path: Path) -> None:
    row = {"problem": "1+1?", "answer": "2", "all": [{"text": "2", "ok": True}, {"text": "3", "ok": False}]}
    rows, _ = read(write(tmp_path / "c.jsonl", [row]), CompletionColumns(completion=("all.text",), correct=("all.ok",)))
    assert [(r["text"], r["correct"]) for r in rows] == [("2", True), ("3", False)]


@pytest.mark.parametrize("paths", [("*.said", "*.ok"), ("small.said large.said", "small.ok large.ok")])
def test_columns_of_several_models_are_a_group(paths: tuple[str, str], tmp_path: Path) -> None:
    row = {"problem": "1+1?", "answer": "2", "small": {"said": "3", "ok": False}, "large": {"said": "2", "ok": True}}
    columns = CompletionColumns(completion=tuple(paths[0].split()), correct=tuple(paths[1].split()))
    rows, _ = read(write(tmp_path / "c.jsonl", [row]), columns)
    assert [(r["sample"], r["text"], r["correct"]) for r in rows] == [(0, "3", False), (1, "2", True)]


def test_messages_give_the_problem_and_the_completion(tmp_path: Path) -> None:
    student = PromptsConfig().student.replace("{problem}", "1+1?")
    parts = [{"type": "text", "text": "so "}, {"type": "text", "text": "2"}]
    chats = [
        [{"role": "user", "content": student}, {"role": "assistant", "content": "2"}],
        [
            {"role": "system", "content": "Think."},
            {"role": "user", "content": "1+1?"},
            {"role": "assistant", "content": parts},
        ],
        [
            *({"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}),
            *({"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "3"}),
        ],
        [{"role": "user", "content": "1+1?"}],
        [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": None}],
        [{"role": "user", "content": [{"type": "image_url"}]}, {"role": "assistant", "content": "2"}],
        "1+1?",
    ]
    path = write(tmp_path / "c.jsonl", [{"messages": chat, "expected": "2"} for chat in chats])
    rows, report = read(path, CompletionColumns(problem=Columns(answer="expected"), messages="messages"))
    assert [(r["problem"], r["text"], r["sample"]) for r in rows] == [
        *(("1+1?", "2", 0), ("1+1?", "so 2", 1), ("1+1?", "3", 2)),
    ]
    assert report.named == {
        "no completion": ["line 4"],
        "not text": [
            "line 5 (the content of a message is a NoneType)",
            "line 6 (a message has parts that are no text)",
        ],
        "no chat": ["line 7 (a str, not a list of messages with role and content)"],
    }


def test_the_answer_of_a_group_is_that_of_any_of_its_rows(tmp_path: Path) -> None:
    """Rows without an answer are kept, whatever their order; 6 and 6.0 are one answer."""
    good = PLAIN[0]
    answers = [None, "6", "6.0", None]
    path = write(tmp_path / "c.jsonl", [{**good, "problem": "2*3?", "answer": a} for a in answers])
    rows, report = read(path, CompletionColumns())
    assert [(r["line"], r["expected"]) for r in rows] == [(n, "6") for n in (1, 2, 3, 4)]
    assert not report.counts


def test_a_limit_hides_the_bad_lines_after_it(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", [PLAIN[0], "{broken", PLAIN[0], "{broken too"])
    rows, report = read(path, CompletionColumns(), limit=2)
    assert [r["line"] for r in rows] == [1, 3]
    assert report.named["malformed"][0].startswith("line 2")
    assert len(report.named["malformed"]) == 1


@pytest.mark.parametrize("option", ["answer", "solution", "id"])
def test_a_column_that_was_named_must_exist(tmp_path: Path, option: str) -> None:
    path = write(tmp_path / "c.jsonl", [PLAIN[0]])
    with pytest.raises(DataError, match=rf"has no column typo; it has .*: set --{option}"):
        read(path, CompletionColumns(Columns(**{option: "typo"})))


def test_bad_lines_are_counted_by_reason_and_listed_by_number(tmp_path: Path) -> None:
    good = PLAIN[0]
    path = write(
        tmp_path / "c.jsonl",
        [
            good,
            "{broken",
            "[1]",
            {**good, "problem": ""},
            {**good, "problem": "5?", "answer": None},
            {**good, "problem": {"a": 1}},
            {**good, "problem": "6?"},
            {**good, "completion": ""},
            {**good, "completion": 7},
            {**good, "ok": "maybe"},
            "",
            {**good, "problem": "7?", "id": "c", "answer": "1"},
            {**good, "problem": "7?", "id": "c", "answer": "2"},
        ],
    )
    rows, report = read(path, CompletionColumns(correct=("ok",)))
    assert [r["line"] for r in rows] == [1]
    assert {reason: names for reason, names in report.named.items() if reason != "malformed"} == {
        "empty problem": ["line 4"],
        "no answer": ["line 5"],
        "not text": ["line 6 (problem is a dict)", "line 9 (the completion is a int)"],
        "one id, two problems": ["line 7 (a)"],
        "no completion": ["line 8"],
        "wrong label": ["line 10 ('maybe' is neither true nor false)"],
        "two answers": [f"line {n} ('1' and '2'; the problem is left out)" for n in (12, 13)],
    }
    assert [name.split(" (")[0] for name in report.named["malformed"]] == ["line 2", "line 3"]


def test_token_ids_and_log_probs_belong_together(tmp_path: Path) -> None:
    good = PLAIN[0] | {"ids": [5, 6], "lps": [-0.5, -1.0]}
    path = write(tmp_path / "c.jsonl", [good, good | {"lps": [-0.5]}, good | {"ids": ["x"]}, good | {"ids": None}])
    rows, report = read(path, CompletionColumns(token_ids=("ids",), logprobs=("lps",)))
    assert [(r["token_ids"], r["logprobs"]) for r in rows] == [([5, 6], [-0.5, -1.0])]
    assert report.counts == {"wrong log-probs": 2, "wrong token ids": 1}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            CompletionColumns(completion=("said",)),
            "has no column said; it has id, problem, answer, completion, ok: set --completion",
        ),
        (CompletionColumns(problem=Columns(problem="q")), "has no column q; .*: set --problem"),
        (CompletionColumns(messages="chat"), "has no column chat; .*: set --messages"),
        (CompletionColumns(finish_reason=("why",)), "has no column why; .*: set --finish-reason"),
        (
            CompletionColumns(completion=("completion", "answer"), correct=("ok",)),
            "2 completion columns, but 1 of --correct",
        ),
    ],
)
def test_a_wrong_mapping_is_explained(columns: CompletionColumns, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / "c.jsonl", PLAIN), columns)


def test_columns_that_pools_read_are_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", [row | {"hint": f"hint {i}"} for i, row in enumerate(PLAIN)])
    rows, _ = read(path, further=("hint",))
    assert [json.loads(r["columns"]) for r in rows] == [{"hint": "hint 0"}, {"hint": "hint 0"}, {"hint": "hint 2"}]
    with pytest.raises(DataError, match="has no column clue, which a pool of"):
        read(path, further=("clue",))


def test_a_source_without_a_usable_line_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no usable completion \(1 malformed: line 1 .*; 1 no answer: line 2\)"):
        read(write(tmp_path / "c.jsonl", ["{", {"problem": "1?", "completion": "2"}]))
    with pytest.raises(DataError, match="has no rows"):
        read(write(tmp_path / "empty.jsonl", []))


def test_a_line_separator_in_a_text_ends_no_line(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps({**PLAIN[0], "completion": "a\u2028b\x85c"}, ensure_ascii=False) + "\r\n")
    rows, _ = read(str(path))
    assert [r["text"] for r in rows] == ["a\u2028b\x85c"]


@pytest.mark.slow
@pytest.mark.skipif(not GSM8K.exists(), reason="the solutions of GSM8K are not here")
def test_the_verifier_agrees_with_every_label_of_the_solutions_of_gsm8k() -> None:
    columns = CompletionColumns(
        Columns(problem="question", solution="ground_truth"), completion=("*.solution",), correct=("*.is_correct",)
    )
    pattern = "^A: (.+)$"
    rows, report = read(str(GSM8K), columns, pattern=pattern)
    assert not report.counts
    assert len(rows) == 4000
    assert set(Counter(r["problem_id"] for r in rows).values()) == {4}
    verifier = shared_verifier(VerifyConfig(answer_pattern=pattern))
    judgements = verifier.judge([Case(r["text"], r["finish_reason"], r["expected"]) for r in rows])
    assert [r["line"] for r, j in zip(rows, judgements, strict=True) if r["correct"] != (j.verdict == "correct")] == []
    assert sum(bool(r["correct"]) for r in rows) == 1541
