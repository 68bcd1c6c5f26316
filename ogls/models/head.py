"""Logits of the head, and log-probs on a support without keeping all logits for the backward pass.

A divergence on a support of K tokens plus one bin for the rest needs K logits a token and the log-sum-exp of all other
logits. Both are computed from one buffer [N, V], which the backward pass overwrites with the gradient of the logits.
Autograd would keep three or more such tensors. The head is never trained.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


def head_logits(states: Float[Tensor, "*B D"], head: Float[Tensor, "V D"]) -> Float[Tensor, "*B V"]:
    """The logits of hidden states, in fp32 whatever the type of the model."""
    return (states.to(head.dtype) @ head.T).float()


def binned_logprobs(
    states: Float[Tensor, "N D"], head: Float[Tensor, "V D"], ids: Int[Tensor, "N K"]
) -> Float[Tensor, "N B"]:
    """Log-probs (nats, fp32) on the support `ids` and, unless K = V, of all other tokens as one bin (then B = K + 1).

    The gradient flows to the states and not to the head, and can be computed only once.
    """
    import torch

    if ids.shape[-1] == head.shape[0]:
        return head_logits(states, head).gather(-1, ids).log_softmax(-1)
    inside, rest = _function().apply(states, head, ids)
    # log(sum of all) = log(sum inside + sum of the rest), so a log_softmax over the bins normalises them.
    return torch.cat([inside, rest], -1).log_softmax(-1)


def nll(states: Float[Tensor, "M D"], head: Float[Tensor, "V D"], ids: Int[Tensor, " M"]) -> Float[Tensor, " M"]:
    """-log q(id) of every token, in nats."""
    return -binned_logprobs(states, head, ids[:, None])[:, 0]


@cache
def _function() -> Any:
    """The autograd function, created on first use so that this module imports without torch."""
    import torch
    from torch.autograd.function import once_differentiable

    class Scores(torch.autograd.Function):
        """Logits on the support [N, K], and the log-sum-exp of all other logits [N, 1]."""

        @staticmethod
        def forward(ctx: Any, states: Tensor, head: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
            buffer = head_logits(states, head)
            inside = buffer.gather(-1, ids)
            buffer.scatter_(-1, ids, -torch.inf)
            max_logit = buffer.amax(-1, keepdim=True)
            total = buffer.sub_(max_logit).exp_().sum(-1, keepdim=True)
            ctx.save_for_backward(head, ids, total)
            ctx.buffer, ctx.dtype = buffer, states.dtype
            return inside, max_logit + total.log()

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, grad_inside: Tensor, grad_rest: Tensor) -> tuple[Tensor, None, None]:
            head, ids, total = ctx.saved_tensors
            if ctx.buffer is None:
                raise RuntimeError(
                    "the gradient of binned log-probs can be computed only once: its buffer is overwritten"
                )
            buffer, ctx.buffer = ctx.buffer, None
            buffer.mul_(grad_rest / total).scatter_add_(-1, ids, grad_inside)
            return (buffer.to(head.dtype) @ head).to(ctx.dtype), None, None

    return Scores
