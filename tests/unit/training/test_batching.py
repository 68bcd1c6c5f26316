"""Alignment of states with the tokens that they predict, and the split into micro-batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ogls.config import TrainConfig
from ogls.models.policy import Policy
from ogls.training.batching import TrainItem, collate, micro_batches
from ogls.training.schedule import deal, order_steps, padding_share, split_step


def item(i: int, prompt: int, tokens: int, trained: int = 0, tail: int = 0) -> TrainItem:
    """An item with a recognisable target: all of its values are `i`."""
    top = {"logprobs": torch.full((trained, 2), float(i)), "ids": torch.full((trained, 2), i)}
    target = {**top, "tail_mass": torch.full((trained,), float(i))} if trained else {}
    return TrainItem(("p", i), tuple(range(prompt)), tuple(range(100, 100 + tokens)), trained, tail, **target)


def test_a_state_is_one_position_before_its_token() -> None:
    batch = collate([item(0, 3, 4, trained=2), item(1, 2, 5, trained=5, tail=2)])
    positions = list(zip(batch.row.tolist(), batch.position.tolist(), strict=True))
    assert positions == [(0, 2), (0, 3), (1, 1), (1, 2), (1, 3), (1, 4), (1, 5)]
    predicted = [batch.ids[row, position + 1].item() for row, position in positions[2:]]
    assert predicted == [100, 101, 102, 103, 104]
    assert batch.tail_ids.tolist() == [103, 104]
    assert batch.tail_position.tolist() == [4, 5]
    assert batch.target_ids[:, 0].tolist() == [0, 0, 1, 1, 1, 1, 1]


def test_sequences_end_with_the_last_token_with_a_loss() -> None:
    capped = item(0, 3, 9, trained=4)
    assert capped.length == 7
    assert collate([capped]).ids.shape == (1, 7)
    assert item(0, 3, 9, trained=4, tail=2).length == 12


def test_the_last_state_is_one_before_the_last_token() -> None:
    """State P + t - 1 depends on the tokens before t only: the model is causal, so only the position can be wrong."""
    batch = collate([item(0, 3, 4, trained=4)])
    assert batch.position.max().item() == batch.ids.shape[1] - 2


@pytest.mark.parametrize("limit", [1, 20, 50, 1000])
def test_micro_batches_contain_every_item_once_within_the_limit(limit: int) -> None:
    items = [item(i, 3 + i % 5, 4 + i % 7, trained=4) for i in range(20)]
    batches = micro_batches(items, limit)
    assert sorted(i.key for b in batches for i in b) == sorted(i.key for i in items)
    assert all(len(b) == 1 or len(b) * max(i.length for i in b) <= limit for b in batches)
    assert len(batches) == (20 if limit == 1 else 1 if limit == 1000 else len(batches))


def rollouts_like_real_ones(count: int, median: int) -> list[TrainItem]:
    """Items with prompts of 100 tokens and log-normal lengths; one in a thousand has ten times the median."""
    lengths = np.random.default_rng(7).lognormal(np.log(median), np.log(10) / 3.09, count)
    return [TrainItem(("p", i), (1,) * 100, (2,) * int(n), trained=int(n)) for i, n in enumerate(lengths)]


@pytest.mark.parametrize("ranks", [1, 2, 8])
@pytest.mark.parametrize("median", [500, 2000])
def test_less_than_five_percent_are_padding(median: int, ranks: int) -> None:
    """With default settings, in every round of 1,024 rollouts; filling micro-batches to the limit pads 10 to 30%."""
    config = TrainConfig()
    items = rollouts_like_real_ones(1024, median)
    steps = [step for _, step in order_steps(items, config, seed=0)]
    assert padding_share(steps, config.micro_batch_tokens, ranks) < 0.05
    filled = sum(len(part) * part[0].length for step in steps for part in fill(step, config.micro_batch_tokens))
    assert sum(item.length for item in items) / filled < (0.95 if median < 1000 else 1)


def fill(items: list[TrainItem], max_tokens: int) -> list[list[TrainItem]]:
    """Micro-batches of as many items as the limit allows, longest first."""
    batches: list[list[TrainItem]] = []
    for one in sorted(items, key=lambda i: i.length, reverse=True):
        if batches and (len(batches[-1]) + 1) * batches[-1][0].length <= max_tokens:
            batches[-1].append(one)
        else:
            batches.append([one])
    return batches


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_ranks_have_equal_work(ranks: int) -> None:
    """Each rollout is on one rank, and in a step no rank has 10% more tokens than the mean of all."""
    for _, step in order_steps(rollouts_like_real_ones(512, 500), TrainConfig(), seed=0):
        shares = deal(step, ranks)
        assert sorted(i.key for share in shares for i in share) == sorted(i.key for i in step)
        tokens = [sum(i.length for i in share) for share in shares]
        assert max(tokens) < 1.1 * sum(tokens) / ranks
        split = split_step(step, 16384, ranks)
        assert [sorted(i.key for b in share for i in b) for share in split] == [
            sorted(i.key for i in share) for share in shares
        ]


def test_padding_does_not_change_states(policy: Policy) -> None:
    """The hidden states of an item are the same in a padded batch and alone."""
    items = [item(0, 3, 4, trained=4), item(1, 12, 9, trained=9)]
    padded_batch, single_batch = collate(items), collate(items[:1])
    with torch.no_grad():
        padded, single = (
            policy.run_body(b.ids, b.mask).last_hidden_state[b.row, b.position] for b in (padded_batch, single_batch)
        )
    torch.testing.assert_close(padded[:4], single, atol=1e-5, rtol=0)
