"""Steering: a target computed by hand, exactness on the full vocabulary, batching, and the pools of a recipe."""

from __future__ import annotations

import math

import pytest
import torch

from ogls.config import Recipe, SteerConfig
from ogls.distillation.steering import combine_states, direction, steer_tokens


def test_target_computed_by_hand() -> None:
    """V = 2, D = 1: base logits (0, 0), correct logits (2, 0), incorrect logits (1, 0), lambda = 0.5.

    direction = (1, 0); steered logits (0.5, 0); target = (e^.5, 1) / (e^.5 + 1) = (0.6225, 0.3775).
    """
    head = torch.tensor([[1.0], [0.0]])
    states = {p: torch.tensor([[v]]) for p, v in (("base", 0.0), ("correct", 2.0), ("incorrect", 1.0))}
    recipe = SteerConfig(strength=0.5).to_recipe()
    target = steer_tokens(states, torch.tensor([1]), recipe, head, 2)
    p = math.exp(0.5) / (math.exp(0.5) + 1)
    assert target.ids.tolist() == [[0, 1]]
    assert target.target_logprobs.exp().tolist()[0] == pytest.approx([p, 1 - p], rel=1e-6)
    assert target.base_logprobs.exp().tolist()[0] == pytest.approx([0.5, 0.5])
    assert target.token_target_logprob.item() == pytest.approx(math.log(1 - p), rel=1e-6)
    assert target.token_base_logprob.item() == pytest.approx(math.log(0.5), rel=1e-6)
    assert target.kl.item() == pytest.approx(p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p)), rel=1e-4)
    assert target.direction_norm.item() == pytest.approx(math.sqrt(0.5))  # (1, 0) minus its mean
    assert target.tail_mass.item() == 0


def states(tokens: int = 7) -> dict:
    """Random states [tokens, 8] of all pools."""
    generator = torch.Generator().manual_seed(0)
    return {p: torch.randn(tokens, 8, generator=generator) for p in ("base", "reference", "correct", "incorrect")}


HEAD = torch.randn(30, 8, generator=torch.Generator().manual_seed(1))


def test_the_target_is_exact_on_the_full_vocabulary() -> None:
    recipe = Recipe(base=0.2, reference=0.3, correct=1.1, incorrect=-0.6)
    logits = {p: s @ HEAD.T for p, s in states().items()}
    expected = sum(getattr(recipe, p) * z for p, z in logits.items()).softmax(-1)
    target = steer_tokens(states(), torch.zeros(7, dtype=torch.long), recipe, HEAD, 5)
    top = expected.topk(5)
    assert torch.equal(target.ids, top.indices)
    torch.testing.assert_close(target.target_logprobs.exp(), top.values, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(target.tail_mass, 1 - top.values.sum(-1), atol=1e-6, rtol=1e-4)


def test_batching_changes_nothing() -> None:
    recipe, ids = SteerConfig().to_recipe(), torch.arange(7)
    whole, parts = (steer_tokens(states(), ids, recipe, HEAD, 5, n) for n in (100, 3))
    for name in (
        "ids",
        "target_logprobs",
        "base_logprobs",
        "tail_mass",
        "direction_norm",
        "kl",
        "token_target_logprob",
    ):
        torch.testing.assert_close(getattr(whole, name), getattr(parts, name))


def test_the_direction_with_and_without_both_pools() -> None:
    cached = states()
    torch.testing.assert_close(direction(cached, SteerConfig().to_recipe()), cached["correct"] - cached["incorrect"])
    without_outcomes = {p: cached[p] for p in ("base", "reference")}
    opsd = SteerConfig(recipe="opsd").to_recipe()
    torch.testing.assert_close(direction(without_outcomes, opsd), cached["reference"] - cached["base"])


def test_the_error_names_the_missing_pool() -> None:
    with pytest.raises(KeyError, match="incorrect"):
        combine_states({p: s for p, s in states().items() if p != "incorrect"}, SteerConfig().to_recipe())
