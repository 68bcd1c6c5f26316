"""Speed and peak memory at the shape of Qwen3-1.7B: teacher pass, training step, steering, sampling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gpu_bench import GIB, Bench, Results
from workloads import random_tokens, teacher_pass, training_step

PEAKED = 4.0  # standard deviation of the logits that are steered; a random model's is 0.9, a trained model's about this


def measure_teacher(bench: Bench, results: Results) -> None:
    """The teacher pass over a group, in the passes that teacher.batch_tokens allows."""
    config = bench.config(teacher={"batch_tokens": bench.sizes.teacher_batch})
    for group, tokens, prefix in bench.sizes.teacher:
        work = teacher_pass(bench.policy, config, bench.shape, group, tokens, prefix)
        case = f"{group} rollouts of {tokens:,}, contexts of {prefix:,}"
        known = {"tokens": work.tokens, "planned_gib": work.planned / GIB}
        results.time("teacher pass", case, work.call, bench.sizes.repeats, work.flop, **known)


def measure_training(bench: Bench, results: Results) -> None:
    """Training steps with LoRA on a bfloat16 base."""
    for step in bench.sizes.steps:
        bench.policy.use_adapter(None)
        config = bench.config(train=step.settings)
        work = training_step(bench.policy, config, bench.shape, step.rollouts, bench.sizes.prompt, step.tokens)
        known = {"tokens": work.tokens, "planned_gib": work.planned / GIB}
        results.time("training step", step.name, work.call, bench.sizes.repeats, work.flop, **known)
        for parameter in bench.policy.parameters.values():
            parameter.grad = None  # of a step that did not fit
    bench.policy.use_adapter(None)


def measure_steering(bench: Bench, results: Results) -> None:
    """Steering as it is (fp32 states in bfloat16 terms), in fp32, and with TF32: seconds, and the error of the targets.

    The states are random: three pools that differ by a third of their norm, scaled so that the logits have the standard
    deviation `PEAKED`. With bfloat16 the states are rounded, and the head is stored so already.
    """
    from ogls.distillation.steering import combine_states, steer_tokens
    from ogls.models.head import head_logits

    config, head16, shape = bench.config(), bench.policy.head, bench.shape
    head, recipe, count = head16.float(), config.steer.to_recipe(), bench.sizes.steered
    states = _random_states(head, count)
    ids = torch.randint(shape.vocabulary, (count,), device=head.device)
    limits = config.steer.support, config.steer.batch_tokens
    known = {"tokens": count, "planned_gib": _planned(bench, config, "steer") - head16.nbytes / GIB}
    combined = combine_states(states, recipe)[: config.steer.batch_tokens]
    exact = _with_tf32(False, lambda: (combined @ head.T).log_softmax(-1))

    def steer(matrix: Any = head) -> Any:
        return steer_tokens(states, ids, recipe, matrix, *limits)

    results.time("steering", "bfloat16 terms", lambda: steer(head16), bench.sizes.repeats, **known)
    results.time("steering", "fp32", lambda: _with_tf32(False, steer), bench.sizes.repeats, **known)
    results.time("steering", "TF32 products", lambda: _with_tf32(True, steer), bench.sizes.repeats, **known)
    products: dict[str, Callable[[], Any]] = {
        "fp32": lambda: _with_tf32(False, lambda: combined @ head.T),
        "TF32": lambda: _with_tf32(True, lambda: combined @ head.T),
        "bfloat16 terms": lambda: head_logits(combined, head16),
        "bfloat16": lambda: head_logits(combined.to(torch.bfloat16), head16),
    }
    for name, product in products.items():
        actual = product().log_softmax(-1)
        kl = (exact.exp() * (exact - actual)).sum(-1).clamp(min=0)
        errors = {"kl_mean": kl.mean().item(), "kl_max": kl.max().item(), "tokens": len(combined)}
        del actual, kl
        flop, is_16_bit = 2.0 * head.numel() * len(combined), name != "fp32" and name != "TF32"
        case = f"one of three products, {name}"
        results.time("steering", case, product, bench.sizes.repeats, flop, is_16_bit, **errors)


def _random_states(head: Any, count: int) -> dict[str, Any]:
    """States [count, D] of three pools, for logits of standard deviation PEAKED."""
    generator = torch.Generator().manual_seed(0)
    base, correct, incorrect = (
        torch.randn(count, head.shape[1], generator=generator).to(head.device) for _ in range(3)
    )
    scale = PEAKED / (base[:64] @ head.T).std()
    return {"base": base * scale, "correct": (base + correct / 3) * scale, "incorrect": (base + incorrect / 3) * scale}


def _with_tf32(allowed: bool, call: Callable[[], Any]) -> Any:
    """The result of a call with TF32 products, where the device has them, or with fp32 products."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        return call()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def measure_sampling(bench: Bench, results: Results) -> None:
    """Sampling with transformers, the adapter not merged."""
    from ogls.records import Request
    from ogls.samplers.transformers import TransformersSampler

    sizes = bench.sizes
    for size in sizes.sampled:
        rollout = {"batch_size": size, "max_tokens": sizes.new_tokens, "engine": "transformers"}
        config = bench.config(rollout=rollout)
        prompts = [random_tokens(sizes.prompt, bench.shape) for _ in range(size)]
        requests = [Request("p", i, prompt, i) for i, prompt in enumerate(prompts)]
        sampler = TransformersSampler(bench.policy)
        completions = sampler.sample(requests, config.rollout)
        tokens = sum(len(c.token_ids) for c in completions)
        weights = bench.shape.parameters * 2 / GIB
        planned = _planned(bench, config, "sample") - weights
        case = f"{size} completions of {sizes.new_tokens}, prompts of {sizes.prompt}"
        known = {"tokens": tokens, "planned_gib": planned}

        # Hundreds of decoding steps: the call before has warmed up, and one is enough.
        def call(sampler: Any = sampler, requests: Any = requests, config: Any = config) -> Any:
            return sampler.sample(requests, config.rollout)

        results.time("sampling", case, call, 1, warm=True, **known)


def _planned(bench: Bench, config: Any, stage: str) -> float:
    """The peak memory of a stage in GiB, by `ogls plan`."""
    from ogls.planning.gpus import GPUS
    from ogls.planning.plan import estimate

    gpu = GPUS["h100" if bench.is_cuda else "cpu"]  # the memory is the same on every GPU
    plan = estimate(config, gpu, rollout_tokens=bench.sizes.new_tokens, prompt_tokens=bench.sizes.prompt)
    return next(s.memory for s in plan.stages if s.stage == stage) / GIB
