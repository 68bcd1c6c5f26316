"""Estimates before a run: parameters, peak memory, tokens and time per stage, and disk space.

Time is computed from a machine's FLOP/s and memory bandwidth. With P parameters, a forward pass costs 2 P FLOP per
token. A backward pass costs the same if the weights are frozen (LoRA), and twice as much if they are trained. Attention
over long sequences is added. One decoding step reads all weights once for the whole batch.

Memory estimates are within about 40% (a test compares them with a measured peak). Time estimates are within a factor
of two on machines that reach `_UTILIZATION` of their peak FLOP/s.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ogls.config import POOLS, RunConfig
from ogls.models.head import HEAD_BLOCK
from ogls.models.shape import Shape, read_shape
from ogls.planning.gpus import GIB, Gpu
from ogls.planning.memory import (
    BYTES,
    LOGIT_COPIES,
    STATES_IN_MEMORY,
    other_shapes,
    scoring_bytes,
    teaching_bytes,
    training_bytes,
)

_UTILIZATION = 0.4  # fraction of peak FLOP/s that dense passes reach


@dataclass(frozen=True)
class StageEstimate:
    """What one stage needs per round. Evaluation is averaged over the rounds between two evaluations."""

    stage: str
    memory: float  # peak, in bytes
    tokens: float  # tokens that the model processes
    seconds: float
    setting: str  # the setting to lower if the stage does not fit in memory


@dataclass(frozen=True)
class Plan:
    """The estimates for one configuration on one machine."""

    shape: Shape
    gpu: Gpu
    stages: tuple[StageEstimate, ...]
    disk: dict[str, float]  # bytes per round, by table
    warnings: tuple[str, ...]  # what does not fit, and which setting to change
    teachers: dict[str, Shape]  # the other models that compute pools, by path; loaded together with the run's model

    @property
    def round_seconds(self) -> float:
        """Seconds per round, over all stages."""
        return sum(s.seconds for s in self.stages)


def estimate(config: RunConfig, gpu: Gpu, rollout_tokens: int | None = None, prompt_tokens: int = 200) -> Plan:
    """Estimate the needs of one round.

    `rollout_tokens` is the mean length of a rollout; the default is a third of rollout.max_tokens. `prompt_tokens` is
    the mean length of a prompt without an exemplar.
    """
    shape = read_shape(config)
    mean_tokens = float(rollout_tokens or max(1, config.rollout.max_tokens // 3))
    stages = tuple(_estimate_stages(config, shape, gpu, mean_tokens, prompt_tokens))
    disk = _estimate_disk(config, shape, mean_tokens)
    return Plan(shape, gpu, stages, disk, tuple(_list_warnings(config, shape, gpu, stages, disk)), other_shapes(config))


def _estimate_stages(
    config: RunConfig, shape: Shape, gpu: Gpu, mean_tokens: float, prompt_tokens: int
) -> Iterator[StageEstimate]:
    weights = shape.parameters * BYTES[config.model.dtype]
    rollouts = config.problems.per_round * config.rollout.samples
    yield _estimate_sampling(
        "sample", config, shape, gpu, rollouts, mean_tokens, prompt_tokens, config.rollout.batch_size
    )
    trained_tokens = min(mean_tokens, config.train.tokens)
    if config.has_teacher:
        yield _estimate_teaching(config, shape, gpu, mean_tokens, prompt_tokens)
        width = shape.hidden + sum(other.hidden for other in other_shapes(config).values())  # of the heads side by side
        head = shape.vocabulary * width * 4
        logits = config.steer.batch_tokens * shape.vocabulary * 4 * LOGIT_COPIES
        tokens = rollouts * trained_tokens
        flop = 2 * shape.vocabulary * width * tokens * len(config.pools())
        yield StageEstimate("steer", head + logits, tokens, flop / (gpu.flops * _UTILIZATION), "steer.batch_tokens")
    tokens = rollouts * (prompt_tokens + trained_tokens) * config.train.epochs
    memory = weights + training_bytes(config, shape)
    flop_per_parameter = 4 if config.adapter.kind == "lora" else 6
    flop_per_parameter += 2 if config.train.gradient_checkpointing else 0
    flop = flop_per_parameter * shape.body * tokens + 4 * shape.vocabulary * shape.hidden * tokens
    yield StageEstimate("train", memory, tokens, flop / (gpu.flops * _UTILIZATION), "train.micro_batch_tokens")
    problems = sum(b.limit or 500 for b in config.evaluate.benchmarks) + config.problems.holdout
    completions = problems * (config.evaluate.samples + 1)  # one of them is greedy
    sampled_tokens = min(mean_tokens * 1.0, config.evaluate.max_tokens)
    size = config.evaluate.batch_size
    evaluation = _estimate_sampling("evaluate", config, shape, gpu, completions, sampled_tokens, prompt_tokens, size)
    if config.evaluate.base_kl:
        evaluation = _add_base_pass(evaluation, config, shape, gpu, completions * prompt_tokens)
    rounds = config.evaluate.every
    yield replace(evaluation, tokens=evaluation.tokens / rounds, seconds=evaluation.seconds / rounds)


def _estimate_sampling(
    stage: str,
    config: RunConfig,
    shape: Shape,
    gpu: Gpu,
    completions: float,
    mean_tokens: float,
    prompt_tokens: int,
    batch_size: int,
) -> StageEstimate:
    width, engine = BYTES[config.model.dtype], resolve_engine_for(config, gpu)
    weights = shape.parameters * width
    sampling = config.rollout if stage == "sample" else config.evaluate
    cache = shape.cache(batch_size * (prompt_tokens + sampling.max_tokens), width)
    logits = batch_size * shape.vocabulary * (4 + 8 * (6 if sampling.top_p < 1 else 3))  # sampling uses fp64
    if gpu.name == "cpu" and width < 4:
        logits += min(shape.vocabulary, HEAD_BLOCK) * shape.hidden * 4  # rows of the head in fp32
    memory = weights + cache + logits
    tokens, running = completions * mean_tokens, float(batch_size)
    sequence_cache = shape.cache(prompt_tokens + mean_tokens / 2, width)  # of one sequence, halfway through its rollout
    if engine == "server":
        memory = 0.0  # memory of a remote server is not counted
    if engine == "vllm":  # uses its share of the GPU and queues the sequences that do not fit
        share = config.rollout.vllm.gpu_memory * gpu.memory
        memory = min(memory, share)
        running = min(running, config.rollout.vllm.max_sequences, (share - weights) // sequence_cache)
    # A decoding step reads the weights once, and the cache of each running sequence.
    bytes_per_token = weights / max(running, 1) + sequence_cache
    seconds = tokens * max(bytes_per_token / gpu.bandwidth, 2 * shape.parameters / (gpu.flops * _UTILIZATION))
    seconds += 2 * shape.body * completions * prompt_tokens / (gpu.flops * _UTILIZATION)
    section = "rollout" if stage == "sample" else "evaluate"
    return StageEstimate(stage, memory, tokens, seconds, f"{section}.batch_size")


def _add_base_pass(
    evaluation: StageEstimate, config: RunConfig, shape: Shape, gpu: Gpu, prompt_tokens: float
) -> StageEstimate:
    """Add the pass of the base model (`evaluate.base_kl`). It and the engine use the memory in turns."""
    memory = shape.parameters * BYTES[config.model.dtype] + scoring_bytes(config, shape)
    flop = (
        2 * shape.body * (evaluation.tokens + prompt_tokens) + 2 * shape.vocabulary * shape.hidden * evaluation.tokens
    )
    setting = evaluation.setting if evaluation.memory >= memory else "teacher.batch_tokens"
    seconds = evaluation.seconds + flop / (gpu.flops * _UTILIZATION)
    return replace(evaluation, memory=max(evaluation.memory, memory), seconds=seconds, setting=setting)


def resolve_engine_for(config: RunConfig, gpu: Gpu) -> str:
    """Return the engine that `rollout.engine` selects on a machine, assuming that vLLM is installed."""
    engine = config.rollout.engine
    return ("transformers" if gpu.name == "cpu" else "vllm") if engine == "auto" else engine


def _estimate_teaching(
    config: RunConfig, shape: Shape, gpu: Gpu, mean_tokens: float, prompt_tokens: int
) -> StageEstimate:
    width, teacher = BYTES[config.model.dtype], config.teacher
    groups, size = config.problems.per_round, config.rollout.samples
    exemplar_tokens = min(mean_tokens, teacher.exemplar_tokens)
    target_tokens = min(mean_tokens, config.train.tokens)
    contexts = size + ("reference" in config.pools()) + teacher.reference_exemplar
    prefixes = groups * (contexts * (2 * prompt_tokens + exemplar_tokens) + prompt_tokens)
    continuations = groups * size * (min(size - 1, 2 * teacher.max_exemplars) + 1) * target_tokens
    tokens = prefixes + continuations
    declared, others = config.declared_pools(), other_shapes(config)
    group = size * target_tokens * 4 * sum(others.get(declared[name].model, shape).hidden for name in config.pools())
    states = max(group, min(teacher.shard_groups * group, STATES_IN_MEMORY))
    by_shape = [(shape, tokens)]
    for pool in (declared[name] for name in config.pools() if name not in POOLS):
        contexts = {"nothing": 1, "reference": 1, "column": 1, "feedback": size}.get(pool.kind, size)
        reads = pool.max_exemplars or teacher.max_exemplars if pool.kind in ("correct", "incorrect") else 1
        further = contexts * (prompt_tokens + exemplar_tokens * (pool.kind != "nothing"))
        further += size * min(reads, size - 1 or 1) * target_tokens
        by_shape.append((others.get(pool.model, shape), groups * further))
    flop = sum(
        2 * s.body * n + 4 * s.layers * s.heads * s.head_dim * n * (prompt_tokens + exemplar_tokens)
        for s, n in by_shape
    )
    tokens = sum(n for _, n in by_shape)
    weights = sum(s.parameters for s in (shape, *others.values())) * width  # all models are loaded together
    passes = max(teaching_bytes(config, s) for s in (shape, *others.values()))
    memory = weights + passes + (states if gpu.name == "cpu" else 0)
    return StageEstimate("teach", memory, tokens, flop / (gpu.flops * _UTILIZATION), "teacher.batch_tokens")


def _estimate_disk(config: RunConfig, shape: Shape, mean_tokens: float) -> dict[str, float]:
    rollouts = config.problems.per_round * config.rollout.samples
    disk = {"trajectories": rollouts * mean_tokens * 9, "adapter and optimizer": shape.trained * 12.0}
    if config.has_teacher:
        distilled_tokens = rollouts * min(mean_tokens, config.train.tokens)
        declared, others = config.declared_pools(), other_shapes(config)
        width = sum(others.get(declared[name].model, shape).hidden for name in config.pools())
        disk["teacher_states"] = distilled_tokens * width * BYTES[config.teacher.state_dtype]
        disk["targets"] = distilled_tokens * (60 + 3 * min(config.steer.support, shape.vocabulary))
    return disk


def _list_warnings(
    config: RunConfig, shape: Shape, gpu: Gpu, stages: tuple[StageEstimate, ...], disk: dict[str, float]
) -> Iterator[str]:
    for stage in stages:
        if stage.memory > gpu.memory:
            checkpointing = " and set train.gradient_checkpointing" if stage.stage == "train" else ""
            yield (
                f"{stage.stage} needs {stage.memory / GIB:.1f} GiB, but {gpu.name} has {gpu.memory / GIB:.0f} GiB: "
                f"lower {stage.setting}{checkpointing}"
            )
    longest = max(config.rollout.max_tokens, config.evaluate.max_tokens)
    width, share = BYTES[config.model.dtype], config.rollout.vllm.gpu_memory
    minimum = shape.parameters * width + shape.cache(longest, width)
    if resolve_engine_for(config, gpu) == "vllm" and minimum > share * gpu.memory:
        yield (
            f"the weights and one completion of {longest:,} tokens need {minimum / GIB:.1f} GiB, but vLLM may use only "
            f"{share:.0%} of {gpu.memory / GIB:.0f} GiB: lower max_tokens, or raise rollout.vllm.gpu_memory"
        )
    if longest >= shape.context:
        yield (
            f"completions of {longest:,} tokens do not fit in the model's context of {shape.context:,} tokens: "
            "lower max_tokens"
        )
    total = sum(disk.values()) * config.rounds
    states = disk.get("teacher_states", 0.0) * config.rounds
    if total > 200 * GIB and states > total / 2 and not config.storage.keep_states:
        yield (
            f"{config.rounds} rounds need {total / GIB:.0f} GiB of disk space, most of it for teacher states: "
            "set storage.keep_states = 2"
        )
    if config.steer.support > shape.vocabulary:
        yield (
            f"steer.support is {config.steer.support}, but the vocabulary has only {shape.vocabulary} tokens: targets "
            "contain the whole vocabulary"
        )


def plan_rows(plan: Plan) -> list[dict[str, Any]]:
    """Return one row per stage for display."""
    return [
        {
            "stage": s.stage,
            "peak memory": format_bytes(s.memory),
            "fits": "yes" if s.memory <= plan.gpu.memory else "no",
            "tokens per round": f"{s.tokens:,.0f}",
            "time per round": format_seconds(s.seconds),
        }
        for s in plan.stages
    ]


def format_bytes(size: float) -> str:
    """Format a size with the unit that gives at least one before the point: 512 B, 1.4 MiB, 3.2 GiB."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = min(max(0, int(math.log2(size) // 10)), len(units) - 1) if size >= 1 else 0
    return f"{size / 2 ** (10 * power):.{1 if power else 0}f} {units[power]}"


def format_seconds(seconds: float) -> str:
    """Format a duration: 0.4 s, 12 s, 3.5 min, 2.1 h."""
    if seconds < 60:
        return f"{seconds:.{1 if seconds < 10 else 0}f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"
