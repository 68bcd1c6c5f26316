"""Running out of memory under a real limit: the teacher pass halves its batch, a training step leaves no trace.

Only the teacher pass halves by itself (`distillation/teacher.py`). A training step and sampling raise the error; their
batches are settings (train.micro_batch_tokens, rollout.batch_size).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from gpu_bench import Bench, Results, free_memory
from gpu_numerics import RecordingRanks, relative_error
from measured import peak_bytes
from workloads import teacher_pass, training_items

BFLOAT16 = 3e-2  # another split into batches rounds differently


def check_memory(bench: Bench, results: Results) -> None:
    """Both parts with and without the limit."""
    check_halving(bench, results)
    check_failed_step(bench, results)


def check_halving(bench: Bench, results: Results) -> None:
    """A teacher pass in half the memory that it would use has the states of one without a limit."""
    group, tokens, prefix = bench.sizes.teacher[0]
    config = bench.config(teacher={"batch_tokens": group * (prefix + tokens)})
    work = teacher_pass(bench.policy, config, bench.shape, group, tokens, prefix)
    expected: dict[Any, Any] = {}
    peak = peak_bytes(lambda: expected.update(work.call()))
    free_memory()
    with too_little_memory(bench, peak / 2) as errors:
        halved = work.call()
    note = "a limit of half the peak" if bench.is_cuda else "errors raised by the test"
    results.require("memory", "teacher pass: batches are halved", errors() > 0, f"{errors()} times; {note}")
    error = max(relative_error(expected[key], halved[key]) for key in expected)
    results.check("memory", "teacher pass: states after halving", error, BFLOAT16, note)


def check_failed_step(bench: Bench, results: Results) -> None:
    """A step that runs out of memory changes nothing, and the same step then has the loss and gradient of a first."""
    from ogls.training.trainer import Trainer

    policy, step = bench.policy, bench.sizes.steps[0]
    policy.use_adapter(None)
    length = bench.sizes.prompt + step.tokens
    config = bench.config(train={"micro_batch_tokens": 4 * length, "learning_rate": 1e-6})
    items = training_items(config, bench.shape, 8, bench.sizes.prompt, step.tokens)

    def one_step(trainer: Any) -> tuple[float, Any]:
        policy.use_adapter(None)
        return trainer.optimizer_step(items)["loss"], trainer.ranks.gradient

    expected: list[Any] = []
    peak = peak_bytes(lambda: expected.extend(one_step(Trainer(policy, config.train, ranks=RecordingRanks()))))
    policy.use_adapter(None)
    before, trainer = policy.copy_adapter().hash, Trainer(policy, config.train, ranks=RecordingRanks())
    free_memory()
    failed = False
    with too_little_memory(bench, peak / 2, skipped=1):
        try:
            trainer.optimizer_step(items)
        except torch.OutOfMemoryError:
            failed = True
    free_memory()
    results.require("memory", "training step: it needs more than half its peak", failed)
    results.require("memory", "training step: one that fails changes no weight", policy.copy_adapter().hash == before)
    loss, gradient = one_step(trainer)
    results.check("memory", "training step: loss after the failed step", abs(loss / expected[0] - 1), 1e-3)
    error = relative_error(expected[1], gradient)
    results.check("memory", "training step: gradient after the failed step", error, BFLOAT16)
    halved = config.train.model_copy(update={"micro_batch_tokens": 2 * length})
    loss, gradient = one_step(Trainer(policy, halved, ranks=RecordingRanks()))
    results.check("memory", "training step: loss with half the micro-batch", abs(loss / expected[0] - 1), 1e-3)
    error = relative_error(expected[1], gradient)
    results.check("memory", "training step: gradient with half the micro-batch", error, BFLOAT16)
    policy.use_adapter(None)


@contextmanager
def too_little_memory(bench: Bench, room: float, skipped: int = 0) -> Iterator[Any]:
    """Leave `room` bytes of memory for the block; yields a function that counts the errors.

    Without CUDA the body of the model raises the error, once, after `skipped` calls.
    """
    if bench.is_cuda:
        total = torch.cuda.get_device_properties(0).total_memory
        before = torch.cuda.memory_stats().get("num_ooms", 0)
        torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + room) / total))
        try:
            yield lambda: torch.cuda.memory_stats().get("num_ooms", 0) - before
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return
    run_body, calls = bench.policy.run_body, []

    def run(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == skipped + 1:
            raise torch.OutOfMemoryError("raised by the test")
        return run_body(*arguments, **options)

    bench.policy.run_body = run
    try:
        yield lambda: int(len(calls) > skipped)
    finally:
        del bench.policy.run_body
