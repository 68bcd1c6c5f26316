"""Settings of a training round."""

from __future__ import annotations

from typing import Literal

from ogls.config.section import FUNCTION, Section, setting


class GrpoConfig(Section):
    """GRPO's clipped surrogate loss (arXiv 2402.03300), used if train.objective = grpo."""

    clip_low: float = setting(
        0.2, "Lower clipping range: the importance ratio is clipped to at least 1 - clip_low.", gt=0, le=1
    )
    clip_high: float = setting(
        0.2, "Upper clipping range: the importance ratio is clipped to at most 1 + clip_high.", gt=0
    )
    normalise_std: bool = setting(
        True, "Divide advantages by the group's standard deviation; false gives Dr. GRPO (arXiv 2503.20783)."
    )


class TrainConfig(Section):
    """Training of the policy in a round: objective, loss, batches and optimizer."""

    objective: Literal["distil", "grpo", "rft", "sft"] = setting(
        "distil",
        "Training objective. distil: match the teacher's targets. Without a teacher: grpo (clipped policy gradient), "
        "rft (rejection fine-tuning: NLL of correct rollouts), sft (NLL of the reference solutions of the round's "
        "problems).",
    )
    grpo: GrpoConfig = setting(GrpoConfig(), "GRPO's clipped surrogate loss.")
    rollouts: Literal["incorrect", "correct", "mixed_groups", "all"] = setting(
        "mixed_groups",
        "Rollouts to distil. incorrect: failed rollouts. correct: correct rollouts. mixed_groups: all rollouts of "
        "groups with both outcomes. all: all rollouts.",
    )
    tokens: int = setting(
        1024,
        "Token cap T: only the first T tokens of a rollout are distilled. grpo, rft and sft train all tokens.",
        ge=1,
    )
    until: Literal["end", "first_mistake"] = setting(
        "end",
        "Last token of a rollout to distil. end: the token cap. first_mistake: the first token whose log-prob the "
        "target lowers by at least mistake_nats against the base pool. What follows a mistake is text that the policy "
        "should not write at all.",
        later=True,
    )
    mistake_nats: float = setting(
        1.0, "first_mistake: how much the target lowers the log-prob of a mistake, in nats.", gt=0, later=True
    )
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = setting(
        "reverse_kl",
        "Divergence per token. forward_kl: KL(target || student). reverse_kl: KL(student || target). jsd: generalised "
        "Jensen-Shannon divergence (see jsd_beta).",
    )
    loss: str = setting(
        "",
        "Custom loss `module:function` in place of the divergence (distil) or of the objective's own loss. Its "
        "signature is (LossInputs) -> LossOutput; the objective decides what is trained on and what the inputs have. "
        "The module may be in the working directory. Empty: the divergence, or the objective's own loss.",
        later=True,
        pattern=FUNCTION,
    )
    jsd_beta: float = setting(
        0.5, "jsd: weight of the target in the mixture; the student's is 1 - jsd_beta.", gt=0, lt=1
    )
    support: Literal["top_k", "full"] = setting(
        "top_k",
        "Tokens that the divergence compares. top_k: the target's stored top-K and its tail. full: the whole "
        "vocabulary, recomputed from the cached teacher states; exact, but needs more memory.",
    )
    tail_bucket: bool = setting(
        True,
        "top_k: compare the probability mass outside the support as one extra bucket. false: renormalise both "
        "distributions on the support.",
    )
    token_weights: Literal["uniform", "kl", "direction", "entropy_gap"] = setting(
        "uniform",
        "Weights of distilled tokens in the loss, normalised within each optimizer step. uniform: equal weights. kl: "
        "KL(target || base pool). direction: norm of the direction. entropy_gap: |entropy of the target - entropy of "
        "the base pool|, after arXiv 2603.13260 and 2603.07079, which look at where teacher and student differ in "
        "entropy; that the weight is proportional to the gap is this project's choice.",
    )
    group_weights: Literal["uniform", "frontier"] = setting(
        "uniform",
        "Weights of groups. frontier: 4 p (1 - p) with p the share of correct rollouts of the group (SSOPD, arXiv "
        "2605.17497, weighs a group by its rate of success; the parabola is this project's choice), so groups with "
        "one outcome weigh nothing. uniform: equal weights.",
        later=True,
    )
    token_clip: float = setting(
        0.0,
        "distil: clip the loss of each token at this value, in nats, after summing over the vocabulary; 0 disables it.",
        ge=0,
    )
    pointwise_clip: float = setting(
        0.0,
        "distil: clip each vocabulary term of the divergence at this value (OPSD's tau = 0.05); 0 disables it. "
        "Use it only to reproduce OPSD: clipped terms have no gradient, which can reverse the gradient of the "
        "token, and training ends in loops of repeated text.",
        ge=0,
    )
    tail_rollouts: Literal["correct", "short_correct"] = setting(
        "correct",
        "Rollouts with a tail NLL. correct: all correct ones. short_correct: those that are no longer than the median "
        "of the correct rollouts of their group.",
        later=True,
    )
    tail_weight: float = setting(
        0.0, "mu: weight of the tail NLL, the loss on the last tokens of correct rollouts; 0 disables it.", ge=0
    )
    tail_tokens: int = setting(
        32, "Number of last tokens of a correct rollout, including the stop token, in the tail NLL.", ge=1
    )
    epochs: int = setting(1, "Passes over the round's rollouts.", ge=1)
    batch_rollouts: int = setting(64, "Rollouts per optimizer step.", ge=1)
    micro_batch_tokens: int = setting(
        16384,
        "Maximum number of tokens, padding included, in one forward and backward pass. Lower it to save memory.",
        ge=1,
        numerics=True,
    )
    head_tokens: int = setting(
        512,
        "Maximum number of tokens whose full-vocabulary logits are in memory at once, in the forward and the backward "
        "pass. Lower it to save memory.",
        ge=1,
        numerics=True,
    )
    gradient_checkpointing: bool = setting(
        False,
        "Recompute the activations of a layer in the backward pass instead of storing them. Saves memory, costs time.",
        numerics=True,
    )
    parallel: Literal["none", "ddp", "fsdp"] = setting(
        "none",
        "Training on several devices of this machine. none: one process. ddp: every process has the whole model and a "
        "share of the rollouts of each optimizer step. fsdp: the weights of the model, their gradients and the "
        "optimizer state are split over the processes too (FSDP2), for full fine-tuning and for models that do not fit "
        "beside their activations; slower than ddp.",
        numerics=True,
    )
    processes: int = setting(
        0,
        "ddp and fsdp: number of processes, each with a CUDA device of its own, or without CUDA on the CPU. 0: one for "
        "each CUDA device. More processes shorten the stage; they need at least one rollout each in every step.",
        ge=0,
        numerics=True,
    )
    checkpoint_steps: int = setting(
        0,
        "Save the weights and the optimizer state every N optimizer steps within a round, so that an interrupted stage "
        "goes on from there. The file is removed when the stage is done; it takes three times the space of the trained "
        "weights. 0: an interrupted stage begins again.",
        ge=0,
        operational=True,
    )
    learning_rate: float = setting(1e-4, "AdamW learning rate, constant after warm-up.", gt=0)
    warmup_steps: int = setting(
        0, "Number of optimizer steps of linear learning-rate warm-up at the start of the run.", ge=0
    )
    weight_decay: float = setting(0.0, "AdamW weight decay.", ge=0)
    max_grad_norm: float = setting(
        1.0, "Maximum L2 norm of the gradient; larger gradients are scaled down to it.", gt=0
    )
