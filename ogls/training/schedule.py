"""The order of a round: its optimizer steps, and which rank runs which micro-batches of a step.

All of it depends on the rollouts, the settings and the seed alone, so every rank knows what the others do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from ogls.config import TrainConfig
from ogls.training.batching import TrainItem, by_length, micro_batches

MicroBatch = list[TrainItem]


def order_steps(items: Sequence[TrainItem], config: TrainConfig, seed: int) -> list[tuple[int, list[TrainItem]]]:
    """Return (epoch, items) of every optimizer step of a round: all items once an epoch, in an order of its own.

    The parts are nearly equal: AdamW takes a full step for any number of rollouts, so a small rest would count too
    much.
    """
    steps = -(-len(items) // config.batch_rollouts)
    orders = [np.random.default_rng([seed, epoch]).permutation(len(items)) for epoch in range(config.epochs)]
    return [
        (epoch, [items[i] for i in part])
        for epoch, order in enumerate(orders if steps else ())
        for part in np.array_split(order, steps)
    ]


def split_step(items: Sequence[TrainItem], max_tokens: int, ranks: int) -> list[list[MicroBatch]]:
    """Return the micro-batches of each rank for one optimizer step."""
    return [micro_batches(share, max_tokens) for share in deal(items, ranks)]


def deal(items: Sequence[TrainItem], ranks: int) -> list[list[TrainItem]]:
    """Deal items to `ranks` shares with nearly equal numbers of tokens: longest first, to the share with the fewest."""
    shares: list[list[TrainItem]] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    for item in sorted(items, key=by_length, reverse=True):
        rank = tokens.index(min(tokens))
        shares[rank].append(item)
        tokens[rank] += item.length
    return shares


def padding_share(steps: Iterable[Sequence[TrainItem]], max_tokens: int, ranks: int = 1) -> float:
    """Return the share of padding in all tokens that the optimizer steps run through the model."""
    tokens = padded = 0
    for items in steps:
        for batch in (batch for share in split_step(items, max_tokens, ranks) for batch in share):
            tokens += sum(item.length for item in batch)
            padded += len(batch) * batch[0].length  # the longest is first
    return 1 - tokens / padded if padded else 0.0
