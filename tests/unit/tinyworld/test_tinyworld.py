"""The tiny world: its problems and texts, the shipped files, and the creation of the seed model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO
from transformers import AutoTokenizer

from ogls.errors import UserError
from ogls.models.policy import Policy
from ogls.tinyworld.seedmodel import SeedRecipe, make_seed_model
from ogls.tinyworld.world import (
    OPERATIONS,
    REFLECTIONS,
    Problem,
    World,
    apply_operation,
    foreign_solution,
    problem_rows,
    random_problem,
    reflect,
)

TINY = REPO / "data" / "tiny"


def test_a_solution_worked_by_hand() -> None:
    problem = Problem(3, (("+", 4), (r"\times", 2), ("-", 5)))
    assert problem.text == r"Modulo 10, left to right: $3+4\times2-5$"
    assert World().solution(problem) == "3+4=7\n7\\times2=4\n4-5=9\n\\boxed{9}"
    assert problem.answer == "9"


def test_each_fact_has_its_error_rate_and_one_wrong_result() -> None:
    world, rng = World(), np.random.default_rng(0)
    for fact in [(a, op, b) for a in (1, 4, 7) for op in OPERATIONS for b in (2, 9)]:
        rate, wrong = world.mistakes[fact]
        one_step = Problem(fact[0], (fact[1:],))
        results = [world.solution(one_step, rng).rsplit("{", 1)[1][:-1] for _ in range(400)]
        assert set(results) <= {str(apply_operation(*fact)), str(wrong)}
        assert results.count(str(wrong)) / 400 == pytest.approx(rate, abs=0.09)
        assert wrong != apply_operation(*fact)


def test_half_the_texts_show_a_solution_and_half_of_these_are_terse() -> None:
    world, rng = World(), np.random.default_rng(0)
    texts = [world.pretraining_text(rng) for _ in range(2000)]
    with_solution = [(context, completion) for _, context, completion in texts if context]
    terse = [completion for context, completion in with_solution if completion != context]
    assert len(with_solution) / 2000 == pytest.approx(0.5, abs=0.05)
    assert len(terse) / len(with_solution) == pytest.approx(0.5, abs=0.05)
    assert all(completion.startswith("\\boxed") for completion in terse)
    never_terse = World(terse_share=0.0)
    assert all(c == a for _, c, a in (never_terse.pretraining_text(rng) for _ in range(200)) if c)


def test_a_foreign_solution_and_a_comment_worked_by_hand() -> None:
    problem = Problem(3, (("+", 4), (r"\times", 2), ("-", 5)))
    assert foreign_solution(problem, [7, 4, 9]) == ("3+4\\times2 makes 4.\n4-5 makes 9.\nSo the answer is \\boxed{9}")
    for seed in range(20):
        text = reflect(problem, [7, 4, 9], np.random.default_rng(seed))
        lines = text.split("\n")
        comments = [line for line in lines if line[-1] == "."]
        assert [line for line in lines if line not in comments] == World().solution(problem).split("\n")
        assert 1 <= len(comments) <= 3
        for comment in comments:  # each speaks of the line that follows
            fact, result = lines[lines.index(comment) + 1].split("=")
            assert comment in {form.format(fact=fact, result=result) for form in REFLECTIONS}


def test_the_shares_of_comments_and_of_foreign_solutions() -> None:
    world, rng = World(terse_share=0.25, reflection_share=0.5), np.random.default_rng(0)
    read = [(context, text) for _, context, text in (world.pretraining_text(rng) for _ in range(4000)) if context]
    commented = [text for context, text in read if "attempt" in text]
    assert len(commented) / len(read) == pytest.approx(0.75 * 0.5, abs=0.04)
    world = World(terse_share=0.25, foreign_share=0.4)
    read = [(context, text) for _, context, text in (world.pretraining_text(rng) for _ in range(4000)) if context]
    foreign = [(context, text) for context, text in read if "makes" in context]
    assert len(foreign) / len(read) == pytest.approx(0.4, abs=0.04)
    copied = [text == context for context, text in foreign if not text.startswith("\\boxed")]
    assert sum(copied) / len(copied) == pytest.approx(0.5, abs=0.06)
    rows = problem_rows(world, 200, seed=1)
    assert sum("makes" in row["solution"] for row in rows) / 200 == pytest.approx(0.4, abs=0.12)
    assert all(row["solution"].endswith(f"\\boxed{{{row['answer']}}}") for row in rows)


def test_problems_have_the_number_of_steps_that_was_asked_for() -> None:
    rows = problem_rows(World(steps=(12, 14)), 100, seed=1)
    assert {row["solution"].count("=") for row in rows} == {12, 13, 14}


def test_the_shipped_problems_match_the_recipe() -> None:
    recipe = SeedRecipe()
    test = problem_rows(recipe.world, recipe.test_problems, seed=1)
    train = problem_rows(recipe.world, recipe.train_problems, 2, frozenset(r["problem"] for r in test))
    for name, rows in (("train", train), ("test", test)):
        assert [json.loads(line) for line in (TINY / f"{name}.jsonl").read_text().splitlines()] == rows
    assert not {r["problem"] for r in train} & {r["problem"] for r in test}


def test_the_shipped_checkpoint_is_small_and_safe() -> None:
    files = [p for p in TINY.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 4 << 20
    assert {p.suffix for p in files} <= {".safetensors", ".json", ".jsonl", ".jinja", ".md"}
    card = (TINY / "model" / "README.md").read_text()
    assert "sampled at temperature 1 it solves" in card


def test_the_tokenizer_splits_digits_and_round_trips_any_text() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    pieces = tokenizer.tokenize("12+34=46\n\\boxed{46}")
    assert all(len([c for c in p if c.isdigit()]) <= 1 for p in pieces)
    for text in ("3+4=7", "ünïcödé 漢字 \U0001f600", "tab\tand  spaces", "a\x00b"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    rng = np.random.default_rng(0)
    longest = max(len(tokenizer(World().solution(random_problem(rng)))["input_ids"]) for _ in range(200))
    assert longest < 64


def test_the_recipe_makes_a_model_that_loads(tmp_path: Path) -> None:
    """A few steps: the recipe runs end to end, is deterministic, and writes a model that Policy loads."""
    from ogls.config import AdapterConfig, ModelConfig

    recipe = SeedRecipe(steps=3, batch_size=4, train_problems=8, test_problems=4)
    losses = [make_seed_model(tmp_path / name, recipe) for name in ("a", "b")]
    assert losses[0] == losses[1]
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert weights[0] == weights[1]
    assert Policy(ModelConfig(path=str(tmp_path / "a" / "model")), AdapterConfig()).head.shape == (320, 96)
    with pytest.raises(FileExistsError, match="is not empty"):
        make_seed_model(tmp_path / "a", recipe)
    assert issubclass(UserError, Exception)
