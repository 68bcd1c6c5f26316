"""Losses of one token, in nats: divergences between target and student, and the NLL of the tail.

    forward KL  sum p log(p / q)          reverse KL  sum q log(q / p)
    JSD_b       b KL(p || m) + (1 - b) KL(q || m),  m = b p + (1 - b) q        (generalised: GKD, 2306.13649)

    GRPO        -min(r A, clip(r, 1 - low, 1 + high) A),  r = pi / pi_old                 (2402.03300, eq. 3)

with target p and student q over the same bins: the whole vocabulary, or the top-K tokens of the target and one bin
for all other tokens (the tail), so that the mass outside the support is compared too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ogls.models.head import binned_logprobs, head_logits, nll

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


_LEAST_TAIL = 1e-30  # keeps log(tail mass) finite if the fp32 tail of a target underflows


@dataclass(frozen=True)
class LossInputs:
    """N distilled tokens: the states of the student, the head, and the target."""

    states: Float[Tensor, "N D"]
    head: Float[Tensor, "V D"]
    target_ids: Int[Tensor, "N K"] | None  # None: target_logprobs cover the vocabulary
    target_logprobs: Float[Tensor, "N B"]  # B = K, or V without ids
    target_tail: Float[Tensor, " N"] | None


@dataclass(frozen=True)
class PolicyInputs:
    """N sampled tokens with their log-probs at sampling time and the advantage of their rollout."""

    states: Float[Tensor, "N D"]
    head: Float[Tensor, "V D"]
    token_ids: Int[Tensor, " N"]
    old_logprobs: Float[Tensor, " N"]
    advantages: Float[Tensor, " N"]


def distillation(
    inputs: LossInputs,
    kind: str,
    jsd_beta: float = 0.5,
    tail_bucket: bool = True,
    token_clip: float = 0.0,
    pointwise_clip: float = 0.0,
) -> Float[Tensor, " N"]:
    """The divergence of every distilled token in nats; the caller normalises over the batch.

    Without `tail_bucket` both distributions are renormalised on the support. `token_clip` clips the
    divergence of a token after the sum. `pointwise_clip` clips each term of the forward KL, as OPSD does; clipped terms
    have a wrong gradient, so it is for reproduction.
    """
    if inputs.target_ids is None:
        target = inputs.target_logprobs.log_softmax(-1)
        student = head_logits(inputs.states, inputs.head).log_softmax(-1)
    else:
        student = binned_logprobs(inputs.states, inputs.head, inputs.target_ids)
        if not tail_bucket:
            student = student[:, : inputs.target_ids.shape[-1]].log_softmax(-1)
        target = target_bins(inputs.target_logprobs, inputs.target_tail, student.shape[-1])
    if pointwise_clip:
        loss = (target.exp() * (target - student)).clamp(max=pointwise_clip).sum(-1)
    else:
        loss = divergence(kind, target, student, jsd_beta)
    if token_clip:
        loss = loss.clamp(max=token_clip)
    return loss


def divergence(
    kind: str, target: Float[Tensor, "N B"], student: Float[Tensor, "N B"], jsd_beta: float = 0.5
) -> Float[Tensor, " N"]:
    """D(target, student) in nats from log-probs over the same bins. Raises ValueError for an unknown kind."""
    import torch

    if kind == "forward_kl":
        return _kl(target, student)
    if kind == "reverse_kl":
        return _kl(student, target)
    if kind == "jsd":
        beta = torch.tensor(jsd_beta, device=target.device)
        mixture = torch.logaddexp(target + beta.log(), student + (1 - beta).log())
        return jsd_beta * _kl(target, mixture) + (1 - jsd_beta) * _kl(student, mixture)
    raise ValueError(f"no divergence {kind}")


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum(-1)


def target_bins(
    logprobs: Float[Tensor, "N K"], tail_mass: Float[Tensor, " N"] | None, bins: int
) -> Float[Tensor, "N B"]:
    """Stored target log-probs and tail mass as log-probs over `bins` bins, normalised to correct rounding in
    storage."""
    import torch

    if tail_mass is not None and bins > logprobs.shape[-1]:
        logprobs = torch.cat([logprobs, tail_mass.clamp(min=_LEAST_TAIL).log()[:, None]], -1)
    return logprobs.log_softmax(-1)


def group_advantages(rewards: Sequence[float], normalise_std: bool = True) -> list[float]:
    """A_i = r_i - mean(r), divided by the group's standard deviation unless `normalise_std` is false (2503.20783).

    Equal rewards give 0.
    """
    mean = sum(rewards) / len(rewards)
    std = (sum((r - mean) ** 2 for r in rewards) / len(rewards)) ** 0.5
    return [(r - mean) / (std if normalise_std and std > 0 else 1.0) for r in rewards]


def policy_gradient(inputs: PolicyInputs, clip_low: float, clip_high: float) -> Float[Tensor, " N"]:
    """GRPO's clipped surrogate of every token, without the KL to a reference model.

    Separate lower and upper clips, and a mean over the tokens of a batch instead of a rollout, follow DAPO
    (2503.14476).
    """
    import torch

    ratio = (-nll(inputs.states, inputs.head, inputs.token_ids) - inputs.old_logprobs).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(ratio * inputs.advantages, clipped * inputs.advantages)
