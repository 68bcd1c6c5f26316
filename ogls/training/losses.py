"""Token losses in nats: divergences between target and student, and the policy gradient of GRPO.

    forward KL  sum p log(p / q)
    reverse KL  sum q log(q / p)
    JSD_b       b KL(p || m) + (1 - b) KL(q || m),  m = b p + (1 - b) q    (generalised JSD of GKD, arXiv 2306.13649)
    GRPO        -min(r A, clip(r, 1 - low, 1 + high) A),  r = pi / pi_old  (arXiv 2402.03300, eq. 3)

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


_MIN_TAIL = 1e-30  # keeps log(tail mass) finite if the fp32 tail of a target underflows


@dataclass(frozen=True)
class LossInputs:
    """N distilled tokens: the states of the student, the head, and the target.

    The target is the top-K log-probs and the tail mass or, without `target_ids`, logits over the whole vocabulary.
    """

    states: Float[Tensor, "N D"]
    head: Float[Tensor, "V D"]
    target_ids: Int[Tensor, "N K"] | None  # support of the target, int64; None: the whole vocabulary
    target_logprobs: Float[Tensor, "N B"]  # B = K log-probs in nats, or B = V logits without `target_ids`
    target_tail: Float[Tensor, " N"] | None  # probability of the target outside the support


@dataclass(frozen=True)
class PolicyInputs:
    """N sampled tokens: the states of the policy, the head, and the values of the policy gradient.

    At a sampling temperature T, the states are divided by T and `old_logprobs` are those at T.
    """

    states: Float[Tensor, "N D"]
    head: Float[Tensor, "V D"]
    token_ids: Int[Tensor, " N"]  # the sampled tokens, int64
    old_logprobs: Float[Tensor, " N"]  # their log-probs (nats) at sampling time
    advantages: Float[Tensor, " N"]  # the advantages of their rollouts


def distillation(
    inputs: LossInputs,
    kind: str,
    jsd_beta: float = 0.5,
    tail_bucket: bool = True,
    token_clip: float = 0.0,
    pointwise_clip: float = 0.0,
) -> Float[Tensor, " N"]:
    """Return the divergence [N] of every distilled token in nats, fp32; the caller normalises over the batch.

    `kind` is forward_kl, reverse_kl or jsd. The bins are the support and one bin for the tail; without `tail_bucket`
    both distributions are renormalised on the support. `token_clip` clips the divergence of a token after the sum over
    bins. `pointwise_clip` clips each term of the forward KL before the sum, as OPSD does (arXiv 2601.18734); clipped
    terms have no gradient, which can reverse the gradient of the sum, so use it for reproduction only. 0 disables a
    clip. Raises ValueError if `kind` is unknown.
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
    """Return D(target, student) [N] in nats from log-probs over the same B bins.

    `kind` is forward_kl, reverse_kl or jsd; `jsd_beta` is the weight of the target in the mixture. Raises ValueError if
    `kind` is unknown.
    """
    import torch

    if kind == "forward_kl":
        return _kl(target, student)
    if kind == "reverse_kl":
        return _kl(student, target)
    if kind == "jsd":
        beta = torch.tensor(jsd_beta, device=target.device)
        mixture = torch.logaddexp(target + beta.log(), student + (1 - beta).log())
        return jsd_beta * _kl(target, mixture) + (1 - jsd_beta) * _kl(student, mixture)
    raise ValueError(f"unknown divergence {kind}: use forward_kl, reverse_kl or jsd")


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """Return KL(p || q) of log-probs, summed over the last axis."""
    return (p.exp() * (p - q)).sum(-1)


def target_bins(
    logprobs: Float[Tensor, "N K"], tail_mass: Float[Tensor, " N"] | None, bins: int
) -> Float[Tensor, "N B"]:
    """Return the log-probs (nats) of a stored target over `bins` bins: K, or K + 1 with the tail as the last bin.

    The result is normalised, because stored log-probs are rounded to fp16.
    """
    import torch

    if tail_mass is not None and bins > logprobs.shape[-1]:
        logprobs = torch.cat([logprobs, tail_mass.clamp(min=_MIN_TAIL).log()[:, None]], -1)
    return logprobs.log_softmax(-1)


def group_advantages(rewards: Sequence[float], normalise_std: bool = True) -> list[float]:
    """Return the advantages of a group, A_i = (r_i - mean(r)) / std(r) (arXiv 2402.03300).

    Without `normalise_std` the division is omitted (Dr. GRPO, arXiv 2503.20783). Equal rewards have advantages of 0.
    """
    mean = sum(rewards) / len(rewards)
    std = (sum((r - mean) ** 2 for r in rewards) / len(rewards)) ** 0.5
    return [(r - mean) / (std if normalise_std and std > 0 else 1.0) for r in rewards]


def policy_gradient(inputs: PolicyInputs, clip_low: float, clip_high: float) -> Float[Tensor, " N"]:
    """Return the clipped surrogate loss [N] of GRPO (arXiv 2402.03300, eq. 3) without its KL to a reference model.

    Separate lower and upper clips follow DAPO (arXiv 2503.14476), and so does the mean over the tokens of a batch
    instead of a rollout, which the caller computes.
    """
    import torch

    ratio = (-nll(inputs.states, inputs.head, inputs.token_ids) - inputs.old_logprobs).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(ratio * inputs.advantages, clipped * inputs.advantages)
