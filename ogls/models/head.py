"""Logits of the head, and log-probs on a support without keeping all logits for the backward pass.

Logits are accumulated in fp32 from the operands as they are stored, whatever the type of the model: in bfloat16 a logit
of 20 would be rounded to a multiple of 0.125, which is more than the signals that are distilled. On CUDA, fp32 states
and a bfloat16 head are multiplied on the tensor cores without rounding either: the states are a sum of bfloat16 terms.

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

HEAD_BLOCK = 8192  # rows of the head that are converted to fp32 at once


def head_logits(states: Float[Tensor, "*B D"], head: Float[Tensor, "V D"]) -> Float[Tensor, "*B V"]:
    """The logits of hidden states, in fp32 whatever the type of the model. The gradient flows to the states only."""
    return _logits_function().apply(states.reshape(-1, states.shape[-1]), head).reshape(*states.shape[:-1], len(head))


def binned_logprobs(
    states: Float[Tensor, "N D"], head: Float[Tensor, "V D"], ids: Int[Tensor, "N K"]
) -> Float[Tensor, "N B"]:
    """Log-probs (nats, fp32) on the support `ids` and, unless K = V, of all other tokens as one bin (then B = K + 1).

    The gradient flows to the states and not to the head, and can be computed only once.
    """
    import torch

    if ids.shape[-1] == head.shape[0]:
        return head_logits(states, head).gather(-1, ids).log_softmax(-1)
    inside, rest = _scores_function().apply(states, head, ids)
    # log(sum of all) = log(sum inside + sum of the rest), so a log_softmax over the bins normalises them.
    return torch.cat([inside, rest], -1).log_softmax(-1)


def nll(states: Float[Tensor, "M D"], head: Float[Tensor, "V D"], ids: Int[Tensor, " M"]) -> Float[Tensor, " M"]:
    """-log q(id) of every token, in nats."""
    return -binned_logprobs(states, head, ids[:, None])[:, 0]


def _logits(states: Float[Tensor, "N D"], head: Float[Tensor, "V D"]) -> Float[Tensor, "N V"]:
    """states @ head.T in fp32."""
    import torch

    if head.dtype == torch.float32:
        return states.float() @ head.T
    if head.is_cuda and states.dtype == head.dtype:
        return torch.mm(states, head.T, out_dtype=torch.float32)
    on_tensor_cores = head.is_cuda and head.dtype == torch.bfloat16
    terms = bfloat16_terms(states) if on_tensor_cores else [states.float()]
    logits = torch.zeros(len(states), len(head), device=head.device)
    for part, block in zip(logits.split(HEAD_BLOCK, -1), head.split(HEAD_BLOCK), strict=True):
        for term in terms:
            part += torch.mm(term, block.T, out_dtype=torch.float32) if on_tensor_cores else term @ block.float().T
    return logits


def bfloat16_terms(states: Float[Tensor, "N D"]) -> list[Float[Tensor, "N D"]]:
    """States as a sum of bfloat16 tensors: exact for fp16 (two terms); to 2^-24 of each number for fp32 (three)."""
    import torch

    rest, terms = states.float(), []
    for _ in range(2 if states.dtype == torch.float16 else 3):
        terms.append(rest.to(torch.bfloat16))
        rest = rest - terms[-1].float()
    return terms


def _states_gradient(grad: Float[Tensor, "N V"], head: Float[Tensor, "V D"]) -> Float[Tensor, "N D"]:
    """grad @ head in fp32. On CUDA the gradient of the logits is rounded to the type of the head (unbiased, 2^-9)."""
    import torch

    if head.dtype == torch.float32:
        return grad @ head
    if head.is_cuda:
        return torch.mm(grad.to(head.dtype), head, out_dtype=torch.float32)
    total = torch.zeros(len(grad), head.shape[1], device=head.device)
    for part, block in zip(grad.split(HEAD_BLOCK, -1), head.split(HEAD_BLOCK), strict=True):
        total += part @ block.float()
    return total


@cache
def _logits_function() -> Any:
    """The autograd function, created on first use so that this module imports without torch."""
    import torch

    class Logits(torch.autograd.Function):
        """Logits [N, V] of states [N, D]."""

        @staticmethod
        def forward(ctx: Any, states: Tensor, head: Tensor) -> Tensor:
            ctx.save_for_backward(head)
            ctx.dtype = states.dtype
            return _logits(states, head)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
            (head,) = ctx.saved_tensors
            return _states_gradient(grad, head).to(ctx.dtype), None

    return Logits


@cache
def _scores_function() -> Any:
    """The autograd function, created on first use so that this module imports without torch."""
    import torch
    from torch.autograd.function import once_differentiable

    class Scores(torch.autograd.Function):
        """Logits on the support [N, K], and the log-sum-exp of all other logits [N, 1]."""

        @staticmethod
        def forward(ctx: Any, states: Tensor, head: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
            buffer = _logits(states, head)
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
            return _states_gradient(buffer, head).to(ctx.dtype), None, None

    return Scores
