"""The word problems: their solutions are right, and no problem is in two files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from ogls.tinyworld.word_problems import SIZES, write_word_problems


def test_solutions_are_right_and_files_share_no_problem(tmp_path: Path) -> None:
    write_word_problems(tmp_path / "words")
    texts: list[str] = []
    for name, size in SIZES.items():
        rows = [json.loads(line) for line in (tmp_path / f"words/{name}.jsonl").read_text().splitlines()]
        assert len(rows) == size
        texts += [row["problem"] for row in rows]
        for row in rows:
            *steps, boxed = row["solution"].splitlines()
            assert boxed == rf"\boxed{{{row['answer']}}}"
            for step, following in zip(steps, [*steps[1:], ""], strict=True):
                expression, result = step.split(" = ")
                assert eval(expression) == int(result) >= 0
                assert not following or following.split()[0] == result
                assert expression.split()[2] in row["problem"]
    assert len(set(texts)) == len(texts)
    with pytest.raises(FileExistsError):
        write_word_problems(tmp_path / "words")


def test_told_solutions_have_the_same_steps_in_several_words(tmp_path: Path) -> None:
    write_word_problems(tmp_path / "told", in_words=True)
    rows = [json.loads(line) for line in (tmp_path / "told/warm.jsonl").read_text().splitlines()]
    wordings = set()
    for row in rows:
        steps = re.findall(r"(\d+ [-+*] \d+) = (\d+)", row["solution"])
        assert all(eval(expression) == int(result) for expression, result in steps)
        assert steps[-1][1] == row["answer"]
        assert row["solution"].count(rf"\boxed{{{row['answer']}}}") == 1
        wordings.add(re.sub(r"\d+", "", row["solution"]).split("=")[0])
    assert len(wordings) > 100
