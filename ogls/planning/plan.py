"""What a configuration will need, before any GPU is rented: parameters, memory at the peak of each stage, tokens, disk
a round, and time on a given machine from its FLOP/s and bandwidth.

Counting: a forward pass is 2 P FLOP a token and a backward pass through frozen weights (LoRA) as much again, a full one
twice; attention over long sequences is added. Decoding one token reads all weights once a step, shared by the batch.
Estimates are for planning: memory within some 40% (a test holds it against a measured peak), time within a factor of
two on machines that reach the share of their peak which is assumed here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ogls.config import RunConfig
from ogls.models.shape import Shape, read_shape
from ogls.planning.gpus import GIB, Gpu

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_REACHED = 0.4  # share of peak FLOP/s that dense passes reach
_SCORE_COPIES = 6  # [tokens, V] tensors alive at once where a target or a full-vocabulary loss is computed, in fp32


@dataclass(frozen=True)
class Need:
    """What one stage needs of a round: bytes at its peak, tokens through the model, seconds. Evaluation is spread over
    the rounds that it is made for."""

    stage: str
    memory: float
    tokens: float
    seconds: float
    setting: str  # what to lower where it does not fit


@dataclass(frozen=True)
class Plan:
    """The whole of it. `disk` is bytes a round by table; `warnings` say what will not fit, and what to change."""

    shape: Shape
    gpu: Gpu
    needs: tuple[Need, ...]
    disk: dict[str, float]
    warnings: tuple[str, ...]

    @property
    def round_seconds(self) -> float:
        return sum(n.seconds for n in self.needs)


def estimate(config: RunConfig, gpu: Gpu, length: int | None = None, prompt: int = 200) -> Plan:
    """The needs of one round. `length` is the mean length of a rollout, a third of rollout.max_tokens if not known."""
    shape = read_shape(config)
    mean = length or max(1, config.rollout.max_tokens // 3)
    needs = tuple(_needs(config, shape, gpu, float(mean), prompt))
    disk = _disk(config, shape, float(mean))
    return Plan(shape, gpu, needs, disk, tuple(_warnings(config, shape, gpu, needs, disk)))


def _needs(config: RunConfig, shape: Shape, gpu: Gpu, mean: float, prompt: int) -> Iterator[Need]:
    width = _BYTES[config.model.dtype]
    weights = shape.parameters * width
    rollouts = config.problems.per_round * config.rollout.samples
    yield _sampling("sample", config, shape, gpu, rollouts, mean, prompt, config.rollout.batch_size)
    if config.has_teacher:
        yield _teaching(config, shape, gpu, mean, prompt)
        head = shape.vocabulary * shape.hidden * 4
        rows = config.steer.batch_tokens * shape.vocabulary * 4 * _SCORE_COPIES
        tokens = rollouts * min(mean, config.train.tokens)
        pools = len(config.pools())
        flop = 2 * shape.vocabulary * shape.hidden * tokens * pools
        yield Need("steer", head + rows, tokens, flop / (gpu.flops * _REACHED), "steer.batch_tokens")
    tokens = rollouts * (prompt + min(mean, config.train.tokens)) * config.train.epochs
    memory = weights + training_bytes(config, shape)
    passes = 4 if config.adapter.kind == "lora" else 6
    passes += 2 if config.train.gradient_checkpointing else 0
    flop = passes * shape.body * tokens + 4 * shape.vocabulary * shape.hidden * tokens
    yield Need("train", memory, tokens, flop / (gpu.flops * _REACHED), "train.micro_batch_tokens")
    drawn = sum(b.limit or 500 for b in config.evaluate.benchmarks) + config.problems.holdout
    completions = drawn * (config.evaluate.samples + 1)
    scored = min(mean * 1.0, config.evaluate.max_tokens)
    size = config.evaluate.batch_size
    whole = _sampling("evaluate", config, shape, gpu, completions, scored, prompt, size)
    every = config.evaluate.every
    yield replace(whole, tokens=whole.tokens / every, seconds=whole.seconds / every)


def _sampling(
    stage: str, config: RunConfig, shape: Shape, gpu: Gpu, count: float, mean: float, prompt: int, batch: int
) -> Need:
    width, engine = _BYTES[config.model.dtype], engine_on(config, gpu)
    weights = shape.parameters * width
    sampling = config.rollout if stage == "sample" else config.evaluate
    limit = sampling.max_tokens
    cache = shape.cache(batch * (prompt + limit), width)
    rows = batch * shape.vocabulary * (4 + 8 * (6 if sampling.top_p < 1 else 3))  # a draw is made in fp64
    memory = weights + cache + rows
    # Decoding: every step reads the weights, and the cache of each sequence that still goes on.
    steps, running = count * mean, float(batch)
    one = shape.cache(prompt + mean / 2, width)  # of one sequence, half-way through its rollout
    if engine == "server":
        memory = 0.0  # the server's
    if engine == "vllm":  # takes its share of the GPU and lets wait what does not fit
        share = config.rollout.vllm.gpu_memory * gpu.memory
        memory = min(memory, share)
        running = min(running, config.rollout.vllm.max_sequences, (share - weights) // one)
    read = weights / max(running, 1) + one
    seconds = steps * max(read / gpu.bandwidth, 2 * shape.parameters / (gpu.flops * _REACHED))
    seconds += 2 * shape.body * count * prompt / (gpu.flops * _REACHED)
    name = "rollout" if stage == "sample" else "evaluate"
    return Need(stage, memory, steps, seconds, f"{name}.batch_size")


def engine_on(config: RunConfig, gpu: Gpu) -> str:
    """What `rollout.engine` comes to on that machine, vLLM being installed."""
    engine = config.rollout.engine
    return ("transformers" if gpu.name == "cpu" else "vllm") if engine == "auto" else engine


def _teaching(config: RunConfig, shape: Shape, gpu: Gpu, mean: float, prompt: int) -> Need:
    width, teacher = _BYTES[config.model.dtype], config.teacher
    groups, size = config.problems.per_round, config.rollout.samples
    exemplar = min(mean, teacher.exemplar_tokens)
    target = min(mean, config.train.tokens)
    contexts = size + ("reference" in config.pools()) + teacher.reference_exemplar
    prefills = groups * (contexts * (2 * prompt + exemplar) + prompt)
    continued = groups * size * (min(size - 1, 2 * teacher.max_exemplars) + 1) * target
    tokens = prefills + continued
    held = teacher.shard_groups * size * target * len(config.pools()) * shape.hidden * 4
    flop = 2 * shape.body * tokens + 4 * shape.layers * shape.heads * shape.head_dim * tokens * (prompt + exemplar)
    memory = shape.parameters * width + teaching_bytes(config, shape) + (held if gpu.name == "cpu" else 0)
    return Need("teach", memory, tokens, flop / (gpu.flops * _REACHED), "teacher.batch_tokens")


def teaching_bytes(config: RunConfig, shape: Shape) -> float:
    """Bytes of a teacher pass at its peak, without the weights: keys and values of the prefixes, their copies for the
    continuations, and what is alive within a layer."""
    width, tokens = _BYTES[config.model.dtype], config.teacher.batch_tokens
    return 2 * shape.cache(tokens, width) + tokens * (6 * shape.hidden + 3 * shape.intermediate) * width


def training_bytes(config: RunConfig, shape: Shape) -> float:
    """Bytes of a training step at its peak, without the weights: what is kept for the backward pass, one chunk of the
    head, gradients and AdamW's state."""
    width, train = _BYTES[config.model.dtype], config.train
    attention = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    adapted = len(config.adapter.modules) * config.adapter.rank if config.adapter.kind == "lora" else 0
    layer = 6 * shape.hidden + 3 * attention + 4 * shape.intermediate + adapted
    kept = shape.hidden * shape.layers + layer if train.gradient_checkpointing else layer * shape.layers
    activations = train.micro_batch_tokens * kept * width
    whole = train.support == "full"  # else one buffer, and a copy of it in the model's type
    row = shape.vocabulary * (4 * _SCORE_COPIES if whole else 4 + width * (width < 4))
    head = min(train.head_tokens, train.micro_batch_tokens) * row
    return activations + head + shape.trained * 16  # fp32 whatever the model's type: weights, gradients, AdamW's two


