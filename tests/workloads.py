"""The teacher pass and the training step that benchmarks time: random tokens, their operations, and planned memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

SUPPORT = 64  # tokens in the support of a target


@dataclass(frozen=True)
class Workload:
    """A call to measure, and what it needs in theory."""

    call: Callable[[], Any]
    flop: float  # floating point operations; those that gradient checkpointing repeats are not counted
    tokens: int  # tokens that run through the model
    passes: int  # times that all weights are read
    planned: float  # peak memory beyond what exists before the call, in bytes, by `ogls plan`


def teacher_pass(policy: Any, config: Any, shape: Any, group: int, tokens: int, prefix: int) -> Workload:
    """Scoring `group` rollouts of `tokens` tokens with each other as exemplars, in contexts of `prefix` tokens.

    A pass has at most teacher.batch_tokens tokens.
    """
    from ogls.distillation.exemplars import Context, ScoredRollout
    from ogls.distillation.teacher import score_rollouts
    from ogls.planning.memory import teaching_bytes

    contexts = [Context("frozen", random_tokens(prefix, shape)) for _ in range(group)]
    rollouts = [random_tokens(tokens, shape) for _ in range(group)]
    scored = [
        ScoredRollout(
            ("p", j), "correct", rollouts[j], tuple((c, 1 / (group - 1)) for c in contexts if c is not contexts[j]), ()
        )
        for j in range(group)
    ]
    pairs, batch = group * (group - 1), config.teacher.batch_tokens
    positions = group * prefix + pairs * (tokens - 1)
    keys = group * prefix * prefix / 2 + pairs * (tokens - 1) * (prefix + tokens / 2)
    flop = 2 * shape.body * positions + 4 * shape.layers * shape.heads * shape.head_dim * keys
    prefills = -(-group // max(1, batch // prefix))
    passes = prefills + -(-pairs // max(1, batch // (prefix + tokens)))
    planned = teaching_bytes(config, shape)
    return Workload(lambda: score_rollouts(policy, scored, batch), flop, positions, passes, planned)


def training_step(policy: Any, config: Any, shape: Any, rollouts: int, prompt: int, tokens: int) -> Workload:
    """One optimizer step on rollouts of `tokens` tokens after prompts of `prompt`, with the settings of config.train.

    Frozen weights cost 2 P operations forward and 2 P backward, LoRA weights 2 P forward and 4 P backward.
    """
    from ogls.planning.memory import training_bytes
    from ogls.training.trainer import Trainer

    items = training_items(config, shape, rollouts, prompt, tokens)
    trainer = Trainer(policy, config.train)
    length = tokens + prompt
    positions = rollouts * length
    flop = 4 * shape.body * positions + 6 * shape.trained * positions
    flop += 3 * attention_flop(shape, length) * rollouts + 4 * shape.vocabulary * shape.hidden * rollouts * tokens
    # The adapter and the state of AdamW exist before the measured step.
    planned = training_bytes(config, shape) - 12 * shape.trained
    passes = 2 * -(-positions // max(length, config.train.micro_batch_tokens))
    return Workload(lambda: trainer.optimizer_step(items), flop, positions, passes, planned)


def training_items(config: Any, shape: Any, rollouts: int, prompt: int, tokens: int) -> list[Any]:
    """Rollouts with random targets, all on the CPU as stages have them: on 64 tokens, or with train.support = full on
    the whole vocabulary."""
    from ogls.training.batching import TrainItem

    # 64 different tokens for each position: equally spaced from a random start.
    spacing = torch.arange(SUPPORT) * (shape.vocabulary // SUPPORT)
    items = []
    for i in range(rollouts):
        if config.train.support == "full":
            target: dict[str, Any] = {"state": torch.randn(tokens, shape.hidden)}
        else:
            ids = (torch.randint(shape.vocabulary, (tokens, 1)) + spacing) % shape.vocabulary
            target = {"ids": ids, "logprobs": torch.randn(tokens, SUPPORT).log_softmax(-1)}
            target["tail_mass"] = torch.full((tokens,), 1e-3)
        items.append(TrainItem(("p", i), random_tokens(prompt, shape), random_tokens(tokens, shape), tokens, **target))
    return items


def attention_flop(shape: Any, length: int) -> float:
    """Operations of causal attention over one sequence, forward."""
    return 4 * shape.layers * shape.heads * shape.head_dim * length * length / 2


def random_tokens(count: int, shape: Any) -> tuple[int, ...]:
    """Random token ids without the three special tokens of the tokenizer."""
    return tuple(torch.randint(3, shape.vocabulary, (count,)).tolist())
