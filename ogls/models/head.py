"""The head, and what a loss has to know of its logits, without keeping them.

A divergence on a support of K tokens and one bin for the rest needs K logits of a token and the log-sum-exp of all
others. Both come out of one buffer [N, V] that is computed in place and turned, in place again, into the logits'
gradient: where autograd keeps three and more such tensors alive, this keeps one. The head itself is never trained.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


def head_logits(states: Float[Tensor, "*B D"], head: Float[Tensor, "V D"]) -> Float[Tensor, "*B V"]:
    """The head's logits in fp32, whatever the model's type."""
    return (states.to(head.dtype) @ head.T).float()


def binned_logprobs(
    states: Float[Tensor, "N D"], head: Float[Tensor, "V D"], ids: Int[Tensor, "N K"]
) -> Float[Tensor, "N B"]:
    """Log-probs on the support and, unless K = V, of all the rest in one bin (B = K + 1), in fp32.

    Its gradient reaches the states and not the head, and can be taken once.
    """
    import torch

    if ids.shape[-1] == head.shape[0]:
        return head_logits(states, head).gather(-1, ids).log_softmax(-1)
    inside, rest = _function().apply(states, head, ids)
    # log(sum of all) = log(sum inside + sum of the rest), so that the bins normalise themselves.
    return torch.cat([inside, rest], -1).log_softmax(-1)


def nll(states: Float[Tensor, "M D"], head: Float[Tensor, "V D"], ids: Int[Tensor, " M"]) -> Float[Tensor, " M"]:
    """-log q(id) of every token."""
    return -binned_logprobs(states, head, ids[:, None])[:, 0]


@cache
def _function() -> Any:
    """Made when it is first asked for: this module imports without torch."""
    import torch
    from torch.autograd.function import once_differentiable

    class Scores(torch.autograd.Function):
        """Logits inside the support [N, K] and the log-sum-exp of those outside [N, 1]."""

        @staticmethod
        def forward(ctx: Any, states: Tensor, head: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
            buffer = head_logits(states, head)
            inside = buffer.gather(-1, ids)
            buffer.scatter_(-1, ids, -torch.inf)
            most = buffer.amax(-1, keepdim=True)
            total = buffer.sub_(most).exp_().sum(-1, keepdim=True)
            ctx.save_for_backward(head, ids, total)
            ctx.buffer, ctx.type = buffer, states.dtype
            return inside, most + total.log()

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, by_inside: Tensor, by_rest: Tensor) -> tuple[Tensor, None, None]:
            head, ids, total = ctx.saved_tensors
            if ctx.buffer is None:
                raise RuntimeError("the gradient of binned log-probs can be taken once: its buffer is used up")
            buffer, ctx.buffer = ctx.buffer, None
            buffer.mul_(by_rest / total).scatter_add_(-1, ids, by_inside)
            return (buffer.to(head.dtype) @ head).to(ctx.type), None, None

    return Scores
