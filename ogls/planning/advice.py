"""What bounds a round on several devices, which settings would shorten it, and what further devices would bring."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ogls.config import RunConfig
from ogls.planning.devices import count_workers, worker_gpus
from ogls.planning.display import format_seconds
from ogls.planning.memory import STEER_SHARD_STATES
from ogls.planning.plan import Plan, StageEstimate

_WORTH = 0.01  # a change that shortens the round by less is not named


def describe_bottleneck(plan: Plan) -> str:
    """Name the stage that takes longest, and say why it takes no less."""
    longest = max(plan.stages, key=lambda s: s.seconds)
    share = longest.seconds / max(plan.round_seconds, 1e-9)
    return f"bottleneck: {longest.stage}, {share:.0%} of the round: {_reason(plan, longest)}"


def list_changes(plan: Plan) -> Iterator[str]:
    """Yield settings that would shorten the round, each alone, with what they bring; the best first."""
    found = []
    for text, config in _changes(plan):
        seconds = plan.change(config).round_seconds
        if seconds < plan.round_seconds * (1 - _WORTH):
            saved = 1 - seconds / plan.round_seconds
            found.append((seconds, f"{text}: a round of {format_seconds(seconds)}, {saved:.0%} shorter"))
    yield from (line for _, line in sorted(found))


def describe_growth(plan: Plan) -> str:
    """Say how much shorter a round is with one more GPU (or as many as one worker has), and with one more node."""
    step = worker_gpus(plan.config, plan.gpu)
    gpus = "one more GPU" if step == 1 else f"{step} more GPUs"
    per_node = " per node" if plan.devices.nodes > 1 else ""
    more = {
        f"{gpus}{per_node}": replace(plan.devices, gpus=plan.devices.gpus + step),
        "one more node": replace(plan.devices, nodes=plan.devices.nodes + 1),
    }
    parts = []
    for name, devices in more.items():
        saved = 1 - plan.change(devices=devices).round_seconds / max(plan.round_seconds, 1e-9)
        parts.append(f"{name}: {f'{saved:.0%} shorter' if saved >= 0.005 else 'no shorter'}")
    return "; ".join(parts)


def _reason(plan: Plan, stage: StageEstimate) -> str:
    """Why a stage takes no less."""
    config, devices = plan.config, plan.devices
    if stage.stage == "style":
        return "it runs in the process of the run, on one GPU; style.rollouts bounds it"
    if stage.stage == "train":
        if stage.workers == devices.gpus:
            return "it trains on every GPU of its node" + ("; it cannot use other nodes" if devices.nodes > 1 else "")
        if config.train.parallel == "none":
            return "it trains on one GPU (train.parallel = none)"
        return f"it trains with {stage.workers} processes (train.processes) on the node of the run"
    if stage.stage in ("sample", "evaluate") and config.rollout.engine == "server":
        return "the server at rollout.server.url samples"
    workers = count_workers(config, plan.gpu, devices)
    if workers == 1:
        local = config.execution.workers == "local"
        return "one worker computes all shards" + (" (execution.workers = local)" if local else "")
    cause = stage.size or f"a shard has {STEER_SHARD_STATES:,} cached states"
    if stage.shards < workers:
        return f"{_count(stage.shards, 'shard')} for {workers} workers ({cause})"
    if stage.alone / stage.seconds < 0.9 * workers:
        return f"{stage.shards} shards cannot be divided evenly among {workers} workers ({cause})"
    return f"all {workers} workers compute, with {_count(stage.shards, 'shard')}"


def _changes(plan: Plan) -> Iterator[tuple[str, RunConfig]]:
    """Settings that may shorten the round: what each is, and the configuration with it."""
    config, devices = plan.config, plan.devices
    if config.execution.workers == "local":
        yield _change(config, "execution.workers", "ray")
    elif config.execution.worker_count:
        yield _change(config, "execution.worker_count", 0)
    if config.train.parallel == "none" and devices.gpus > 1:
        yield _change(config, "train.parallel", "ddp")
    elif 0 < config.train.processes < devices.gpus:
        yield _change(config, "train.processes", 0)
    workers = count_workers(config, plan.gpu, devices)
    for stage in plan.stages:
        if workers == 1 or not stage.size:
            continue
        section, name = stage.size.split(".")
        size = getattr(getattr(config, section), name)
        turns = -(-stage.shards // workers)
        smaller = -(-_items(config, stage.stage) // (workers * turns))
        if smaller < size and stage.stage != "steer":
            yield _change(config, stage.size, smaller)


def _items(config: RunConfig, stage: str) -> int:
    """What a stage divides into shards: completions, or groups."""
    if stage == "evaluate":
        problems = sum(b.limit or 500 for b in config.evaluate.benchmarks) + config.problems.holdout
        return problems * (config.evaluate.samples + 1)
    groups = config.problems.per_round
    return groups if stage == "teach" else groups * config.rollout.samples


def _change(config: RunConfig, setting: str, value: Any) -> tuple[str, RunConfig]:
    """The setting with its value, and the configuration with it."""
    section, name = setting.split(".")
    changed = getattr(config, section).model_copy(update={name: value})
    return f"{setting} = {value}", config.model_copy(update={section: changed})


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
