"""Sampling one token a row from logits, by inverting the CDF at a uniform number, in fp64.

A pass in fp64 over a vocabulary of 50,000 tokens costs more than the LM head of a small model. So a wide vocabulary
is searched in two steps: the block of tokens that holds the sampled one, then the token in it. With top-k or top-p,
only the most likely tokens are looked at, as long as they decide the result.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

WIDE = 4096  # a vocabulary of more tokens is searched in two steps; with top-p, this many likely tokens are looked at
BLOCK = 256  # tokens per block


def sample_tokens(
    logits: Float[Tensor, "B V"],
    uniform: Float[Tensor, " B"],
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float = 0.0,
) -> Int[Tensor, " B"]:
    """Token ids by inverse CDF, in the order of the ids, at `uniform` (fp64, in [0, 1)).

    Temperature 0 takes the most likely token. The cuts are applied after the temperature, in the order min_p, top_k,
    top_p, as in vLLM.
    """
    if temperature == 0:
        return logits.argmax(1)
    wide = logits.shape[1] > WIDE
    logits = (logits if wide else logits.double()) / temperature
    if min_p:
        floor = logits.max(1, keepdim=True).values + math.log(min_p)
        logits = logits.masked_fill(logits < floor, -torch.inf)
    if wide and (top_k or top_p < 1) and (likely := _likely_tokens(logits, top_k, top_p)):
        ids, logits, top_p_of_likely = likely
        return ids.gather(1, _invert(_cut(logits, 0, top_p_of_likely), uniform)[:, None])[:, 0]
    if top_k or top_p < 1:
        return _invert(_cut(logits.double(), top_k, top_p), uniform)
    return _invert_blocks(logits.softmax(1), uniform) if wide else _invert(logits.softmax(1), uniform)


def _likely_tokens(
    logits: Float[Tensor, "B V"], top_k: int, top_p: float
) -> tuple[Int[Tensor, "B N"], Float[Tensor, "B N"], Tensor | float] | None:
    """The ids, ascending, and fp64 logits of the tokens that top_k keeps (without it: of the WIDE most likely ones).

    With them, top_p as a share of their mass.

    None if they do not decide: tokens with equal logits on both sides of top_k, or more tokens than WIDE in top_p.
    """
    count = min(top_k or WIDE, logits.shape[1])
    found = logits.topk(count)
    if top_k and (logits >= found.values[:, -1:]).sum() > found.values.numel():
        return None
    ids, order = found.indices.sort(1)
    values = found.values.gather(1, order).double()
    if top_k:
        return ids, values, top_p
    mass = (values.logsumexp(1) - logits.logsumexp(1)).exp()[:, None]
    return (ids, values, top_p / mass) if bool((mass > top_p).all()) else None


def _cut(logits: Float[Tensor, "B N"], top_k: int, top_p: Tensor | float) -> Float[Tensor, "B N"]:
    """Probabilities (fp64, not normalised) after top_k (0: no cut) and top_p, one number or one per row [B, 1]."""
    if top_k:
        floor = logits.topk(min(top_k, logits.shape[1])).values[:, -1:]
        logits = logits.masked_fill(logits < floor, -torch.inf)
    probs = logits.softmax(1)
    if not isinstance(top_p, float) or top_p < 1:
        ordered, index = probs.sort(dim=1, descending=True)
        ordered = ordered.masked_fill(ordered.cumsum(1) - ordered >= top_p, 0)  # keep the token that reaches top_p
        probs = torch.zeros_like(probs).scatter(1, index, ordered)
    return probs


def _invert(probs: Float[Tensor, "B N"], uniform: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
    """The index at which the cumulative sum of each row exceeds `uniform` times its total."""
    cdf = probs.cumsum(1)
    token = torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True)[:, 0]
    return token.clamp(max=probs.shape[1] - 1)


def _invert_blocks(probs: Float[Tensor, "B V"], uniform: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
    """`_invert` for fp32 probabilities of many tokens; sums are in fp64."""
    count = -(-probs.shape[1] // BLOCK)
    blocks = torch.nn.functional.pad(probs, (0, count * BLOCK - probs.shape[1])).view(len(probs), count, BLOCK)
    cdf = blocks.sum(2, dtype=torch.float64).cumsum(1)
    level = (uniform * cdf[:, -1])[:, None]
    block = torch.searchsorted(cdf, level, right=True).clamp(max=count - 1)
    before = torch.where(block > 0, cdf.gather(1, (block - 1).clamp(min=0)), 0.0)
    within = before + blocks.gather(1, block[:, :, None].expand(-1, -1, BLOCK))[:, 0].double().cumsum(1)
    token = torch.searchsorted(within, level, right=True).clamp(max=BLOCK - 1)
    return (block * BLOCK + token)[:, 0].clamp(max=probs.shape[1] - 1)
