"""What each stage of a round computes: tokens, peak memory, and the seconds of each of its shards on one worker.

With P parameters, a forward pass costs 2 P FLOP per token. A backward pass costs the same if the weights are frozen
(LoRA), and twice as much if they are trained. Attention over the mean context is added. One decoding step reads all
weights once for the whole batch. Steering and style multiply fp32 states by the head without rounding (`models.head`),
and pass over its logits many times.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ogls.config import POOLS, RunConfig
from ogls.models.shape import Shape
from ogls.planning.gpus import Gpu
from ogls.planning.memory import (
    BYTES,
    STATES_IN_MEMORY,
    STEER_SHARD_STATES,
    device_training_bytes,
    logit_bytes,
    scoring_bytes,
    steering_bytes,
    style_bytes,
    teaching_bytes,
)

_BFLOAT16_TERMS = 3  # of an fp32 state on a GPU; a cached state of the base pool has two (fp16) or one
# fp32 tensors [tokens, V] that are read or written, beside the matrix products: counted in the code.
_DRAW_PASSES = 9  # samplers.draw and the log-prob of the token, per sampled token
_STEER_PASSES = 36  # distillation.steering, per steered token
_STYLE_PASSES = 28  # distillation.style, per measured token and signal


@dataclass(frozen=True)
class Work:
    """The work of one stage in a round. Of an evaluation, the part of one round of `evaluate.every`."""

    stage: str
    memory: float  # peak on one device, in bytes
    tokens: float  # tokens that the model processes
    shards: tuple[float, ...]  # seconds of each shard on one worker; one if the stage is not divided
    setting: str  # the setting to lower if it does not fit in memory
    size: str = ""  # the setting that makes its shards smaller; empty if none does


@dataclass(frozen=True)
class Round:
    """A round of a configuration on one kind of device."""

    config: RunConfig
    gpu: Gpu
    shape: Shape
    others: dict[str, Shape]  # the other models that compute pools, by path
    rollout_tokens: float  # mean length of a rollout
    prompt_tokens: int  # mean length of a prompt without an exemplar

    @property
    def rollouts(self) -> int:
        """Rollouts of the round."""
        return self.config.problems.per_round * self.config.rollout.samples

    @property
    def trained_tokens(self) -> float:
        """Mean number of tokens of a rollout that are trained."""
        cap = self.config.train.tokens if self.config.has_teacher else self.rollout_tokens
        return min(self.rollout_tokens, cap)

    @cached_property
    def widths(self) -> dict[str, int]:
        """The hidden size of the model that computes each cached pool."""
        declared = self.config.declared_pools()
        return {name: self.others.get(declared[name].model, self.shape).hidden for name in self.config.pools()}

    @property
    def head_width(self) -> int:
        """Columns of the heads of all models side by side."""
        return self.shape.hidden + sum(other.hidden for other in self.others.values())

    def seconds(self, flop: float, dtype: str = "") -> float:
        """Return the time of dense passes, with numbers of `dtype` or of the model's type."""
        return flop / self.gpu.rate(dtype or self.config.model.dtype)

    def logit_seconds(self, tokens: float, products: float, passes: float) -> float:
        """Return the time of products of `tokens` fp32 states with the heads, and of passes over their logits."""
        flop = 2 * self.shape.vocabulary * self.head_width * tokens * products
        in_terms = self.config.model.dtype == "bfloat16" and self.gpu.name != "cpu"
        time = self.seconds(_BFLOAT16_TERMS * flop) if in_terms else self.seconds(flop, "float32")
        return time + passes * tokens * self.shape.vocabulary * 4 / self.gpu.bandwidth


def list_work(round_: Round, engine: str, parallel: int, ranks: int) -> Iterator[Work]:
    """Yield the work of the stages in order. verify runs on CPUs, and is left out.

    `parallel` is the number of GPUs of one engine; `ranks` is the number of processes that train.
    """
    config = round_.config
    yield _sampling(round_, "sample", _sizes(round_.rollouts, config.rollout.batch_size), engine, parallel)
    if config.has_teacher:
        yield _teaching(round_)
        yield _steering(round_)
        if config.style.enabled:
            yield _style(round_)
    yield _training(round_, ranks)
    yield _evaluation(round_, engine, parallel)


def _sizes(items: int, size: int) -> list[int]:
    """The numbers of items of shards with at most `size` each."""
    return [min(size, items - start) for start in range(0, items, size)]


def _attention(shape: Shape, tokens: float, context: float) -> float:
    """FLOP of attention in a forward pass over `tokens` tokens, each of which sees `context` tokens."""
    return 4 * shape.layers * shape.heads * shape.head_dim * tokens * context


