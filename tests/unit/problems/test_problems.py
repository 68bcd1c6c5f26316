"""Loading problems: sources, columns, answers, duplicates, overlap of splits, and counts of excluded rows."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import REPO, small_config

from ogls.config import Benchmark, Columns, DataSource
from ogls.errors import DataError
from ogls.problems.load import Exclusions, load_problems, normalize_text
from ogls.problems.splits import select_round_problems, split_problems
from ogls.records import Problem

GSM8K = REPO.parent / "shared" / "data" / "gsm8k"
ROWS = [
    {"id": "a", "problem": "What is $1+1$?", "solution": r"So \boxed{2}.", "answer": "2"},
    {"id": "b", "problem": "What is 3?", "solution": r"It is \boxed{3}"},
    {"id": "c", "problem": "Four?", "answer": "Two and two\n#### 4"},
    {"id": "d", "problem": "Five?", "answer": r"$\boxed{5}$"},
]


def write_jsonl(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def load(source: str, report: Exclusions | None = None, **settings: object) -> list[Problem]:
    return load_problems(DataSource(source=source, **settings), "train", report or Exclusions())


def test_jsonl_parquet_and_dataset_folders_agree(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", ROWS)
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "p.parquet")
    (tmp_path / "hub").mkdir()
    write_jsonl(tmp_path / "hub" / "train.jsonl", ROWS)
    loaded = load(path)
    assert [(p.problem_id, p.answer) for p in loaded] == [("a", "2"), ("b", "3"), ("c", "4"), ("d", "5")]
    assert load(str(tmp_path / "p.parquet")) == loaded
    assert load(str(tmp_path / "hub")) == loaded


def test_columns_can_be_renamed_and_ids_derived(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "q.jsonl", [{"question": "Q?", "answer": "work\n#### 7"}])
    (problem,) = load(path, columns=Columns(problem="question", solution="answer"))
    assert (problem.problem, problem.answer, problem.solution) == ("Q?", "7", "work\n#### 7")
    assert problem.problem_id.startswith("p-")
    assert load(path, columns=Columns(problem="question"))[0].problem_id == problem.problem_id


def test_a_pattern_finds_answers_in_solutions(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "q.jsonl", [{"problem": "Q?", "solution": "so\nA: 7"}])
    (problem,) = load_problems(DataSource(source=path), "train", Exclusions(), "^A: (.+)$")
    assert problem.answer == "7"


def test_text_that_is_not_unicode_can_be_stored(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"id": "a", "problem": "\\ud800 plus 1?", "answer": "1"}\n')
    (problem,) = load(str(tmp_path / "q.jsonl"))
    assert problem.problem == "? plus 1?"


def test_a_missing_problem_column_lists_the_existing_ones(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "q.jsonl", [{"question": "Q?", "answer": "1"}])
    with pytest.raises(DataError, match="has no column problem; it has answer, question"):
        load(path)


def test_malformed_lines_are_numbered(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"problem": "a", "answer": "1"}\n{oops\n\n[1]\n')
    with pytest.raises(DataError, match=r"(?s)bad\.jsonl: 2 malformed lines:.*line 2: .*line 4: a list instead"):
        load(str(path))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.jsonl", "cannot read problems from nowhere.jsonl: No such file"),
        ("nowhere.parquet", "no such file"),
        ("pyproject.toml/x.jsonl", "cannot read problems"),
        ("nowhere", "neither a .jsonl, .json, .csv or .parquet file, nor a folder"),
        ("no-such-owner/no-such-set", "cannot load the dataset no-such-owner/no-such-set"),
    ],
)
def test_missing_sources_are_refused(source: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(source)


def test_invalid_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_text("hello")
    with pytest.raises(DataError, match="is not readable Parquet"):
        load(str(tmp_path / "x.parquet"))


def test_duplicates_and_unanswered_are_counted(tmp_path: Path) -> None:
    duplicate = {"id": "e", "problem": "what is  1+1 ?", "answer": "2"}
    report = Exclusions()
    path = write_jsonl(
        tmp_path / "q.jsonl", [*ROWS, duplicate, {"id": "f", "problem": "Six?"}, {"id": "g", "problem": " "}]
    )
    assert len(load(path, report)) == 4
    assert dict(report.counts) == {"duplicate": 1, "no answer": 1, "empty problem": 1}
    assert report.describe("duplicate") == "e"


def test_one_id_for_two_problems_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "q.jsonl", [*ROWS, {"id": "a", "problem": "Other?", "answer": "1"}])
    with pytest.raises(DataError, match="1 ids stand for two different problems: a"):
        load(path)


def test_normalised_text_ignores_markup_and_keeps_mathematics() -> None:
    assert normalize_text("What is $1 + 1$?") == normalize_text("what is\n1+1 ?")
    assert normalize_text("１+1") == normalize_text("1+1")
    assert normalize_text("1+1") != normalize_text("1-1")


@pytest.mark.parametrize(
    "name", ["q.jsonl", "Q.JSONL", "q.json", "one.json", "q.csv", "q.jsonl.gz", "q.parquet", "bom.jsonl"]
)
def test_every_kind_of_file_is_read(tmp_path: Path, name: str) -> None:
    rows = [{"id": "a", "problem": "1+1?", "answer": "2"}, {"id": "b", "problem": "1+2?", "answer": "3"}]
    path, lines = tmp_path / name, "".join(json.dumps(row) + "\n" for row in rows)
    if name == "q.json":
        path.write_text(json.dumps(rows))
    elif name == "one.json":
        path.write_text(json.dumps(rows[0]))
    elif name == "q.csv":
        path.write_text('\ufeffid,problem,answer\na,"1+1?",2\nb,"1+2?",3\n', encoding="utf-8")
    elif name == "q.parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(("\ufeff" if name == "bom.jsonl" else "") + lines, encoding="utf-8")
    loaded = load(str(path))
    assert [(p.problem_id, p.problem, p.answer) for p in loaded] == [("a", "1+1?", "2"), ("b", "1+2?", "3")][
        : len(loaded)
    ]
    assert len(loaded) == (1 if name == "one.json" else 2)


def test_a_folder_is_read_whole_or_by_the_split_that_its_names_tell(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "monday.jsonl", ROWS[:2])
    pq.write_table(pa.Table.from_pylist(ROWS[2:]), tmp_path / "tuesday.parquet")
    assert {p.problem_id for p in load(str(tmp_path))} == {"a", "b", "c", "d"}
    write_jsonl(tmp_path / "train-00000.jsonl", ROWS[:1])
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "dev.jsonl", ROWS[1:2])
    assert [p.problem_id for p in load(str(tmp_path))] == ["a"]
    assert [p.problem_id for p in load(str(tmp_path), split="validation")] == ["b"]
    with pytest.raises(DataError, match="no files of the split test; set split to train or validation"):
        load(str(tmp_path), split="test")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"has no \.jsonl, \.json, \.csv or \.parquet file"):
        load(str(tmp_path / "empty"))


def test_a_dataset_that_save_to_disk_wrote_is_read(tmp_path: Path) -> None:
    import datasets

    data = datasets.Dataset.from_list([{"id": r["id"], "problem": r["problem"], "answer": "1"} for r in ROWS])
    data.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": data, "extra": data.select([0])}).save_to_disk(str(tmp_path / "splits"))
    assert len(load(str(tmp_path / "one"))) == 4
    assert [p.problem_id for p in load(str(tmp_path / "splits"), split="extra")] == ["a"]
    with pytest.raises(DataError, match="has no split test; set split to extra or train"):
        load(str(tmp_path / "splits"), split="test")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), True, ["1"], {"a": 1}])
@pytest.mark.parametrize("column", ["problem", "answer"])
def test_a_cell_that_is_no_text_is_unusable_and_counted(tmp_path: Path, column: str, value: object) -> None:
    report = Exclusions()
    path = write_jsonl(tmp_path / "q.jsonl", [*ROWS, {"id": "x", "problem": "X?", "answer": "1", column: value}])
    assert len(load(path, report)) == 4
    assert report.counts["not text"] == 1
    assert report.describe("not text").startswith(f"row 5 ({column} is ")


def test_chat_messages_are_read_as_a_problem_and_its_solution(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    rows = [
        {"prompt": chat, "answer": "2"},
        {"prompt": [{"role": "user", "content": "1+2?"}, {"role": "assistant", "content": r"It is \boxed{3}."}]},
        {"prompt": [*chat, {"role": "assistant", "content": "2"}, {"role": "user", "content": "Sure?"}], "answer": "2"},
    ]
    path, report = write_jsonl(tmp_path / "q.jsonl", rows), Exclusions()
    with pytest.raises(
        DataError, match=r'has no column problem; it has answer, prompt: set columns.problem = "prompt"'
    ):
        load(path)
    first, second = load(path, report, columns=Columns(problem="prompt"))
    assert (first.problem, first.answer, first.solution) == ("1+1?", "2", None)
    assert (second.problem, second.answer, second.solution) == ("1+2?", "3", r"It is \boxed{3}.")
    assert "a chat with 2 user and 1 assistant messages" in report.describe("not text")


def test_a_problem_with_two_answers_is_left_out_and_named(tmp_path: Path) -> None:
    report = Exclusions()
    path = write_jsonl(tmp_path / "q.jsonl", [*ROWS, {"id": "z", "problem": "what is 1+1?", "answer": "3"}])
    assert [p.problem_id for p in load(path, report)] == ["b", "c", "d"]
    assert report.describe("two answers") == "a ('2' and '3')"


def test_rows_without_an_answer_count_toward_max_unusable(tmp_path: Path) -> None:
    rows = [*ROWS, {"id": "f", "problem": "Six?"}, {"id": "g", "problem": "Seven?", "answer": [1]}]
    test = [{"id": "z", "problem": "Z?", "answer": "4"}]
    with pytest.raises(DataError, match=r"2 of 6 problems are unusable \(1 no answer: f \(row 5\); 1 not text: row 6"):
        split(tmp_path, rows, test)
    problems, report = split(tmp_path, rows, test, max_unusable=0.5)
    assert len(problems) == 5
    assert report.counts == {"no answer": 1, "not text": 1}


@pytest.mark.parametrize(
    ("train", "test", "settings", "message"),
    [
        ([], ROWS[:1], {}, r"train\.jsonl has no rows: set source to a file"),
        (ROWS[:2], [], {}, r"test\.jsonl has no rows: set source to a file"),
        (ROWS[:2], [{"problem": "P?"}], {}, r"neither a column answer nor a column solution; .* set columns\.answer"),
        (ROWS[:2], [{"problem": " ", "answer": "1"}], {}, r"benchmark bench: none of the rows .*\(excluded: 1 empty"),
        (ROWS[:3], ROWS[3:], {"holdout": 3}, r"no training problem is left of 3 .*; lower problems\.holdout"),
        (ROWS[:1], ROWS[:1], {}, r"no training problem is left of 0 \(excluded: 1 in benchmark bench\)"),
    ],
)
def test_nothing_to_train_or_evaluate_on_names_the_setting(
    tmp_path: Path, train: list, test: list, settings: dict, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        split(tmp_path, train, test, **settings)


def split(tmp_path: Path, train: list, test: list, usable=None, too_long=None, **problems: object):
    config = small_config(tmp_path)
    source = write_jsonl(tmp_path / "train.jsonl", train)
    benchmark = Benchmark(name="bench", source=write_jsonl(tmp_path / "test.jsonl", test))
    config = config.model_copy(
        update={
            "problems": config.problems.model_copy(update={"source": source, **problems}),
            "evaluate": config.evaluate.model_copy(update={"benchmarks": (benchmark,)}),
        }
    )
    return split_problems(config, usable or (lambda answers: [True] * len(answers)), too_long or (lambda p, n: ""))


def test_training_problems_of_a_benchmark_are_excluded(tmp_path: Path) -> None:
    problems, report = split(tmp_path, ROWS, [{"id": "z", "problem": "FOUR ?", "answer": "4"}])
    assert [p.problem_id for p in problems if p.split == "train"] == ["a", "b", "d"]
    assert [p.problem_id for p in problems if p.split == "bench"] == ["z"]
    assert report.named["in benchmark bench"] == ["c"]


def test_holdout_is_disjoint_and_seeded(tmp_path: Path) -> None:
    test = [{"id": "z", "problem": "Z?", "answer": "4"}]
    first, _ = split(tmp_path, ROWS, test, holdout=2)
    again, _ = split(tmp_path, ROWS, test, holdout=2)
    assert first == again
    splits = [p.split for p in first]
    assert (splits.count("train"), splits.count("holdout")) == (2, 2)
    assert len({p.problem_id for p in first}) == 5


def test_too_many_unusable_answers_are_refused_and_listed(tmp_path: Path) -> None:
    test = [{"id": "z", "problem": "Z?", "answer": "4"}]

    def no_threes(answers: list[str]) -> list[bool]:
        return [a != "3" for a in answers]

    with pytest.raises(DataError, match=r"1 of 4 problems are unusable \(1 unusable answer: b \('3'\)\)"):
        split(tmp_path, ROWS, test, no_threes)
    problems, report = split(tmp_path, ROWS, test, no_threes, max_unusable=0.3)
    assert report.counts["unusable answer"] == 1
    assert "b" not in [p.problem_id for p in problems]


def test_problems_longer_than_the_context_are_counted(tmp_path: Path) -> None:
    test = [{"id": "z", "problem": "Z?", "answer": "4"}]

    def too_long(problem: Problem, max_tokens: int) -> str:
        return f"{max_tokens + 9} tokens" if problem.problem_id == "a" else ""

    _, report = split(tmp_path, ROWS, test, too_long=too_long, max_unusable=0.5)
    assert report.named["too long"] == ["a (73 tokens)"]


def test_rounds_use_all_problems_before_repeating_one() -> None:
    train = [Problem(str(i), str(i), "1") for i in range(10)]
    rounds = [[p.problem_id for p in select_round_problems(train, 4, r, 0)] for r in range(1, 6)]
    seen = [p for r in rounds for p in r]
    assert sorted(seen[:10]) == sorted(str(i) for i in range(10))
    assert rounds == [[p.problem_id for p in select_round_problems(train, 4, r, 0)] for r in range(1, 6)]
    assert seen != [p.problem_id for r in range(1, 6) for p in select_round_problems(train, 4, r, 1)]
    assert all(len(set(r)) == len(r) for r in rounds)


@pytest.mark.skipif(not GSM8K.exists(), reason="GSM8K is not in shared/data")
def test_gsm8k_loads_completely() -> None:
    columns = Columns(problem="question", solution="answer")
    report = Exclusions()
    train = load(str(GSM8K / "train.jsonl"), report, columns=columns)
    test = load(str(GSM8K / "test.jsonl"), report, columns=columns)
    assert (len(train), len(test), sum(report.counts.values())) == (7473, 1319, 0)
    assert train[0].answer == "72"
    assert not {normalize_text(p.problem) for p in train} & {normalize_text(p.problem) for p in test}
