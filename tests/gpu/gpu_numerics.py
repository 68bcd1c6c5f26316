"""What a GPU computes compared with fp32 on the CPU: states, targets, loss and gradient, sampled log-probs.

Two models: the seed model of the tiny world, which is trained, and a random one with the head dimension and a wide
vocabulary, as of larger models. The limits leave room for another order of sums, and for bfloat16 for its rounding of
states and activations (2^-9); a wrong mask, position or weight exceeds them many times over.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_bench import TINY_SHAPE, Bench, Results, free_memory
from randommodel import TINY_MODEL, random_model

from ogls.training.ranks import Ranks

RANDOM_SHAPE = {**TINY_SHAPE, "hidden_size": 256, "head_dim": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
PROMPTS, TOKENS = (9, 14, 14, 31), 24  # lengths of the prompts; tokens of a rollout, at most
STEPS: dict[str, dict[str, Any]] = {
    "top-K support": {},
    "checkpointing": {"gradient_checkpointing": True},
    "full vocabulary": {"support": "full"},
}
Rollouts = list[tuple[tuple[int, ...], tuple[int, ...]]]  # (prompt, tokens)


@dataclass(frozen=True)
class Limits:
    """The largest accepted error of each number; relative unless a unit is given."""

    states: float  # of the norm
    kl: float  # KL(target on the CPU || target), nats, the largest of all tokens
    loss: float
    gradient: float  # of the norm
    logprobs: float  # of a sampled token, nats, mean
    sampled: float  # share of the completions that have another token; bfloat16 samples others


LIMITS = {
    "float32": Limits(states=1e-4, kl=1e-5, loss=1e-4, gradient=1e-3, logprobs=1e-4, sampled=0.25),
    "bfloat16": Limits(states=4e-2, kl=6e-2, loss=3e-2, gradient=8e-2, logprobs=5e-2, sampled=1.0),
}


@dataclass(frozen=True)
class Computed:
    """What one device computes of the same inputs, on the CPU."""

    states: Any  # [pools * T, D]
    target: Any  # log-probs [T, V]
    steps: dict[str, tuple[float, Any]]  # loss and gradient by the name of the step
    completions: list[Any]
    averaged: str  # hash of the average of the initial and the current adapter


class RecordingRanks(Ranks):
    """One process that keeps the gradient of a step, before it is clipped."""

    gradient: Any = None

    def sum_gradients(self, parameters: list[Any]) -> None:
        """Keep the gradients of all weights as one vector."""
        self.gradient = torch.cat([p.grad.detach().flatten().cpu() for p in parameters])


def check_numerics(bench: Bench, results: Results) -> None:
    """Compare the device with fp32 on the CPU, in fp32 and bfloat16."""
    models = {"seed model": TINY_MODEL, "random model": random_model(bench.folder / "numerics", **RANDOM_SHAPE)}
    for model, path in models.items():
        reference = make_policy(path, "float32", "cpu")
        rollouts = random_rollouts(len(reference.head))
        expected = compute(reference, rollouts)
        for dtype, limits in LIMITS.items():
            actual = compute(make_policy(path, dtype, bench.device), rollouts)
            free_memory()
            for name, value, limit in compare(expected, actual, limits):
                results.check("numerics", f"{model}, {dtype}: {name}", value, limit)
            errors = logprob_errors(reference, rollouts, actual.completions)
            name, note = f"{model}, {dtype}: log-probs of sampled tokens, nats", f"largest {max(errors):.2g}"
            results.check("numerics", name, sum(errors) / len(errors), limits.logprobs, note)
            if dtype == "float32":
                same = expected.averaged == actual.averaged
                results.require("numerics", f"{model}, {dtype}: the same initial adapter, averaged with another", same)


def make_policy(path: Path, dtype: str, device: str) -> Any:
    """A policy with an adapter that changes its output."""
    from ogls.config import AdapterConfig, ModelConfig
    from ogls.models.adapter import Adapter
    from ogls.models.policy import Policy

    policy = Policy(ModelConfig(path=str(path), dtype=dtype, device=device), AdapterConfig(rank=8, alpha=16), seed=1)
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: weight + 0.02 * torch.randn(weight.shape, generator=generator)
        for name, weight in sorted(policy.initial_adapter().weights.items())
    }
    policy.use_adapter(Adapter.from_weights(weights))
    return policy


def random_rollouts(vocabulary: int) -> Rollouts:
    """Prompts and rollouts of different lengths."""
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randint(3, vocabulary, (p + TOKENS - p % 5,), generator=generator).tolist() for p in PROMPTS]
    return [(tuple(ids[:p]), tuple(ids[p:])) for p, ids in zip(PROMPTS, draw, strict=True)]


def compute(policy: Any, rollouts: Rollouts) -> Computed:
    """All that is compared, by one policy."""
    from ogls.config import Recipe, SamplingConfig
    from ogls.distillation.steering import steer_tokens
    from ogls.records import Request
    from ogls.samplers.transformers import TransformersSampler

    states, head = teacher_states(policy, rollouts), policy.head
    ids = torch.tensor([i for _, tokens in rollouts for i in tokens], device=head.device)
    recipe = Recipe(base=1.0, correct=0.5, incorrect=-0.5)
    target = steer_tokens({p: s.to(head.device) for p, s in states.items()}, ids, recipe, head, len(head), 32)
    logprobs = torch.empty_like(target.target_logprobs).scatter(-1, target.ids, target.target_logprobs)
    steps = {name: train_step(policy, rollouts, settings) for name, settings in STEPS.items()}
    requests = [Request("p", j, prompt, j) for j, (prompt, _) in enumerate(rollouts)]
    completions = TransformersSampler(policy).sample(requests, SamplingConfig(max_tokens=TOKENS))
    averaged = policy.initial_adapter().average(policy.copy_adapter(), 0.9).hash
    return Computed(torch.cat(list(states.values())), logprobs.cpu(), steps, completions, averaged)


def teacher_states(policy: Any, rollouts: Rollouts) -> dict[str, Any]:
    """The averaged states [T, D] of all rollouts by pool: the prompt, and two pools of other rollouts."""
    from ogls.distillation.exemplars import Context, ScoredRollout
    from ogls.distillation.teacher import score_rollouts

    scored = []
    for j, (prompt, tokens) in enumerate(rollouts):
        others = [Context("live", (*p, *t)) for i, (p, t) in enumerate(rollouts) if i != j]
        pools = {"base": [Context("live", prompt)], "correct": others[:2], "incorrect": others[2:]}
        for pool, contexts in pools.items():
            shares = tuple((context, 1 / len(contexts)) for context in contexts)
            scored.append(ScoredRollout(("p", j), pool, tokens, shares, ()))
    states = score_rollouts(policy, scored, 256)
    return {pool: torch.cat([states[("p", j), pool] for j in range(len(rollouts))]) for pool in pools}


def train_step(policy: Any, rollouts: Rollouts, settings: dict[str, Any]) -> tuple[float, Any]:
    """The loss and the gradient of an optimizer step in two micro-batches; the weights are as before afterwards."""
    from ogls.config import TrainConfig
    from ogls.training.batching import TrainItem
    from ogls.training.trainer import Trainer

    generator, (size, width) = torch.Generator().manual_seed(1), policy.head.shape
    items = []
    for j, (prompt, tokens) in enumerate(rollouts):
        count = len(tokens)
        ids = torch.stack([torch.randperm(size, generator=generator)[:16] for _ in tokens])
        logprobs = torch.randn(count, 16, generator=generator).log_softmax(-1)
        state = torch.randn(count, width, generator=generator)
        top_k = {"ids": ids, "logprobs": logprobs, "tail_mass": torch.full((count,), 0.1)}
        target = {"state": state} if "support" in settings else top_k
        items.append(TrainItem(("p", j), prompt, tokens, count, 4, **target))
    config = TrainConfig(micro_batch_tokens=96, head_tokens=32, tail_weight=0.1, learning_rate=1e-6, **settings)
    before, ranks = policy.copy_adapter(), RecordingRanks()
    row = Trainer(policy, config, ranks=ranks).optimizer_step(items)
    policy.use_adapter(before)
    return row["loss"], ranks.gradient


def compare(expected: Computed, actual: Computed, limits: Limits) -> Iterator[tuple[str, float, float]]:
    """(what is compared, its error, the limit)."""
    yield "teacher states", relative_error(expected.states, actual.states), limits.states
    kl = (expected.target.exp() * (expected.target - actual.target)).sum(-1)
    yield "target, largest KL in nats", kl.abs().max().item(), limits.kl
    for name, (loss, gradient) in expected.steps.items():
        actual_loss, actual_gradient = actual.steps[name]
        yield f"loss, {name}", abs(actual_loss / loss - 1), limits.loss
        yield f"gradient, {name}", relative_error(gradient, actual_gradient), limits.gradient
    pairs = list(zip(expected.completions, actual.completions, strict=True))
    yield (
        "completions with other tokens",
        sum(e.token_ids != a.token_ids for e, a in pairs) / len(pairs),
        limits.sampled,
    )


def logprob_errors(reference: Any, rollouts: Rollouts, completions: list[Any]) -> list[float]:
    """The errors of recorded log-probs, nats: what the reference gives the same tokens is exact."""
    from ogls.models.continuation import run_continuations
    from ogls.models.head import nll

    errors: list[float] = []
    pairs = [(j, completion.token_ids) for j, completion in enumerate(completions)]
    with torch.inference_mode():
        all_states = run_continuations(reference, [prompt for prompt, _ in rollouts], pairs, 4096)
        for completion, states in zip(completions, all_states, strict=True):
            exact = -nll(states, reference.head, torch.tensor(completion.token_ids))
            errors += (exact - torch.tensor(completion.logprobs)).abs().tolist()
    return errors


def relative_error(expected: Any, actual: Any) -> float:
    """The norm of the difference, relative to that of the expected tensor."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())
