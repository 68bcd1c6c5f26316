"""One training round."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from ogls.config.section import Section, setting


class GrpoConfig(Section):
    """GRPO's surrogate (arXiv 2402.03300), used with train.objective = grpo."""

    clip_low: float = setting(0.2, "The importance ratio is clipped at 1 - clip_low.", gt=0, le=1)
    clip_high: float = setting(0.2, "The importance ratio is clipped at 1 + clip_high.", gt=0)
    normalise_std: bool = setting(
        True, "Divide advantages by the group's standard deviation; false is Dr. GRPO (arXiv 2503.20783)."
    )


class TrainConfig(Section):
    """One training round."""

    objective: Literal["distil", "grpo", "rft", "sft"] = setting(
        "distil",
        "distil: the teacher's targets. Without a teacher: grpo (clipped policy gradient), rft (rejection "
        "fine-tuning: NLL of correct rollouts), sft (NLL of the reference solutions of the round's problems).",
    )
    grpo: GrpoConfig = setting(GrpoConfig(), "GRPO's surrogate.")
    rollouts: Literal["incorrect", "correct", "mixed_groups", "all"] = setting(
        "mixed_groups", "Distil failed rollouts, correct ones, all rollouts of mixed groups, or all rollouts."
    )
    tokens: int = setting(1024, "Token cap T: only the first so many tokens of a rollout are distilled.", ge=1)
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = setting("reverse_kl", "D(target, student).")
    jsd_beta: float = setting(0.5, "jsd: weight of the target in the mixture.", gt=0, lt=1)
    support: Literal["top_k", "full"] = setting(
        "top_k", "Compare on the stored top-K and tail, or on the full vocabulary from the cached states."
    )
    tail_bucket: bool = setting(
        True, "top_k: compare the mass outside the support too, in one bucket; false renormalises on the support."
    )
    token_weights: Literal["uniform", "kl", "direction"] = setting(
        "uniform", "Weigh distilled tokens by their KL(target || base) or direction norm, over its mean in the step."
    )
    token_clip: float = setting(0.0, "A token's divergence is clipped at this, after its sum; 0 for not.", ge=0)
    pointwise_clip: float = setting(
        0.0,
        "forward_kl: clip every term of the sum at this (OPSD's tau = 0.05); 0 for not. For reproduction only: it "
        "reverses the gradient of clipped terms and ends in loops.",
        ge=0,
    )
    tail_weight: float = setting(0.0, "mu: weight of the NLL on the tail of correct rollouts.", ge=0)
    tail_tokens: int = setting(32, "Last tokens of a correct rollout, stop token included, in the tail NLL.", ge=1)
    epochs: int = setting(1, "Passes over the round's rollouts.", ge=1)
    batch_rollouts: int = setting(64, "Rollouts an optimizer step.", ge=1)
    micro_batch_tokens: int = setting(16384, "Most tokens (padding included) in one forward pass.", ge=1)
    head_tokens: int = setting(
        512, "Tokens whose full-vocabulary logits are alive at once, forward and backward.", ge=1, operational=True
    )
    gradient_checkpointing: bool = setting(
        False, "Keep no activations within a layer, and run it again in the backward pass.", operational=True
    )
    learning_rate: float = setting(1e-4, "AdamW learning rate, constant after warm-up.", gt=0)
    warmup_steps: int = setting(0, "Optimizer steps over which the rate rises linearly, once a run.", ge=0)
    weight_decay: float = setting(0.0, "AdamW weight decay.", ge=0)
    max_grad_norm: float = setting(1.0, "Gradients are scaled down to this norm.", gt=0)

    @model_validator(mode="after")
    def _pointwise_clip_is_of_forward_kl(self) -> TrainConfig:
        if self.pointwise_clip and self.divergence != "forward_kl":
            raise ValueError("train.pointwise_clip goes with train.divergence = 'forward_kl' only")
        return self
