"""Alignment: which state predicts which token, and how items share a micro-batch."""

from __future__ import annotations

import pytest
import torch

from ogls.models.policy import Policy
from ogls.training.batching import TrainItem, collate, micro_batches


def item(i: int, prompt: int, tokens: int, trained: int = 0, tail: int = 0) -> TrainItem:
    full = {"logprobs": torch.full((trained, 2), float(i)), "ids": torch.full((trained, 2), i)}
    target = {**full, "tail_mass": torch.full((trained,), float(i))} if trained else {}
    return TrainItem(("p", i), tuple(range(prompt)), tuple(range(100, 100 + tokens)), trained, tail, **target)


def test_places_are_one_before_their_token() -> None:
    batch = collate([item(0, 3, 4, trained=2), item(1, 2, 5, trained=5, tail=2)])
    places = list(zip(batch.row.tolist(), batch.place.tolist(), strict=True))
    assert places == [(0, 2), (0, 3), (1, 1), (1, 2), (1, 3), (1, 4), (1, 5)]
    predicted = [batch.ids[row, place + 1].item() for row, place in places[2:]]
    assert predicted == [100, 101, 102, 103, 104]
    assert batch.tail_ids.tolist() == [103, 104]
    assert batch.tail_place.tolist() == [4, 5]
    assert batch.target_ids[:, 0].tolist() == [0, 0, 1, 1, 1, 1, 1]


def test_sequences_end_with_their_last_loss() -> None:
    capped = item(0, 3, 9, trained=4)
    assert capped.length == 7
    assert collate([capped]).ids.shape == (1, 7)
    assert item(0, 3, 9, trained=4, tail=2).length == 12


def test_a_token_that_is_only_distilled_is_never_seen_beyond() -> None:
    """State P + t - 1 sees the tokens before t and not t itself: causality is the model's, the place is ours."""
    batch = collate([item(0, 3, 4, trained=4)])
    assert batch.place.max().item() == batch.ids.shape[1] - 2


@pytest.mark.parametrize("limit", [1, 20, 50, 1000])
def test_micro_batches_hold_everything_once_within_the_limit(limit: int) -> None:
    items = [item(i, 3 + i % 5, 4 + i % 7, trained=4) for i in range(20)]
    batches = micro_batches(items, limit)
    assert sorted(i.key for b in batches for i in b) == sorted(i.key for i in items)
    assert all(len(b) == 1 or len(b) * max(i.length for i in b) <= limit for b in batches)
    assert len(batches) == (20 if limit == 1 else 1 if limit == 1000 else len(batches))


def test_padding_changes_no_state(policy: Policy) -> None:
    """The hidden states at an item's places are those of the item alone."""
    items = [item(0, 3, 4, trained=4), item(1, 12, 9, trained=9)]
    both, alone = collate(items), collate(items[:1])
    with torch.no_grad():
        padded = policy.run_body(both.ids, both.mask).last_hidden_state[both.row, both.place][:4]
        single = policy.run_body(alone.ids, alone.mask).last_hidden_state[alone.row, alone.place]
    torch.testing.assert_close(padded, single, atol=1e-5, rtol=0)
