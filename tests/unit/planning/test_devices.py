"""The estimate for several devices: which of them each stage uses, what bounds a round, and what more would bring."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from randommodel import QWEN3_1_7B, shaped

from ogls.config import RunConfig, build_config
from ogls.planning.advice import describe_bottleneck, describe_growth, list_changes
from ogls.planning.devices import Devices, count_training_ranks, count_workers, longest_worker
from ogls.planning.gpus import GIB, GPUS
from ogls.planning.plan import Plan, StageEstimate, estimate
from ogls.stages.shards import divide, divide_files
from ogls.store.manifest import FileEntry

H100 = GPUS["h100"]
RAY = ("execution.workers=ray", "rollout.engine=transformers")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shaped(tmp_path_factory.mktemp("shaped") / "model", **QWEN3_1_7B)


def configure(model: Path, *overrides: str) -> RunConfig:
    data = {"evaluate": {"benchmarks": [{"limit": 100}]}, "model": {"path": str(model), "dtype": "bfloat16"}}
    return build_config(data, overrides)


def plan_on(model: Path, devices: Devices, *overrides: str) -> Plan:
    return estimate(configure(model, *overrides), H100, 1000, devices=devices)


def stages_of(plan: Plan) -> dict[str, StageEstimate]:
    return {stage.stage: stage for stage in plan.stages}


@pytest.mark.parametrize(
    ("shards", "workers", "longest"),
    [([1.0] * 8, 1, 8), ([1.0] * 8, 4, 2), ([1.0] * 9, 4, 3), ([1.0], 4, 1), ([2, 2, 2, 2, 1], 4, 3), ([], 4, 0)],
)
def test_the_longest_worker_decides(shards: Sequence[float], workers: int, longest: float) -> None:
    assert longest_worker(shards, workers) == longest


def test_the_plan_has_the_shards_of_the_stages(model: Path) -> None:
    """As `stages.shards` divides them: completions by batch, groups, and files of cached states."""
    sizes = ("rollout.batch_size=100", "teacher.shard_groups=5", "evaluate.batch_size=64", "problems.per_round=32")
    stages = stages_of(plan_on(model, Devices(), *sizes))
    jobs = [False] * 400 + [True] * 100  # sampled and greedy completions of 100 problems
    assert stages["sample"].shards == len(divide(range(256), 100))
    assert stages["teach"].shards == len(divide(range(32), 5))
    assert stages["evaluate"].shards == len(divide(jobs, 64, by=lambda job: job))
    groups = [len(shard.items) for shard in divide(range(32), 5)]
    states = {f"part-{i}": count * 8 * 1000 * 3 for i, count in enumerate(groups)}  # samples, tokens, pools
    entries = [FileEntry(path, "teacher_states", 0, 0, "") for path in states]
    assert stages["steer"].shards == len(divide_files(entries, 2**18, lambda entry: states[entry.path]))
    assert stages["steer"].size == ""  # there are more files than shards


def test_workers_have_the_gpus_of_an_engine(model: Path) -> None:
    eight = Devices(4, 2)
    assert count_workers(configure(model), H100, eight) == 1  # execution.workers = local
    assert count_workers(configure(model, *RAY), H100, eight) == 8
    assert count_workers(configure(model, *RAY, "execution.worker_count=3"), H100, eight) == 3
    split = (*RAY, "rollout.engine=vllm", "rollout.vllm.tensor_parallel=3")
    assert count_workers(configure(model, *split), H100, eight) == 2
    plan = plan_on(model, eight, *split, "rollout.batch_size=32")
    stages = stages_of(plan)
    assert (stages["sample"].devices, stages["teach"].devices) == (6, 2)  # the teacher is not split
    assert any(w.startswith("2 of 8 GPUs compute no shards: workers have 3 GPUs each") for w in plan.warnings)
    few = plan_on(model, Devices(2), *split)
    assert any("a worker needs 3 GPUs of one node" in w and "--gpus 3" in w for w in few.warnings)
    whole = stages_of(plan_on(model, Devices(4), *RAY, "rollout.engine=vllm", "rollout.batch_size=32"))
    assert stages["sample"].alone < whole["sample"].alone  # one engine, on three GPUs and on one


def test_shards_bound_the_speed_up(model: Path) -> None:
    eight = Devices(4, 2)
    plan = plan_on(model, eight, *RAY, "rollout.batch_size=64", "teacher.shard_groups=8", "evaluate.base_kl=false")
    stages = stages_of(plan)
    sample, teach, style = stages["sample"], stages["teach"], stages["style"]
    assert (sample.shards, sample.workers, sample.devices) == (4, 4, 4)
    assert sample.alone / sample.seconds == pytest.approx(4)
    assert teach.alone / teach.seconds == pytest.approx(4)
    assert (style.workers, style.alone) == (1, style.seconds)
    uneven = stages_of(plan_on(model, eight, *RAY, "rollout.batch_size=28"))["sample"]  # 10 shards
    assert uneven.shards == 10
    assert uneven.alone / uneven.seconds == pytest.approx(5, rel=0.1)
    one = stages_of(plan_on(model, Devices(), *RAY, "rollout.batch_size=64"))["sample"]
    assert one.seconds == pytest.approx(sample.alone)


def test_small_shards_decode_less_at_once(model: Path) -> None:
    """16 shards of 16 completions read the weights more often than one of 256, unless they are decoded together."""
    for settings, together in (("rollout.engine=transformers",), False), (("rollout.engine=vllm",), True):
        whole, small = (
            stages_of(plan_on(model, Devices(), f"rollout.batch_size={n}", *settings))["sample"] for n in (256, 16)
        )
        assert (whole.shards, small.shards) == (1, 16)
        assert (small.seconds > 1.5 * whole.seconds) != together
        assert not together or small.seconds == pytest.approx(whole.seconds)


def test_training_uses_the_gpus_of_one_node(model: Path) -> None:
    eight = Devices(4, 2)
    alone, ddp, fsdp = (
        stages_of(plan_on(model, eight, f"train.parallel={kind}", "train.batch_rollouts=64"))["train"]
        for kind in ("none", "ddp", "fsdp")
    )
    assert [s.devices for s in (alone, ddp, fsdp)] == [1, 4, 4]
    assert alone.seconds == alone.alone == ddp.alone
    assert 3.5 < ddp.alone / ddp.seconds < 4  # the exchange of the gradients
    assert ddp.memory == alone.memory
    assert fsdp.memory < alone.memory - 2 * GIB  # of 2.8 GB of weights without embeddings, and 1.1 GB of AdamW's
    assert count_training_ranks(configure(model, "train.parallel=ddp", "train.processes=2"), H100, eight) == 2
    five = stages_of(plan_on(model, Devices(4), "train.parallel=ddp", "train.batch_rollouts=5"))["train"]
    assert five.alone / five.seconds < 2.6  # a step of 5 rollouts gives one of 4 processes two of them
    full = ("adapter.kind=full", "train.gradient_checkpointing=true")
    whole, split = (
        stages_of(plan_on(model, Devices(8), *full, f"train.parallel={kind}"))["train"].memory
        for kind in ("ddp", "fsdp")
    )
    assert split < whole / 2
    warned = plan_on(model, Devices(4), "train.parallel=ddp", "train.processes=6", "train.batch_rollouts=2").warnings
    assert any("train.processes = 6 fails, because a node has 4 GPUs" in w for w in warned)
    assert any("6 processes train on steps of train.batch_rollouts = 2" in w for w in warned)


def test_slow_links_bound_fsdp(model: Path) -> None:
    config = configure(model, "train.parallel=fsdp", "train.micro_batch_tokens=512", "train.batch_rollouts=16")
    near, far = (
        stages_of(estimate(config, GPUS[name], 1000, devices=Devices(4)))["train"] for name in ("h100", "l40s")
    )
    assert far.alone / far.seconds < 0.5 * near.alone / near.seconds


def test_idle_gpus_are_named(model: Path) -> None:
    plan = plan_on(model, Devices(4, 2))
    assert any("execution.workers = local" in w and "computed on 1 of 8 GPUs" in w for w in plan.warnings)
    assert {s.devices for s in plan.stages} == {1}
    assert not [w for w in plan_on(model, Devices()).warnings if "execution" in w]
    changes = list(list_changes(plan))
    assert changes[0].startswith("execution.workers = ray: a round of ")
    assert any(c.startswith("train.parallel = ddp: ") for c in changes)
    assert "one worker computes all shards (execution.workers = local)" in describe_bottleneck(plan)
    assert describe_growth(plan) == "one more GPU per node: no shorter; one more node: no shorter"


def test_the_bottleneck_has_a_reason_and_a_setting(model: Path) -> None:
    small = ("evaluate.every=1000", "style.rollouts=1", "train.parallel=ddp", "train.tokens=100")
    few = plan_on(model, Devices(4, 2), *RAY, *small, "rollout.max_tokens=8192", "rollout.batch_size=128")
    assert "of the round: 2 shards for 8 workers (rollout.batch_size)" in describe_bottleneck(few)
    (best, *_) = list_changes(few)
    assert best.startswith("rollout.batch_size = 32: a round of ")
    promised = few.change(configure(model, *RAY, *small, "rollout.max_tokens=8192", "rollout.batch_size=32"))
    assert f"{1 - promised.round_seconds / few.round_seconds:.0%} shorter" in best
    train = plan_on(model, Devices(4, 2), *RAY, "evaluate.every=1000", "train.epochs=20", "rollout.batch_size=16")
    assert "bottleneck: train" in describe_bottleneck(train)
    assert "it trains on one GPU (train.parallel = none)" in describe_bottleneck(train)
    nodes = train.change(configure(model, *RAY, "evaluate.every=1000", "train.epochs=50", "train.parallel=ddp"))
    assert "it trains on every GPU of its node; it cannot use other nodes" in describe_bottleneck(nodes)
    per_gpu, per_node = describe_growth(nodes).split("; ")
    assert per_gpu.startswith("one more GPU per node: ")
    assert per_gpu.endswith("% shorter")
    assert per_node in ("one more node: no shorter", "one more node: 1% shorter", "one more node: 2% shorter")


def test_a_server_decides_how_fast_it_samples(model: Path) -> None:
    plan = plan_on(model, Devices(4), *RAY, "rollout.engine=server", "rollout.batch_size=32")
    sample = stages_of(plan)["sample"]
    assert (sample.workers, sample.seconds) == (1, sample.alone)


@pytest.mark.parametrize(("dtype", "flops", "passes"), [("float32", 67e12, 0.3), ("bfloat16", 989e12 / 3, 1.5)])
def test_steering_and_style_are_priced_as_they_multiply(model: Path, dtype: str, flops: float, passes: float) -> None:
    """Three products with the head per steered token, and one more than there are signals per token of style.

    The passes over the logits add `passes` of the time of the products. A bfloat16 head is multiplied three times.
    """
    stages = stages_of(plan_on(model, Devices(), f"model.dtype={dtype}"))
    product = 2 * 151_936 * 2048 / (flops * 0.4)
    steered, measured = 256 * 1000, 64 * 1000
    assert 1 < stages["steer"].seconds / (3 * product * steered) < 1 + passes
    assert stages["style"].tokens == measured
    assert 1 < stages["style"].seconds / (4 * product * measured) < 1.5 + passes
    assert "style" not in stages_of(plan_on(model, Devices(), "style.enabled=false"))


def test_a_full_support_costs_a_product_more(model: Path) -> None:
    full, top_k = (stages_of(plan_on(model, Devices(), f"train.support={s}"))["train"] for s in ("full", "top_k"))
    assert full.seconds - top_k.seconds == pytest.approx(3 * 2 * 151_936 * 2048 / (989e12 * 0.4) * 256 * 1000)
    exact = stages_of(plan_on(model, Devices(), "model.dtype=float32"))["train"]
    assert exact.seconds == pytest.approx(top_k.seconds * 989 / 67)


def test_processes_on_a_cpu_share_it(model: Path) -> None:
    config = configure(model, "train.parallel=ddp", "train.processes=2")
    one, two = (stages_of(estimate(c, GPUS["cpu"], 100))["train"] for c in (configure(model), config))
    assert two.seconds == one.seconds
    assert two.memory == 2 * one.memory
    unset = estimate(configure(model, "train.parallel=fsdp"), GPUS["cpu"], 100)
    assert any("set train.processes to the number of processes" in w for w in unset.warnings)
