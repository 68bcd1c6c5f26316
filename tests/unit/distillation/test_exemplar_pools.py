"""The pools and directions that `benchmarks/exemplars.py` measures."""

from __future__ import annotations

import pytest
import torch
from exemplar_pools import FINER, Variant, direction, finer_classes, gains, pair_of_pools, steps_of

from ogls.records import Problem, Rollout

NAMES = [name for name, _ in FINER]


def test_an_exemplar_is_cut_to_its_calculations_and_its_last_answer() -> None:
    text = "He has $1,200 / 3 = 400 left.\nA: 5\nSo 400 - 12 = 388 in all.\nA: 388"
    assert steps_of(text) == "1200 / 3 = 400\n400 - 12 = 388\nA: 388"
    assert steps_of("no numbers") == ""


def test_pools_have_at_most_their_size_and_those_of_one_outcome_share_no_exemplar() -> None:
    rollout = Rollout("p", 0, (), (1,), "", "correct")
    pools = {"correct": ["a", "b", "c"], "incorrect": ["x"]}
    assert pair_of_pools(Variant(2, "hash"), pools, rollout, 1) == (["a", "b"], ["x"])
    assert pair_of_pools(Variant(8, "hash"), pools, rollout, 1) is None  # more than every rollout has
    assert pair_of_pools(Variant(2, "shrunk", shrink="token"), pools, rollout, 1) is None  # no spread of one exemplar
    assert pair_of_pools(Variant(1, "same outcome", same=True), pools, rollout, 1) == (["a"], ["b"])
    assert pair_of_pools(Variant(2, "same outcome", same=True), pools, rollout, 1) is None


@pytest.mark.parametrize("shrink", ["token", "logit"])
def test_a_direction_shrinks_by_the_spread_of_its_exemplars(shrink: str) -> None:
    generator = torch.Generator().manual_seed(0)
    head, one, other = (torch.randn(n, 4, generator=generator) for n in (9, 3, 3))
    base = torch.randn(3, 9, generator=generator).log_softmax(-1)

    def target(variant: Variant, correct: list[torch.Tensor], failed: list[torch.Tensor]) -> torch.Tensor:
        return (base + direction(variant, base, correct, failed, head)).log_softmax(-1)

    plain, shrunk = Variant(2, "hash"), Variant(2, "shrunk", shrink=shrink)
    torch.testing.assert_close(target(shrunk, [one, one], [other, other]), target(plain, [one, one], [other, other]))
    spread = 100 * torch.randn(3, 4, generator=generator)
    noisy = target(shrunk, [one + spread, one - spread], [other, other])
    if shrink == "token":  # the spread explains more than the whole direction
        torch.testing.assert_close(noisy, base)
    assert ((noisy - base).abs().sum() < (target(plain, [one, one], [other, other]) - base).abs().sum()).all()


def test_the_gained_probability_is_split_by_where_its_tokens_stand() -> None:
    moved = torch.tensor([[0.3, 0.2, 0.1, 0.05, -0.65]])
    parts = gains(moved, correct={0, 1}, failed={1, 2})
    expected = {"gain_correct": 0.3, "gain_both": 0.2, "gain_failed": 0.1, "gain_neither": 0.05}
    assert {name: float(value) for name, value in parts.items()} == pytest.approx(expected)


def test_the_finer_classes_of_tokens() -> None:
    problem = Problem("p", "Ann buys 12 apples.", "12")
    texts = ["12", "1", "7", "+", " the", " wait", " apples", " pears"]
    expected = [0, 0, 1, 2, 3, 4, 5, 6]
    assert [NAMES[i] for i in finer_classes(problem, texts)] == [NAMES[i] for i in expected]