def _disk(config: RunConfig, shape: Shape, mean: float) -> dict[str, float]:
    rollouts = config.problems.per_round * config.rollout.samples
    found = {"trajectories": rollouts * mean * 9, "adapter and optimizer": shape.trained * 12.0}
    if config.has_teacher:
        distilled = rollouts * min(mean, config.train.tokens)
        state = shape.hidden * _BYTES[config.teacher.state_dtype]
        found["teacher_states"] = distilled * len(config.pools()) * state
        found["targets"] = distilled * (60 + 3 * min(config.steer.support, shape.vocabulary))
    return found


def _warnings(
    config: RunConfig, shape: Shape, gpu: Gpu, needs: tuple[Need, ...], disk: dict[str, float]
) -> Iterator[str]:
    for need in needs:
        if need.memory > gpu.memory:
            more = " and set train.gradient_checkpointing" if need.stage == "train" else ""
            yield (
                f"{need.stage} needs {need.memory / GIB:.1f} GiB and {gpu.name} has {gpu.memory / GIB:.0f}: "
                f"lower {need.setting}{more}"
            )
    longest = max(config.rollout.max_tokens, config.evaluate.max_tokens)
    width, share = _BYTES[config.model.dtype], config.rollout.vllm.gpu_memory
    one = shape.parameters * width + shape.cache(longest, width)
    if engine_on(config, gpu) == "vllm" and one > share * gpu.memory:
        yield (
            f"one completion of {longest:,} tokens and the weights are {one / GIB:.1f} GiB, and vLLM has "
            f"{share:.0%} of {gpu.memory / GIB:.0f}: lower max_tokens, or raise rollout.vllm.gpu_memory"
        )
    if longest >= shape.context:
        yield f"{longest:,} tokens to sample do not fit a context of {shape.context:,}: lower max_tokens"
    total = sum(disk.values()) * config.rounds
    states = disk.get("teacher_states", 0.0) * config.rounds
    if total > 200 * GIB and states > total / 2 and not config.storage.keep_states:
        said = f"{total / GIB:.0f} GiB of disk over {config.rounds} rounds"
        yield f"{said}, most of it teacher states: set storage.keep_states = 2"
    if config.steer.support > shape.vocabulary:
        yield f"steer.support is {config.steer.support} and the vocabulary {shape.vocabulary}: all of it is kept"


def plan_rows(found: Plan) -> list[dict[str, Any]]:
    """The needs as rows for people."""
    return [
        {
            "stage": n.stage,
            "peak GiB": round(n.memory / GIB, 2),
            "fits": n.memory <= found.gpu.memory,
            "tokens a round": round(n.tokens),
            "seconds a round": round(n.seconds, 1),
        }
        for n in found.needs
    ]
