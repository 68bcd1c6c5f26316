"""`ogls plan` against what is measured and counted; `ogls doctor` names what ails."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import REPO, TINY, small_config
from measured import peak_bytes
from randommodel import QWEN3_1_7B, random_model, shaped
from typer.testing import CliRunner

from flows.cli import app
from flows.doctor import examine
from ogls.config import RunConfig, build_config, load_config
from ogls.distillation.exemplars import Context, ScoredRollout
from ogls.distillation.steering import steer_tokens
from ogls.distillation.teacher import score_rollouts
from ogls.errors import ModelError
from ogls.models.load import load_head
from ogls.models.policy import Policy
from ogls.models.shape import read_shape
from ogls.planning.gpus import GIB, GPUS
from ogls.planning.plan import estimate, training_bytes
from ogls.records import Request
from ogls.samplers.choose import create_sampler
from ogls.training.batching import TrainItem
from ogls.training.trainer import Trainer

VOCABULARY = 4_000


def config_of(model: Path, *overrides: str) -> RunConfig:
    data = {"evaluate": {"benchmarks": [{}]}, "model": {"path": str(model)}}
    return build_config(data, overrides)


def test_the_shape_is_counted_as_the_model_is(policy: Policy) -> None:
    config = small_config("x", "adapter.rank=4", "adapter.alpha=8")
    shape = read_shape(config)
    assert shape.trained == sum(p.numel() for p in policy.parameters.values())
    whole = sum(p.numel() for n, p in policy.model.named_parameters() if "lora" not in n)
    assert shape.parameters == whole
    assert shape.embedding == policy.head.numel()  # tied: counted once
    assert (shape.vocabulary, shape.hidden) == tuple(policy.head.shape)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("random") / "model", num_hidden_layers=4, vocab_size=VOCABULARY)


def drawn(count: int) -> tuple[int, ...]:
    return tuple(torch.randint(3, VOCABULARY, (count,)).tolist())


def near(planned: float, measured: float) -> None:
    assert 0.7 < planned / measured < 1.7, (planned / GIB, measured / GIB)


@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        ("float32", "gradient_checkpointing=false"),
        ("float32", "gradient_checkpointing=true"),
        ("float32", "support=full"),
        ("bfloat16", "gradient_checkpointing=false"),
        ("bfloat16", "gradient_checkpointing=true"),
    ],
)
def test_the_memory_of_training_is_near_a_measured_peak(model: Path, dtype: str, settings: str) -> None:
    """A step on a random model of Qwen3's shape: what torch has alive at its peak, beyond the model."""
    overrides = ("train.micro_batch_tokens=512", "train.head_tokens=256", "adapter.rank=16", f"train.{settings}")
    config = config_of(model, f"model.dtype={dtype}", *overrides)
    policy = Policy(config.model, config.adapter)
    items = []
    for i in range(4):
        top, ids = (
            torch.randn(224, 64).log_softmax(-1),
            torch.stack([torch.randperm(VOCABULARY)[:64] for _ in range(224)]),
        )
        item = TrainItem(("p", i), drawn(32), drawn(224), 224, 0, ids, top, torch.full((224,), 1e-3))
        whole = {"ids": None, "logprobs": None, "tail_mass": None, "state": torch.randn(224, 256)}
        items.append(replace(item, **whole) if config.train.support == "full" else item)
    trainer = Trainer(policy, config.train)
    near(training_bytes(config, read_shape(config)), peak_bytes(lambda: trainer.optimizer_step(items)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_memory_of_the_other_stages_is_near_a_measured_peak(model: Path, dtype: str) -> None:
    """A teacher pass that fills its batch, steering, and sampling, as the training step above."""
    settings = ("rollout.max_tokens=64", "train.tokens=64", "teacher.batch_tokens=2048", "teacher.shard_groups=1")
    sizes = ("rollout.batch_size=16", "steer.batch_tokens=256", "rollout.engine=transformers")
    config = config_of(model, f"model.dtype={dtype}", *settings, *sizes)
    policy = Policy(config.model, config.adapter)
    found = estimate(config, GPUS["cpu"], length=64, prompt=32)
    planned = {n.stage: n.memory for n in found.needs}
    weights = found.shape.parameters * (4 if dtype == "float32" else 2)

    contexts, rollouts = [Context("teacher", drawn(250)) for _ in range(8)], [drawn(64) for _ in range(8)]
    pools = {"correct": contexts[:4], "incorrect": contexts[4:]}
    scored = [
        ScoredRollout(("p", j), pool, rollouts[j], tuple((c, 1 / 3) for c in read if c is not contexts[j])[:3], ())
        for pool, read in pools.items()
        for j in range(8)
    ]
    near(planned["teach"] - weights, peak_bytes(lambda: score_rollouts(policy, scored, config.teacher.batch_tokens)))

    states = {pool: torch.randn(256, 256) for pool in ("base", "correct", "incorrect")}
    ids, recipe = torch.zeros(256, dtype=torch.long), config.steer.to_recipe()
    near(planned["steer"], peak_bytes(lambda: steer_tokens(states, ids, recipe, load_head(config.model), 64, 256)))

    requests = [Request("p", i, drawn(32), i) for i in range(16)]
    sampler = create_sampler("transformers", policy)
    near(planned["sample"] - weights, peak_bytes(lambda: sampler.sample(requests, config.rollout)))


def test_what_does_not_fit_is_said_with_what_to_change(tmp_path: Path) -> None:
    model = shaped(tmp_path / "model", **QWEN3_1_7B | {"max_position_embeddings": 4096})
    config = config_of(model, "model.dtype=bfloat16", "rollout.max_tokens=2048", "train.micro_batch_tokens=65536")
    found = estimate(config, GPUS["rtx4090"])
    told = "\n".join(found.warnings)
    assert "train needs " in told
    assert "lower train.micro_batch_tokens and set train.gradient_checkpointing" in told
    assert "8,192 tokens to sample do not fit a context of 4,096" in told  # evaluate.max_tokens
    lean = config_of(
        model, "model.dtype=bfloat16", "train.micro_batch_tokens=4096", "train.gradient_checkpointing=true"
    )
    needs = {n.stage: n for n in estimate(lean, GPUS["rtx4090"]).needs}
    assert needs["train"].memory < 24 * GIB
    faster = {n.stage: n.seconds for n in estimate(lean, GPUS["h100"]).needs}
    assert all(faster[stage] < need.seconds for stage, need in needs.items())
    assert 1.2e9 < found.shape.parameters < 2.2e9
    states = 32 * 8 * min(2048 // 3, 1024) * 3 * 2048 * 2
    assert found.disk["teacher_states"] == pytest.approx(states)


def test_an_engine_that_lets_completions_wait_takes_its_share(tmp_path: Path) -> None:
    """vLLM samples as many at once as its share of the GPU holds: a large batch costs time there, not memory."""
    model = shaped(tmp_path / "model", **QWEN3_1_7B)
    long = ("model.dtype=bfloat16", "rollout.max_tokens=8192", "rollout.batch_size=512", "evaluate.max_tokens=8192")
    cards = GPUS["rtx4090"], GPUS["h100"]
    queued, more = (estimate(config_of(model, *long, "rollout.engine=auto"), gpu) for gpu in cards)
    needs = {n.stage: n for n in queued.needs}
    assert needs["sample"].memory == 0.85 * 24 * GIB
    assert not [w for w in queued.warnings if "sample" in w or "completion" in w]
    assert more.needs[0].seconds < needs["sample"].seconds
    (own,) = [w for w in estimate(config_of(model, *long), cards[0]).warnings if w.startswith("sample")]
    assert "lower rollout.batch_size" in own  # the transformers engine holds the whole batch
    tight = estimate(config_of(model, *long, "rollout.engine=vllm", "rollout.vllm.gpu_memory=0.16"), cards[0])
    assert any(w.startswith("one completion of 8,192 tokens and the weights are 4.1 GiB") for w in tight.warnings)
    assert estimate(config_of(model, *long, "rollout.engine=server"), cards[0]).needs[0].memory == 0
    seldom = estimate(config_of(model, *long, "rollout.engine=auto", "evaluate.every=10"), cards[0])
    assert {n.stage: n for n in seldom.needs}["evaluate"].seconds == pytest.approx(needs["evaluate"].seconds / 10)


def test_the_command_and_its_mistakes() -> None:
    done = CliRunner().invoke(app, ["plan", str(TINY), "--gpu", "cpu"])
    assert done.exit_code == 0, done.output
    for word in ("sample", "teach", "train", "evaluate", "parameters", "a round on cpu"):
        assert word in done.output
    wrong = CliRunner().invoke(app, ["plan", str(TINY), "--gpu", "tpu"])
    assert "no machine tpu; there are rtx4090" in str(wrong.exception)
    with pytest.raises(ModelError, match="cannot read the configuration of no/such"):
        read_shape(load_config(TINY, ["model.path=no/such"]))


def test_the_doctor_finds_what_is_well_and_what_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    well = {f.what: f for f in examine(small_config(tmp_path))}
    assert {f.verdict for f in well.values()} <= {"ok", "note"}
    assert well["engine"].said == "transformers"
    assert "stops at '<|im_end|>'" in well["model"].said
    assert list(tmp_path.iterdir()) == []  # its mark is gone
    blocked = tmp_path / "file"
    blocked.write_text("")
    ill = (
        f"root={blocked}/store",
        "model.device=cuda",
        "problems.source=nowhere.jsonl",
        "rollout.max_tokens=512",
        "tracking.enabled=true",
        "tracking.uri=http://127.0.0.1:9",
    )
    listed = examine(small_config(tmp_path, *ill))
    assert "nowhere.jsonl is not there" in [f.said for f in listed]
    found = {f.what: f for f in listed}
    assert "a file stands where a folder is needed" in found["store"].said
    assert "torch sees no CUDA device" in found["device"].said
    assert "do not fit 512: lower max_tokens" in found["max_tokens"].said
    assert found["tracking"].verdict == "note"
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    command = [sys.executable, "-m", "flows.cli", "doctor", str(TINY)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no answer at http://127.0.0.1:9/api: start it, or unset PREFECT_API_URL" in done.stdout
