"""Estimates before a run: parameters, peak memory, tokens and time per stage, and disk space, on one or more devices.

Time is computed from the FLOP/s and the memory bandwidth in data sheets (`work`), then spread over devices (`devices`).

Memory estimates are within about 40% (a test compares them with a measured peak). Time estimates are within a factor
of two on machines that reach `UTILIZATION` of their peak FLOP/s. Estimates for several devices have not been compared
with measurements: they assume that shards take equally long for equally many items, that starting workers costs
nothing, and that a split engine computes without exchange.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ogls.config import RunConfig
from ogls.models.shape import Shape, read_shape
from ogls.planning.devices import (
    Devices,
    count_training_ranks,
    count_workers,
    device_warnings,
    engine_gpus,
    longest_worker,
    resolve_engine_for,
    worker_gpus,
)
from ogls.planning.gpus import GIB, Gpu
from ogls.planning.memory import BYTES, other_shapes
from ogls.planning.work import Round, Work, list_work


@dataclass(frozen=True)
class StageEstimate:
    """What one stage needs per round. Evaluation is averaged over the rounds between two evaluations."""

    stage: str
    memory: float  # peak on one device, in bytes
    tokens: float  # tokens that the model processes
    seconds: float  # with all devices
    setting: str  # the setting to lower if the stage does not fit in memory
    alone: float  # seconds with one worker, or one process that trains
    workers: int  # that compute shards, or processes that train
    devices: int  # GPUs of these
    shards: int
    size: str  # the setting that makes shards smaller; empty if none does


@dataclass(frozen=True)
class Plan:
    """The estimates for one configuration on some devices of one kind."""

    round: Round
    devices: Devices
    stages: tuple[StageEstimate, ...]
    disk: dict[str, float]  # bytes per round, by table
    warnings: tuple[str, ...]  # what does not fit or stays idle, and which setting to change

    @property
    def config(self) -> RunConfig:
        """The configuration."""
        return self.round.config

    @property
    def gpu(self) -> Gpu:
        """The kind of device."""
        return self.round.gpu

    @property
    def shape(self) -> Shape:
        """The dimensions of the run's model."""
        return self.round.shape

    @property
    def teachers(self) -> dict[str, Shape]:
        """The other models that compute pools, by path; loaded together with the run's model."""
        return self.round.others

    @property
    def round_seconds(self) -> float:
        """Seconds per round, over all stages."""
        return sum(s.seconds for s in self.stages)

    def change(self, config: RunConfig | None = None, devices: Devices | None = None) -> Plan:
        """Return the plan with another configuration of the same models, or with other devices."""
        return _plan(replace(self.round, config=config or self.config), devices or self.devices)


def estimate(
    config: RunConfig,
    gpu: Gpu,
    rollout_tokens: int | None = None,
    prompt_tokens: int = 200,
    devices: Devices | None = None,
) -> Plan:
    """Estimate the needs of one round.

    `rollout_tokens` is the mean length of a rollout; the default is a third of rollout.max_tokens. `prompt_tokens` is
    the mean length of a prompt without an exemplar. `devices` is one by default.
    """
    mean_tokens = float(rollout_tokens or max(1, config.rollout.max_tokens // 3))
    round_ = Round(config, gpu, read_shape(config), other_shapes(config), mean_tokens, prompt_tokens)
    return _plan(round_, devices or Devices())


def _plan(round_: Round, devices: Devices) -> Plan:
    config, gpu = round_.config, round_.gpu
    workers, ranks = count_workers(config, gpu, devices), count_training_ranks(config, gpu, devices)
    engine, parallel = resolve_engine_for(config, gpu), min(engine_gpus(config, gpu), devices.gpus)
    per_worker = min(worker_gpus(config, gpu), devices.gpus)
    alone = {work.stage: sum(work.shards) for work in list_work(round_, engine, parallel, 1)}
    stages = []
    for work in list_work(round_, engine, parallel, ranks):
        used = _count_used(round_, work, workers, ranks)
        per_stage = per_worker if work.stage in ("sample", "evaluate") else 1
        stages.append(_spread(work, used, used * per_stage, alone[work.stage]))
    disk = _estimate_disk(round_)
    warnings = (*_list_warnings(round_, tuple(stages), disk), *device_warnings(config, gpu, devices))
    return Plan(round_, devices, tuple(stages), disk, warnings)


def _count_used(round_: Round, work: Work, workers: int, ranks: int) -> int:
    """The workers of a stage, or the processes that train."""
    if work.stage == "train":
        return ranks
    own = work.stage == "style" or (work.stage in ("sample", "evaluate") and round_.config.rollout.engine == "server")
    return 1 if own else min(workers, len(work.shards))


def _spread(work: Work, workers: int, devices: int, alone: float) -> StageEstimate:
    seconds = longest_worker(work.shards, workers)
    shards = len(work.shards)
    sizes = work.setting, alone, workers, devices, shards, work.size
    return StageEstimate(work.stage, work.memory, work.tokens, seconds, *sizes)


def _estimate_disk(round_: Round) -> dict[str, float]:
    config, shape = round_.config, round_.shape
    disk = {"trajectories": round_.rollouts * round_.rollout_tokens * 9, "adapter and optimizer": shape.trained * 12.0}
    if config.has_teacher:
        distilled_tokens = round_.rollouts * round_.trained_tokens
        width = sum(round_.widths.values())
        disk["teacher_states"] = distilled_tokens * width * BYTES[config.teacher.state_dtype]
        disk["targets"] = distilled_tokens * (60 + 3 * min(config.steer.support, shape.vocabulary))
    return disk


def _list_warnings(round_: Round, stages: tuple[StageEstimate, ...], disk: dict[str, float]) -> Iterator[str]:
    config, gpu, shape = round_.config, round_.gpu, round_.shape
    for stage in stages:
        if stage.memory > gpu.memory:
            checkpointing = " and set train.gradient_checkpointing" if stage.stage == "train" else ""
            yield (
                f"{stage.stage} needs {stage.memory / GIB:.1f} GiB, but {gpu.name} has {gpu.memory / GIB:.0f} GiB: "
                f"lower {stage.setting}{checkpointing}"
            )
    longest = max(config.rollout.max_tokens, config.evaluate.max_tokens)
    width, share = BYTES[config.model.dtype], config.rollout.vllm.gpu_memory
    minimum = (shape.parameters * width + shape.cache(longest, width)) / engine_gpus(config, gpu)
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
