"""Registered losses in nats: divergences between target and student, the policy gradient of GRPO, and the NLL.

    forward KL  sum p log(p / q)
    reverse KL  sum q log(q / p)
    JSD_b       b KL(p || m) + (1 - b) KL(q || m),  m = b p + (1 - b) q    (generalised JSD of GKD, arXiv 2306.13649)
    GRPO        -min(r A, clip(r, 1 - low, 1 + high) A),  r = pi / pi_old  (arXiv 2402.03300, eq. 3)
    RFT, SFT    -log q(token)

with target p and student q over the same bins: the whole vocabulary, or the top-K tokens of the target and one bin
for all other tokens (the tail), so that the mass outside the support is compared too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from ogls.config import TrainConfig
from ogls.models.head import binned_logprobs, head_logits, nll
from ogls.training.contract import Loss, LossInputs, LossOutput, register

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


_MIN_TAIL = 1e-30  # keeps log(tail mass) finite if the fp32 tail of a target underflows

# A divergence by its terms: pairs (w, t [N, B]) with D = sum over the pairs of w times the sum of t over the bins. A
# generator of them has one [N, B] at a time in memory.
Terms = Iterable[tuple[float, "Float[Tensor, 'N B']"]]
TermsFunction = Callable[["Float[Tensor, 'N B']", "Float[Tensor, 'N B']", TrainConfig], Terms]

DIVERGENCES: dict[str, TermsFunction] = {}


def divergence_by_terms(name: str) -> Callable[[TermsFunction], TermsFunction]:
    """Return a decorator that registers the terms of (target, student, settings) as the divergence `name`.

    Target and student are log-probs [N, B] over the same bins. train.pointwise_clip clips the terms of each bin before
    the sum, as OPSD does (arXiv 2601.18734); clipped terms have no gradient, which can reverse the gradient of the sum,
    so use it for reproduction only. The metric `agreement` is the share of tokens with the same most probable bin,
    `clipped_terms` the share of clipped terms.
    """

    def add(terms: TermsFunction) -> TermsFunction:
        def loss(inputs: LossInputs) -> LossOutput:
            target, student = target_and_student(inputs)
            parts, clip = terms(target, student, inputs.settings), inputs.settings.pointwise_clip
            metrics = {"agreement": (target.argmax(-1) == student.argmax(-1)).float()}
            if not clip:
                return LossOutput(_sum_terms(parts), metrics)
            first, *others = (weight * values for weight, values in parts)
            by_bin = sum(others, first)
            metrics["clipped_terms"] = (by_bin.detach() > clip).float().mean(-1)
            return LossOutput(by_bin.clamp(max=clip).sum(-1), metrics)

        DIVERGENCES[name] = terms
        register(name, "targets", by_terms=True)(loss)
        return terms

    return add


@divergence_by_terms("forward_kl")
def forward_kl_terms(target: Float[Tensor, "N B"], student: Float[Tensor, "N B"], settings: TrainConfig) -> Terms:
    """Return the terms of KL(target || student)."""
    return [(1.0, _kl_terms(target, student))]


@divergence_by_terms("reverse_kl")
def reverse_kl_terms(target: Float[Tensor, "N B"], student: Float[Tensor, "N B"], settings: TrainConfig) -> Terms:
    """Return the terms of KL(student || target)."""
    return [(1.0, _kl_terms(student, target))]


@divergence_by_terms("jsd")
def jsd_terms(
    target: Float[Tensor, "N B"], student: Float[Tensor, "N B"], settings: TrainConfig
) -> Iterator[tuple[float, Float[Tensor, "N B"]]]:
    """Yield the terms of the generalised JSD (arXiv 2306.13649); `jsd_beta` is the weight of the target."""
    import torch

    weight = settings.jsd_beta
    beta = torch.tensor(weight, device=target.device)
    mixture = torch.logaddexp(target + beta.log(), student + (1 - beta).log())
    yield weight, _kl_terms(target, mixture)
    yield 1 - weight, _kl_terms(student, mixture)


def _kl_terms(p: Tensor, q: Tensor) -> Tensor:
    """Return the terms p log(p / q) [N, B] of KL(p || q) from log-probs."""
    return p.exp() * (p - q)


def _sum_terms(terms: Terms) -> Tensor:
    """Return the divergence [N] in nats of its terms."""
    first, *others = (weight * values.sum(-1) for weight, values in terms)
    return sum(others, first)


def divergence(
    kind: str, target: Float[Tensor, "N B"], student: Float[Tensor, "N B"], jsd_beta: float = 0.5
) -> Float[Tensor, " N"]:
    """Return D(target, student) [N] in nats from log-probs over the same B bins.

    `kind` is forward_kl, reverse_kl or jsd; `jsd_beta` is the weight of the target in the mixture. Raises ValueError if
    `kind` is unknown.
    """
    if kind not in DIVERGENCES:
        *names, last = DIVERGENCES
        raise ValueError(f"unknown divergence {kind}: use {', '.join(names)} or {last}")
    return _sum_terms(DIVERGENCES[kind](target, student, TrainConfig(jsd_beta=jsd_beta)))


def target_and_student(inputs: LossInputs) -> tuple[Float[Tensor, "N B"], Float[Tensor, "N B"]]:
    """Return the log-probs (nats, fp32) of target and student over the same bins; the gradient flows to the student.

    The bins are the support and one bin for the tail; without `train.tail_bucket` both distributions are renormalised
    on the support. A target over the whole vocabulary has one bin for each token. Raises ValueError without a target.
    """
    if inputs.target_logprobs is None:
        raise ValueError("the inputs have no target: only train.objective = distil has targets")
    if inputs.target_ids is None:
        target = inputs.target_logprobs.log_softmax(-1)
        return target, head_logits(inputs.states, inputs.head).log_softmax(-1)
    student = binned_logprobs(inputs.states, inputs.head, inputs.target_ids)
    if not inputs.settings.tail_bucket:
        student = student[:, : inputs.target_ids.shape[-1]].log_softmax(-1)
    return target_bins(inputs.target_logprobs, inputs.target_tail, student.shape[-1]), student


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


@register("grpo", "advantages")
def policy_gradient(inputs: LossInputs) -> LossOutput:
    """Return the clipped surrogate loss [N] of GRPO (arXiv 2402.03300, eq. 3) without its KL to a reference model.

    Separate lower and upper clips follow DAPO (arXiv 2503.14476), and so does the mean over the tokens of a batch
    instead of a rollout, which the caller computes. Metrics: `ratio`, and `clipped`, the share of tokens whose gradient
    the clip removes. Raises ValueError without log-probs and advantages.
    """
    import torch

    old, advantages, clip = inputs.old_logprobs, inputs.advantages, inputs.settings.grpo
    if old is None or advantages is None:
        raise ValueError("the inputs have no advantages: only train.objective = grpo has them")
    ratio = (-nll(inputs.states, inputs.head, inputs.token_ids) - old).exp()
    clipped = ratio.clamp(1 - clip.clip_low, 1 + clip.clip_high)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    is_clipped = ratio.detach() * advantages > clipped.detach() * advantages
    return LossOutput(loss, {"ratio": ratio.detach(), "clipped": is_clipped.float()})


@register("rft", "correct")
@register("sft", "references")
def likelihood(inputs: LossInputs) -> LossOutput:
    """Return the NLL [N] of the tokens in nats."""
    return LossOutput(nll(inputs.states, inputs.head, inputs.token_ids))


TAIL_NLL = Loss("tail NLL", "correct", likelihood)  # of the last tokens of correct rollouts, next to a token loss
