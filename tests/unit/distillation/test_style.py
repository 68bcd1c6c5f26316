"""Style and substance: the split is exact, and mass that moves between classes counts as style."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import small_config

from ogls.config import Recipe, SteerConfig, TokenClass
from ogls.distillation import style as styling
from ogls.distillation.steering import steer_tokens
from ogls.errors import ConfigError
from ogls.models.policy import Policy
from ogls.stages.registry import STAGES
from ogls.stages.run import Run

DIGITS = torch.tensor([1] * 10 + [0] * 6)  # ten digits and six words


def logprobs(*shape: int, seed: int = 0) -> torch.Tensor:
    return (2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).log_softmax(-1)


def test_the_split_equals_the_chain_rule() -> None:
    p, q = logprobs(5, 16, seed=1), logprobs(5, 16, seed=2)
    total, style = styling.split_kl(p, q, DIGITS)
    for t in range(5):
        within = {}
        between = 0.0
        for c in (0, 1):
            pc, qc = p[t].exp()[c == DIGITS], q[t].exp()[c == DIGITS]
            between += float(pc.sum() * (pc.sum() / qc.sum()).log())
            shares = pc / pc.sum()
            within[c] = float(pc.sum() * (shares * (shares / (qc / qc.sum())).log()).sum())
        assert float(style[t]) == pytest.approx(between + within[0], abs=1e-5)
        assert float(total[t]) == pytest.approx(between + within[0] + within[1], abs=1e-5)


def test_another_digit_is_substance_and_a_word_instead_of_a_digit_is_style() -> None:
    base = torch.full((1, 16), 1e-4)
    base[0, 3] = 1
    other_digit, word = torch.full((1, 16), 1e-4), torch.full((1, 16), 1e-4)
    other_digit[0, 7] = word[0, 12] = 1
    base, other_digit, word = ((x / x.sum()).log() for x in (base, other_digit, word))
    total, style = styling.split_kl(other_digit, base, DIGITS)
    assert style / total < 0.01
    total, style = styling.split_kl(word, base, DIGITS)
    assert style / total > 0.99


def test_equal_distributions_have_no_shift() -> None:
    p = logprobs(4, 16)
    total, style = styling.split_kl(p, p, DIGITS)
    assert float(total.abs().max()) == float(style.abs().max()) == 0.0


def test_shifts_agree_with_the_steering_stage() -> None:
    generator = torch.Generator().manual_seed(0)
    states = {p: torch.randn(9, 8, generator=generator) for p in ("base", "reference", "correct", "incorrect")}
    head = torch.randn(16, 8, generator=generator)
    recipe = SteerConfig(strength=0.7).to_recipe()
    recipes = styling.signal_recipes(tuple(states), recipe)
    assert list(recipes) == ["target", "direction", "reference", "correct"]
    for batch in (100, 2):
        got = styling.measure_shifts(states, recipes, DIGITS, head, batch, 0.5)["target"]
        target = steer_tokens(states, torch.zeros(9, dtype=torch.long), recipe, head, 16, temperature=0.5)
        np.testing.assert_allclose(got.kl, target.kl, atol=1e-4)
    direction = {"direction": Recipe(base=1, correct=1, incorrect=-1)}
    shift = styling.measure_shifts(states, direction, DIGITS, head)["direction"]
    target = steer_tokens(states, torch.zeros(9, dtype=torch.long), SteerConfig(strength=1).to_recipe(), head, 16)
    np.testing.assert_allclose(shift.norm, target.direction_norm, rtol=1e-4)


def test_tokens_are_classified_by_their_text(policy: Policy) -> None:
    classes = [TokenClass(name="digit", pattern=r"^\d$"), TokenClass(name="operator", pattern=r"^([-+]|\\times)$")]
    ids = styling.classify(policy.tokenizer, 320, classes)
    class_of = {policy.tokenizer.decode([i]): int(ids[i]) for i in range(len(policy.tokenizer))}
    assert [class_of[t] for t in ("7", "+", r"\times", r"\boxed{", "\n")] == [1, 2, 2, 0, 0]
    assert len(ids) == 320  # rows of the head without a token belong to the rest


def test_a_class_that_counts_as_style_is_only_named(policy: Policy) -> None:
    """Its tokens have a class of their own in tables, and the split of the KL puts them into the rest."""
    digit, boxed = TokenClass(name="digit", pattern=r"^\d$"), TokenClass(name="box", pattern="box", counts="style")
    ids = styling.classify(policy.tokenizer, 320, [boxed, digit])
    merged = styling.substance_only(ids, [boxed, digit])
    assert set(ids.tolist()) == {0, 1, 2}
    assert torch.equal(merged, torch.where(ids == 1, 0, ids))
    assert torch.equal(merged > 0, styling.classify(policy.tokenizer, 320, [digit]) > 0)
    assert "counts" not in digit.model_dump()  # digests of older runs stay
    assert boxed.model_dump()["counts"] == "style"


def test_an_invalid_pattern_raises_a_config_error() -> None:
    message = r"the pattern '\[0-9' of token class substance is not a valid regular expression: unterminated"
    with pytest.raises(ConfigError, match=message):
        small_config("nowhere", 'style.classes=[{pattern="[0-9"}]')


def test_rows_and_metrics_of_a_round_agree(finished: Run) -> None:
    manifest = finished.records.manifest("style", 1)
    assert manifest
    numbers = manifest.metrics["numbers"]
    rows = finished.records.read("style", 1).to_pylist()
    assert {r["signal"] for r in rows} == {"target", "direction", "reference", "correct"}
    assert {r["token_class"] for r in rows} == {"substance", "rest"}
    for signal in ("target", "reference"):
        signal_rows = [r for r in rows if r["signal"] == signal]
        tokens = sum(r["tokens"] for r in signal_rows)
        assert sum(r["kl"] * r["tokens"] for r in signal_rows) / tokens == pytest.approx(numbers[f"{signal}_kl"])
        assert all(0 <= r["style"] <= r["kl"] * 1.0001 + 1e-6 for r in signal_rows)
    # A teacher that has read the solution answers at once; the direction removes most of this shift of style.
    assert numbers["direction_style_share"] < numbers["reference_style_share"]


def test_rollouts_with_different_pools_are_counted_by_signal(tmp_path: Path) -> None:
    """With recipe none, extra pools and failed rollouts only, a later rollout has pools that the first lacks."""
    overrides = ("steer.recipe=none", 'teacher.pools=["correct","incorrect"]', "train.rollouts=incorrect")
    run = Run(small_config(tmp_path, *overrides, "style.rollouts=9"))
    STAGES["prepare"](run, 0)
    for stage in ("sample", "verify", "teach", "steer"):
        STAGES[stage](run, 1)
    states = run.records.read("teacher_states", 1, ["problem_id", "sample", "pool"]).to_pylist()
    pools: dict[tuple[str, int], set[str]] = {}
    for row in states:
        pools.setdefault((row["problem_id"], row["sample"]), set()).add(row["pool"])
    assert len(set(map(frozenset, pools.values()))) > 1
    result = STAGES["style"](run, 1)
    assert result.metrics["rollouts"] == 9 < len(pools)
    tokens: Counter[str] = Counter()
    for row in run.records.read("style", 1).to_pylist():
        tokens[row["signal"]] += row["tokens"]
    assert tokens["target"] >= tokens["direction"] > 0
