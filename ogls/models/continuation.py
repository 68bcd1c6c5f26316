"""Running many continuations of shared prefixes: each prefix is prefilled once, and its key-value cache is shared.

The keys and values of a prefix are copied for its continuations one layer at a time, and not kept: attention needs them
beside those of the continuation, but no two layers need them at once.

Prefixes are padded on the left. So the tokens of a row have no gap between them, and the distance of two tokens in the
cache is their distance in the text, which attention with a sliding window relies on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ogls.errors import ModelError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.03}  # of the norm of the states


class Body(Protocol):
    """A model without its head, such as a Policy."""

    device: Any

    def run_body(self, ids: Any, mask: Any = None, **arguments: Any) -> Any:
        """The output of the model; `last_hidden_state` is [B, L, D]."""
        ...


def run_continuations(
    body: Body, prefixes: Sequence[Sequence[int]], pairs: Sequence[tuple[int, Sequence[int]]], batch_tokens: int
) -> Iterable[Float[Tensor, "T D"]]:
    """Yield the final hidden states [T, D] that predict the tokens of each (prefix index, tokens) pair, in order.

    State 0 is the last state of the prefix. States have the dtype and the device of the model. Every prefix is
    prefilled once; continuations run in batches of at most `batch_tokens` tokens including padding and prefix (or one
    continuation).
    """
    import torch
    from transformers import Cache, DynamicCache

    lengths = torch.tensor([len(p) for p in prefixes], device=body.device)
    ids, mask = _pad(prefixes, body.device, left=True)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    out = body.run_body(ids, mask, position_ids=position, past_key_values=DynamicCache(), use_cache=True)
    first = out.last_hidden_state[:, -1]
    longest = max(len(tokens) for _, tokens in pairs)
    step = max(1, batch_tokens // (ids.shape[1] + longest))
    for start in range(0, len(pairs), step):
        part = pairs[start : start + step]
        index = torch.tensor([i for i, _ in part], device=body.device)
        tokens, token_mask = _pad([t[:-1] for _, t in part], body.device, left=False)
        states = None
        if tokens.shape[1]:
            cache = Cache(layers=_share(out.past_key_values.layers, index))
            position = lengths[index, None] + torch.arange(tokens.shape[1], device=body.device)
            states = body.run_body(
                tokens,
                torch.cat([mask[index], token_mask], 1),
                position_ids=position,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
        for row, (i, sequence) in enumerate(part):
            rest = [states[row, : len(sequence) - 1]] if states is not None else []
            yield torch.cat([first[i][None], *rest])


def _share(prefixes: Sequence[Any], rows: Tensor) -> list[Any]:
    """Cache layers whose row i continues row `rows[i]` of the layers `prefixes`."""
    import torch
    from transformers.cache_utils import DynamicLayer

    class SharedLayer(DynamicLayer):
        def __init__(self, prefix: Any):
            super().__init__()
            self.prefix = prefix

        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            keys = torch.cat([self.prefix.keys[rows], key_states], -2)
            return keys, torch.cat([self.prefix.values[rows], value_states], -2)

        def get_seq_length(self) -> int:
            return int(self.prefix.keys.shape[-2])

    return [SharedLayer(prefix) for prefix in prefixes]


def check_continuations(body: Body, dtype: str, vocabulary: int, path: str) -> None:
    """Raise ModelError unless continuations of shared prefixes have the states of full sequences.

    Compares them on short sequences of random tokens, with prefixes of two lengths.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    prefixes, tokens = ([torch.randint(vocabulary, (n,), generator=generator).tolist() for n in (5, 14)] for _ in "ab")
    pairs = [(0, tokens[1]), (1, tokens[0]), (0, tokens[0])]
    try:
        with torch.inference_mode():
            shared = list(run_continuations(body, prefixes, pairs, 1 << 20))
            error = max(_error(body, prefixes[i], t, states) for (i, t), states in zip(pairs, shared, strict=True))
    except (AttributeError, LookupError, NotImplementedError, TypeError, ValueError) as reason:
        raise ModelError(
            f"{path}: its attention cache cannot be shared between rollouts ({type(reason).__name__}: {reason}); "
            "models with linear attention or state-space layers are not supported"
        ) from None
    if not error < _TOLERANCE[dtype]:
        raise ModelError(
            f"{path}: the states of a rollout that continues a cached prompt differ by {error:.2g} of their norm from "
            "those of the whole sequence; such a model cannot be a teacher"
        )


def _error(body: Body, prefix: Sequence[int], tokens: Sequence[int], states: Tensor) -> float:
    """The norm of the difference between `states` [T, D] and those of the full sequence, relative to the latter's."""
    import torch

    ids = torch.tensor([[*prefix, *tokens[:-1]]], device=body.device)
    full = body.run_body(ids, torch.ones_like(ids), use_cache=False).last_hidden_state[0, len(prefix) - 1 :].float()
    return float((states.float() - full).norm() / full.norm())


def _pad(rows: Sequence[Sequence[int]], device: Any, left: bool) -> tuple[Tensor, Tensor]:
    """Token ids padded with 0 on the left or right, and the mask (1: token, 0: padding), both [rows, width] int64."""
    import torch

    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        part = slice(width - len(row), width) if left else slice(0, len(row))
        ids[number, part] = torch.tensor(row, dtype=torch.long)
        mask[number, part] = 1
    return ids.to(device), mask.to(device)
