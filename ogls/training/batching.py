"""Aligning tokens, masks and targets: the only code that knows which state predicts which token.

The state at position p of a sequence predicts the token at p + 1, so token t of a rollout with a prompt of P tokens is
predicted at position P + t - 1. Masks come from recorded lengths, never from `ids != pad`, so stop tokens have a loss
even if pad = eos.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ogls.records import Key

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


# What a micro-batch costs beyond its tokens, in tokens: one more micro-batch must save more padding than this. With
# rollouts of 500 tokens and more, 64 in a step, less than 5% of the tokens are padding.
_BATCH_TOKENS = 128


@dataclass(frozen=True)
class TrainItem:
    """One rollout to train on: T trained tokens with their targets, and the number of tokens with the tail NLL.

    A top-K target has `ids`, `logprobs` and `tail_mass`; a full-vocabulary target has `state`. A policy gradient has
    `old_logprobs` and `advantage`. Log-probs are in nats, fp32.
    """

    key: Key
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    trained: int = 0  # T: the first tokens of the rollout have a token loss
    tail: int = 0  # the last tokens of the rollout have the tail NLL
    ids: Int[Tensor, "T K"] | None = None  # support of the target, int64
    logprobs: Float[Tensor, "T K"] | None = None  # log-probs of `ids` under the target
    tail_mass: Float[Tensor, " T"] | None = None  # probability of the target outside `ids`
    # Combined teacher state [T, D] that the head maps to the logits of the target, or a function that reads it.
    state: Float[Tensor, "T D"] | Callable[[], Tensor] | None = None
    old_logprobs: Float[Tensor, " T"] | None = None  # log-probs of the tokens at sampling time
    advantage: float = 0.0
    weights: Float[Tensor, " T"] | None = None  # weights of the trained tokens; None: uniform

    @property
    def length(self) -> int:
        """Number of tokens that run through the model: the prompt, and the rollout up to the last token with a loss."""
        return len(self.prompt_ids) + (len(self.token_ids) if self.tail else self.trained)


@dataclass(frozen=True)
class Batch:
    """B padded sequences of length L, with N trained tokens and M tokens with the tail NLL.

    Integer tensors are int64. The fields of a target are None if no item of the batch has them.
    """

    keys: list[Key]
    ids: Int[Tensor, "B L"]
    mask: Int[Tensor, "B L"]  # 1: token, 0: padding
    row: Int[Tensor, " N"]  # sequence of the state that predicts each trained token
    position: Int[Tensor, " N"]  # position of that state
    token_ids: Int[Tensor, " N"]
    tail_row: Int[Tensor, " M"]
    tail_position: Int[Tensor, " M"]
    tail_ids: Int[Tensor, " M"]
    target_ids: Int[Tensor, "N K"] | None
    target_logprobs: Float[Tensor, "N K"] | None
    target_tail: Float[Tensor, " N"] | None
    target_state: Float[Tensor, "N D"] | None
    old_logprobs: Float[Tensor, " N"] | None
    advantages: Float[Tensor, " N"]
    weights: Float[Tensor, " N"] | None


def micro_batches(items: Sequence[TrainItem], max_tokens: int) -> list[list[TrainItem]]:
    """Group items of similar length, longest first, into micro-batches of at most `max_tokens` tokens with padding.

    Of all such splits the one with the lowest cost is chosen: the tokens with padding, and `_BATCH_TOKENS` for each
    micro-batch. An item longer than `max_tokens` is a micro-batch by itself.
    """
    ordered = sorted(items, key=by_length, reverse=True)
    lengths = [item.length for item in ordered]
    best = [0.0] * (len(ordered) + 1)  # the cost of the first n items
    start_of = [0] * (len(ordered) + 1)  # where the last micro-batch of the first n items starts
    for end in range(1, len(ordered) + 1):
        best[end] = float("inf")
        for start in range(end - 1, -1, -1):
            size = (end - start) * lengths[start]
            if size > max_tokens and end - start > 1:
                break
            if (cost := best[start] + size + _BATCH_TOKENS) < best[end]:
                best[end], start_of[end] = cost, start
    batches: list[list[TrainItem]] = []
    end = len(ordered)
    while end:
        batches.append(ordered[start_of[end] : end])
        end = start_of[end]
    return batches[::-1]


def by_length(item: TrainItem) -> tuple[int, Key]:
    """Return the sort key of items by length; items of one length are in the order of their keys."""
    return item.length, item.key


def collate(items: Sequence[TrainItem], device: Any = "cpu") -> Batch:
    """Pad items on the right and concatenate the positions and targets of their tokens with a loss, on `device`."""
    import torch

    width = max(item.length for item in items)
    ids = torch.zeros(len(items), width, dtype=torch.long)
    mask = torch.zeros(len(items), width, dtype=torch.long)
    trained: list[tuple[int, int, int]] = []
    advantages: list[float] = []
    tail: list[tuple[int, int, int]] = []
    for row, item in enumerate(items):
        prompt, tokens = len(item.prompt_ids), item.token_ids
        sequence = [*item.prompt_ids, *tokens][: item.length]
        ids[row, : item.length] = torch.tensor(sequence)
        mask[row, : item.length] = 1
        trained += [(row, prompt + t - 1, tokens[t]) for t in range(item.trained)]
        advantages += [item.advantage] * item.trained
        tail += [(row, prompt + t - 1, tokens[t]) for t in range(len(tokens) - item.tail, len(tokens))]

    def concatenated(name: str) -> Any:
        parts = [part for item in items if (part := getattr(item, name)) is not None]
        return torch.cat(parts).to(device) if parts else None

    read = [(item.state() if callable(item.state) else item.state, item.trained) for item in items]
    states = [state[:trained] for state, trained in read if state is not None]

    def column(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    return Batch(
        keys=[item.key for item in items],
        ids=ids.to(device),
        mask=mask.to(device),
        row=column([row for row, _, _ in trained]),
        position=column([position for _, position, _ in trained]),
        token_ids=column([token for _, _, token in trained]),
        tail_row=column([row for row, _, _ in tail]),
        tail_position=column([position for _, position, _ in tail]),
        tail_ids=column([token for _, _, token in tail]),
        target_ids=concatenated("ids"),
        target_logprobs=concatenated("logprobs"),
        target_tail=concatenated("tail_mass"),
        target_state=torch.cat(states).to(device) if states else None,
        old_logprobs=concatenated("old_logprobs"),
        advantages=torch.tensor(advantages, device=device),
        weights=concatenated("weights"),
    )


def chunks(count: int, size: int) -> Iterator[slice]:
    """Return slices of at most `size` that cover range(count)."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def format_keys(items: Sequence[TrainItem]) -> str:
    """Format the first three keys, in sorted order, and the number of others."""
    first = ", ".join(f"({p}, {s})" for p, s in sorted(i.key for i in items)[:3])
    return first + (f" and {len(items) - 3} more" if len(items) > 3 else "")
