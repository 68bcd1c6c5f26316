"""The heads of all models that compute pools, as one matrix, and the other models themselves.

The logits of a target are a sum over models of a head times combined states. With the heads side by side, [V, D_1 + D_2
+ ...], and the states of a pool in the columns of its model and zeros elsewhere, that sum is one product. So steering,
style, sweeps and losses see one head, whatever the number of models. A run with one model has its own head as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ogls.config import Pool, RunConfig
from ogls.errors import ModelError
from ogls.models.load import load_head, load_tokenizer

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

_LISTED = 3  # tokens that an error names


@dataclass(frozen=True)
class Heads:
    """The heads side by side. `columns` has, by pool of another model, the columns of its head in `matrix`."""

    matrix: Float[Tensor, "V D"]
    own: int  # columns of the head of the run's model, which come first
    columns: Mapping[Pool, slice] = field(default_factory=dict)

    def place(self, states: Mapping[Pool, Tensor]) -> dict[Pool, Tensor]:
        """Cached states [T, D_m] by pool as states [T, D] for `matrix`, on its device."""
        device, width = self.matrix.device, self.matrix.shape[1]
        if width == self.own:
            return {pool: s.to(device) for pool, s in states.items()}
        placed = {}
        for pool, s in states.items():
            placed[pool] = s.new_zeros(len(s), width, device=device)
            placed[pool][:, self.columns.get(pool, slice(0, self.own))] = s.to(device)
        return placed


def load_heads(config: RunConfig, own: Tensor | None = None) -> Heads:
    """The heads of the run's model and of all other models. `own` is that of the run's model, if it is loaded.

    Heads that differ in padding are cut to the ids that all of them have; of several types, all are in the widest.
    """
    import torch

    heads = {"": load_head(config.model) if own is None else own}
    heads |= {path: load_head(model).to(heads[""].device) for path, model in config.other_models().items()}
    if len(heads) == 1:
        return Heads(heads[""], heads[""].shape[1])
    rows = min(len(head) for head in heads.values())
    starts, start = {}, 0
    for path, head in heads.items():
        starts[path], start = slice(start, start + head.shape[1]), start + head.shape[1]
    columns = {name: starts[p.model] for name, p in config.declared_pools().items() if p.model in starts and p.model}
    return Heads(torch.cat([head[:rows] for head in heads.values()], 1), heads[""].shape[1], columns)


def check_teachers(config: RunConfig, tokenizer: Any) -> None:
    """Raise ModelError unless every other model has the ids of the run's tokenizer, and weights that can be loaded."""
    for path, model in config.other_models().items():
        try:
            other, _ = load_tokenizer(model), load_head(model)
        except ModelError as error:
            pools = ", ".join(name for name, p in config.declared_pools().items() if p.model == path)
            raise ModelError(f"the model of teacher.pools {pools}: {error}") from None
        check_same_tokens(path, other, tokenizer)


def check_same_tokens(path: str, other: Any, own: Any) -> None:
    """Raise ModelError, with the first differences, unless two tokenizers give every token the same id."""
    theirs, ours = other.get_vocab(), own.get_vocab()
    differing = sorted(t for t in {**theirs, **ours} if theirs.get(t) != ours.get(t))
    if differing:
        listed = ", ".join(
            f"{t!r} is {theirs.get(t, 'absent')}, not {ours.get(t, 'absent')}" for t in differing[:_LISTED]
        )
        raise ModelError(
            f"teacher.pools: the tokenizer of {path} differs from that of the run's model in {len(differing)} tokens: "
            f"{listed}; logits can be added only token by token, so choose a model with the same tokenizer"
        )