def _sampling(round_: Round, stage: str, sizes: Sequence[int], engine: str, parallel: int) -> Work:
    config, gpu, shape = round_.config, round_.gpu, round_.shape
    sampling, section = (config.rollout, "rollout") if stage == "sample" else (config.evaluate, "evaluate")
    width, prompt = BYTES[config.model.dtype], round_.prompt_tokens
    mean = min(round_.rollout_tokens, sampling.max_tokens)
    weights = shape.parameters * width / parallel
    memory = weights + shape.cache(sampling.batch_size * (prompt + sampling.max_tokens), width) / parallel
    memory += logit_bytes(config, sampling, shape, gpu)
    if engine == "transformers" and width == 4 and config.adapter.kind == "lora":
        memory += shape.body * width  # the weights with LoRA merged, beside those without
    at_once = float("inf")
    sequence_cache = shape.cache(prompt + mean / 2, width) / parallel  # of one sequence, halfway through
    if engine == "server":
        memory = 0.0  # memory of a remote server is not counted
    if engine == "vllm":  # uses its share of the GPU and queues the sequences that do not fit
        share = config.rollout.vllm.gpu_memory * gpu.memory
        memory = min(memory, share)
        at_once = min(config.rollout.vllm.max_sequences, (share - weights) // sequence_cache)
    own = _DRAW_PASSES * shape.vocabulary * 4 if engine == "transformers" else 0

    together = config.rollout.decodes_together(engine)

    def seconds(completions: int) -> float:
        # A decoding step reads the weights once, and the cache of each running sequence.
        running = min(sum(sizes) if together else completions, at_once)
        read = weights / max(running, 1) + sequence_cache + own
        decode = max(read / gpu.bandwidth, round_.seconds(2 * shape.parameters / parallel))
        prefill = round_.seconds((2 * shape.body * prompt + _attention(shape, prompt, prompt / 2)) / parallel)
        return completions * (mean * decode + prefill)

    shards = tuple(map(seconds, sizes))
    return Work(stage, memory, sum(sizes) * mean, shards, f"{section}.batch_size", f"{section}.batch_size")


def _evaluation(round_: Round, engine: str, parallel: int) -> Work:
    config = round_.config
    problems = sum(b.limit or 500 for b in config.evaluate.benchmarks) + config.problems.holdout
    batch = config.evaluate.batch_size
    sizes = _sizes(problems * config.evaluate.samples, batch) + _sizes(problems, batch)  # sampled, then greedy
    work = _sampling(round_, "evaluate", sizes, engine, parallel)
    if config.evaluate.base_kl:
        work = _with_base_pass(round_, work, sizes)
    every = config.evaluate.every
    return replace(work, tokens=work.tokens / every, shards=tuple(seconds / every for seconds in work.shards))


def _with_base_pass(round_: Round, work: Work, sizes: Sequence[int]) -> Work:
    """Add the pass of the base model (`evaluate.base_kl`), on one GPU. It and the engine use the memory in turns."""
    config, shape, prompt = round_.config, round_.shape, round_.prompt_tokens
    memory = shape.parameters * BYTES[config.model.dtype] + scoring_bytes(config, shape)
    completion = work.tokens / sum(sizes)
    length = prompt + completion
    flop = 2 * shape.body * length + _attention(shape, length, length / 2)
    seconds = round_.seconds(flop + 2 * shape.vocabulary * shape.hidden * completion)
    shards = tuple(s + n * seconds for s, n in zip(work.shards, sizes, strict=True))
    setting = work.setting if work.memory >= memory else "teacher.batch_tokens"
    return replace(work, memory=max(work.memory, memory), shards=shards, setting=setting)


def _teaching(round_: Round) -> Work:
    config, shape, others = round_.config, round_.shape, round_.others
    prompt, teacher = round_.prompt_tokens, config.teacher
    groups, size = config.problems.per_round, config.rollout.samples
    exemplar = min(round_.rollout_tokens, teacher.exemplar_tokens)
    target = round_.trained_tokens
    contexts = size + ("reference" in config.pools()) + teacher.reference_exemplar
    tokens = contexts * (2.0 * prompt + exemplar) + prompt  # of the prefixes of a group
    tokens += size * (min(size - 1, 2 * teacher.max_exemplars) + 1) * target  # and of their continuations
    by_shape: list[tuple[Shape, float]] = [(shape, tokens)]
    declared = config.declared_pools()
    for pool in (declared[name] for name in config.pools() if name not in POOLS):
        contexts = {"nothing": 1, "reference": 1, "column": 1, "feedback": size}.get(pool.kind, size)
        reads = pool.max_exemplars or teacher.max_exemplars if pool.kind in ("correct", "incorrect") else 1
        further = contexts * (prompt + exemplar * (pool.kind != "nothing")) + size * min(reads, size - 1 or 1) * target
        by_shape.append((others.get(pool.model, shape), further))
    flop = sum(2 * s.body * n + _attention(s, n, prompt + exemplar) for s, n in by_shape)
    models = (shape, *others.values())  # all of them are loaded together
    weights = sum(s.parameters for s in models) * BYTES[config.model.dtype]
    memory = weights + max(teaching_bytes(config, s) for s in models)
    if round_.gpu.name == "cpu":
        states = size * target * 4 * sum(round_.widths.values())
        memory += max(states, min(teacher.shard_groups * states, STATES_IN_MEMORY))
    shards = tuple(count * round_.seconds(flop) for count in _sizes(groups, teacher.shard_groups))
    total = groups * sum(n for _, n in by_shape)
    return Work("teach", memory, total, shards, "teacher.batch_tokens", "teacher.shard_groups")


def _steering(round_: Round) -> Work:
    """Each shard has consecutive files of cached states (`stages.shards.divide_files`)."""
    config = round_.config
    tokens, before = dict[int, float](), 0.0  # of each shard
    for groups in _sizes(config.problems.per_round, config.teacher.shard_groups):
        in_file = groups * config.rollout.samples * round_.trained_tokens
        shard = int(before // STEER_SHARD_STATES)
        tokens[shard] = tokens.get(shard, 0.0) + in_file
        before += in_file * len(round_.widths)
    # Products: of the base pool, of the target and of the direction, whatever the number of pools.
    shards = tuple(round_.logit_seconds(count, 3, _STEER_PASSES) for count in tokens.values())
    memory = steering_bytes(config, round_.shape, round_.head_width)
    size = "teacher.shard_groups" if len(tokens) < before / STEER_SHARD_STATES else ""
    return Work("steer", memory, sum(tokens.values()), shards, "steer.batch_tokens", size)


def _style(round_: Round) -> Work:
    """In the process of the run: the base pool, and each signal (`distillation.style.signal_recipes`)."""
    config, pools = round_.config, round_.widths
    signals = 1 + ({"correct", "incorrect"} <= set(pools))  # the target, and the direction
    signals += sum(name in ("reference", "correct") or name not in POOLS for name in pools)
    tokens = min(config.style.rollouts, round_.rollouts) * round_.trained_tokens
    seconds = round_.logit_seconds(tokens, 1 + signals, signals * _STYLE_PASSES)
    memory = style_bytes(config, round_.shape, round_.head_width, round_.trained_tokens)
    return Work("style", memory, tokens, (seconds,), "steer.batch_tokens")


def _training(round_: Round, ranks: int) -> Work:
    config, shape, gpu, train = round_.config, round_.shape, round_.gpu, round_.config.train
    length = round_.prompt_tokens + round_.trained_tokens
    tokens = round_.rollouts * length * train.epochs
    trained = round_.rollouts * round_.trained_tokens * train.epochs
    again = 1 if train.gradient_checkpointing else 0
    passes = (4 if config.adapter.kind == "lora" else 6) + 2 * again
    flop = passes * shape.body * tokens + _attention(shape, tokens, length / 2) * (3 + again)
    flop += 4 * shape.vocabulary * shape.hidden * trained  # the head, forward and backward, in the model's type
    seconds = round_.seconds(flop)
    if config.has_teacher and train.support == "full":  # targets from cached states
        seconds += round_.logit_seconds(trained, 1 + (config.steer.project != "none"), 0)
    steps = -(-round_.rollouts // train.batch_rollouts) * train.epochs
    if ranks > 1 and gpu.name != "cpu":  # processes on a CPU share its cores
        in_step = round_.rollouts * train.epochs / steps
        seconds *= -(-in_step // ranks) / in_step  # the longest share of a step, with rollouts of equal length
        seconds = _with_exchange(round_, seconds, steps, ranks)
    memory = device_training_bytes(config, shape, ranks) * (ranks if gpu.name == "cpu" else 1)
    return Work("train", memory, tokens, (seconds,), "train.micro_batch_tokens")


def _with_exchange(round_: Round, seconds: float, steps: int, ranks: int) -> float:
    """Add the exchange between the processes at the rate of the link.

    DDP sums the gradients of each step. FSDP2 gathers the weights twice and sums the gradients in each micro-batch,
    beside the computation.
    """
    config, shape, train = round_.config, round_.shape, round_.config.train
    share = (ranks - 1) / ranks
    if train.parallel == "ddp":
        return seconds + steps * 2 * share * 4 * shape.trained / round_.gpu.link
    tokens = round_.rollouts * train.epochs * (round_.prompt_tokens + round_.trained_tokens)
    micro_batches = steps * max(1, -(-tokens // (steps * ranks * train.micro_batch_tokens)))
    frozen = BYTES[config.model.dtype] if config.adapter.kind == "lora" else 4
    exchanged = micro_batches * share * (2 * frozen * shape.body + 4 * shape.trained)
    return max(seconds, exchanged / round_.gpu.link)
