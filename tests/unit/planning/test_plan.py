"""`ogls plan` compared with measurements; `ogls doctor` reports problems of the installation and the configuration."""

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
from ogls.distillation.style import measure_shifts, signal_recipes
from ogls.distillation.teacher import rollout_logprobs, score_rollouts
from ogls.errors import ModelError
from ogls.models.load import load_head
from ogls.models.policy import Policy
from ogls.models.shape import read_shape
from ogls.planning.gpus import GIB, GPUS
from ogls.planning.memory import logit_bytes, scoring_bytes, training_bytes
from ogls.planning.plan import estimate
from ogls.records import Request
from ogls.samplers.choose import create_sampler
from ogls.samplers.draw import sample_tokens
from ogls.training.batching import TrainItem
from ogls.training.trainer import Trainer

VOCABULARY = 4_000


def config_for(model: Path, *overrides: str) -> RunConfig:
    data = {"evaluate": {"benchmarks": [{}]}, "model": {"path": str(model)}}
    return build_config(data, overrides)


def test_the_shape_matches_the_loaded_model(policy: Policy) -> None:
    config = small_config("x", "adapter.rank=4", "adapter.alpha=8")
    shape = read_shape(config)
    assert shape.trained == sum(p.numel() for p in policy.parameters.values())
    parameters = sum(p.numel() for n, p in policy.model.named_parameters() if "lora" not in n)
    assert shape.parameters == parameters
    assert shape.embedding == policy.head.numel()  # tied: counted once
    assert (shape.vocabulary, shape.hidden) == tuple(policy.head.shape)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("random") / "model", num_hidden_layers=4, vocab_size=VOCABULARY)


def random_ids(count: int) -> tuple[int, ...]:
    return tuple(torch.randint(3, VOCABULARY, (count,)).tolist())


def assert_near(planned: float, measured: float) -> None:
    assert 0.7 < planned / measured < 1.7, (planned / GIB, measured / GIB)


@pytest.mark.parametrize(
    ("dtype", "setting"),
    [
        ("float32", "gradient_checkpointing=false"),
        ("float32", "gradient_checkpointing=true"),
        ("float32", "support=full"),
        pytest.param("bfloat16", "gradient_checkpointing=false", marks=pytest.mark.nightly),
        ("bfloat16", "gradient_checkpointing=true"),
    ],
)
def test_the_memory_of_training_is_near_a_measured_peak(model: Path, dtype: str, setting: str) -> None:
    """One optimizer step on a random Qwen3-shaped model: the peak of torch's allocated memory, without the model."""
    overrides = ("train.micro_batch_tokens=512", "train.head_tokens=256", "adapter.rank=16", f"train.{setting}")
    config = config_for(model, f"model.dtype={dtype}", *overrides)
    policy = Policy(config.model, config.adapter)
    items = []
    for i in range(4):
        logprobs, ids = (
            torch.randn(224, 64).log_softmax(-1),
            torch.stack([torch.randperm(VOCABULARY)[:64] for _ in range(224)]),
        )
        item = TrainItem(("p", i), random_ids(32), random_ids(224), 224, 0, ids, logprobs, torch.full((224,), 1e-3))
        full_target = {"ids": None, "logprobs": None, "tail_mass": None, "state": torch.randn(224, 256)}
        items.append(replace(item, **full_target) if config.train.support == "full" else item)
    trainer = Trainer(policy, config.train)
    assert_near(training_bytes(config, read_shape(config)), peak_bytes(lambda: trainer.optimizer_step(items)))


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.nightly)])
def test_the_memory_of_the_other_stages_is_near_a_measured_peak(model: Path, dtype: str) -> None:
    """The peak of torch's allocated memory in a teacher pass with a full batch, in steering and in sampling."""
    settings = ("rollout.max_tokens=64", "train.tokens=64", "teacher.batch_tokens=2048", "teacher.shard_groups=1")
    sizes = ("rollout.batch_size=16", "steer.batch_tokens=256", "rollout.engine=transformers", "evaluate.max_tokens=64")
    config = config_for(model, f"model.dtype={dtype}", *settings, *sizes)
    policy = Policy(config.model, config.adapter)
    plan = estimate(config, GPUS["cpu"], rollout_tokens=64, prompt_tokens=32)
    planned = {s.stage: s.memory for s in plan.stages}
    weights = plan.shape.parameters * (4 if dtype == "float32" else 2)

    contexts, rollouts = [Context("frozen", random_ids(250)) for _ in range(8)], [random_ids(64) for _ in range(8)]
    pools = {"correct": contexts[:4], "incorrect": contexts[4:]}
    scored = [
        ScoredRollout(
            ("p", j), pool, rollouts[j], tuple((c, 1 / 3) for c in pool_contexts if c is not contexts[j])[:3], ()
        )
        for pool, pool_contexts in pools.items()
        for j in range(8)
    ]
    assert_near(
        planned["teach"] - weights, peak_bytes(lambda: score_rollouts(policy, scored, config.teacher.batch_tokens))
    )

    states = {pool: torch.randn(256, 256) for pool in ("base", "correct", "incorrect")}
    ids, recipe = torch.zeros(256, dtype=torch.long), config.steer.to_recipe()
    assert_near(
        planned["steer"], peak_bytes(lambda: steer_tokens(states, ids, recipe, load_head(config.model), 64, 256))
    )

    classes = torch.arange(VOCABULARY) % 2
    recipes = signal_recipes(tuple(states), recipe)
    one_rollout = {pool: pool_states[:64] for pool, pool_states in states.items()}
    head = load_head(config.model)
    measured = peak_bytes(lambda: measure_shifts(one_rollout, recipes, classes, head, 256))
    assert_near(planned["style"] - head.nbytes, measured)

    requests = [Request("p", i, random_ids(32), i) for i in range(16)]
    sampler = create_sampler("transformers", policy)
    assert_near(planned["sample"] - weights, peak_bytes(lambda: sampler.sample(requests, config.rollout)))

    prompts, batch = [random_ids(250) for _ in range(8)] * 3, config.teacher.batch_tokens
    measured = peak_bytes(lambda: rollout_logprobs(policy, prompts, [random_ids(64) for _ in prompts], batch))
    assert_near(scoring_bytes(config, plan.shape), measured)


@pytest.mark.parametrize("cut", ["", "top_k=20", "top_p=0.9"])
@pytest.mark.parametrize("vocabulary", [VOCABULARY, 20_000])
def test_the_memory_of_drawing_a_token_is_near_a_measured_peak(model: Path, vocabulary: int, cut: str) -> None:
    """Of a vocabulary wider than samplers.draw.WIDE, too, where no cut is computed in fp64 over all of it."""
    overrides = [f"rollout.{cut}"] if cut else []
    sampling = config_for(model, "rollout.batch_size=64", *overrides).rollout
    shape = replace(read_shape(config_for(model)), vocabulary=vocabulary)
    states, head = torch.randn(64, 256), torch.randn(vocabulary, 256) / 3
    uniform = torch.rand(64, dtype=torch.float64)

    def draw() -> object:
        logits = states @ head.T
        token = sample_tokens(logits, uniform, 1.0, sampling.top_k, sampling.top_p)
        return logits.gather(1, token[:, None])[:, 0] - logits.logsumexp(1)

    assert_near(logit_bytes(config_for(model), sampling, shape, GPUS["cpu"]), peak_bytes(draw))


@pytest.mark.parametrize("engine", ["transformers", "vllm", "server"])
def test_the_pass_of_the_base_model_is_part_of_the_evaluation(tmp_path: Path, engine: str) -> None:
    model = shaped(tmp_path / "model", **QWEN3_1_7B)
    settings = (f"rollout.engine={engine}", "model.dtype=bfloat16", "evaluate.batch_size=1", "evaluate.max_tokens=256")
    without, with_base = (
        estimate(config_for(model, *settings, f"evaluate.base_kl={on}"), GPUS["rtx4090"]) for on in ("false", "true")
    )
    before, after = without.stages[-1], with_base.stages[-1]
    assert before.stage == "evaluate"
    assert after.seconds > before.seconds
    assert after.memory > max(before.memory, with_base.shape.parameters * 2)
    assert (before.setting, after.setting) == ("evaluate.batch_size", "teacher.batch_tokens")
    config = config_for(model, *settings, "teacher.batch_tokens=2000000")
    assert "evaluate needs " in (text := "\n".join(estimate(config, GPUS["rtx4090"]).warnings))
    assert "lower teacher.batch_tokens" in text


def test_warnings_name_the_setting_to_change(tmp_path: Path) -> None:
    model = shaped(tmp_path / "model", **QWEN3_1_7B | {"max_position_embeddings": 4096})
    config = config_for(model, "model.dtype=bfloat16", "rollout.max_tokens=2048", "train.micro_batch_tokens=65536")
    plan = estimate(config, GPUS["rtx4090"])
    warnings = "\n".join(plan.warnings)
    assert "train needs " in warnings
    assert "lower train.micro_batch_tokens and set train.gradient_checkpointing" in warnings
    assert "completions of 8,192 tokens do not fit in the model's context of 4,096" in warnings  # evaluate.max_tokens
    small = config_for(
        model, "model.dtype=bfloat16", "train.micro_batch_tokens=4096", "train.gradient_checkpointing=true"
    )
    stages = {s.stage: s for s in estimate(small, GPUS["rtx4090"]).stages}
    assert stages["train"].memory < 24 * GIB
    h100_seconds = {s.stage: s.seconds for s in estimate(small, GPUS["h100"]).stages}
    fp32 = {"steer", "style"}  # in which an RTX 4090 is as fast as an H100
    assert fp32 < {name for name, stage in stages.items() if h100_seconds[name] < 2 * stage.seconds}
    assert all(h100_seconds[name] < stage.seconds for name, stage in stages.items() if name not in fp32)
    assert 1.2e9 < plan.shape.parameters < 2.2e9
    states = 32 * 8 * min(2048 // 3, 1024) * 3 * 2048 * 2
    assert plan.disk["teacher_states"] == pytest.approx(states)


def test_vllm_uses_its_share_of_memory_and_queues_completions(tmp_path: Path) -> None:
    """vLLM runs as many sequences at once as fit in its share of the GPU: a large batch costs time, not memory."""
    model = shaped(tmp_path / "model", **QWEN3_1_7B)
    long_rollouts = (
        "model.dtype=bfloat16",
        "rollout.max_tokens=8192",
        "rollout.batch_size=512",
        "evaluate.max_tokens=8192",
    )
    rtx4090, h100 = GPUS["rtx4090"], GPUS["h100"]
    on_rtx4090, on_h100 = (
        estimate(config_for(model, *long_rollouts, "rollout.engine=auto"), gpu) for gpu in (rtx4090, h100)
    )
    stages = {s.stage: s for s in on_rtx4090.stages}
    assert stages["sample"].memory == 0.85 * 24 * GIB
    assert not [w for w in on_rtx4090.warnings if "sample" in w or "completion" in w]
    assert on_h100.stages[0].seconds < stages["sample"].seconds
    (warning,) = [w for w in estimate(config_for(model, *long_rollouts), rtx4090).warnings if w.startswith("sample")]
    assert "lower rollout.batch_size" in warning  # the transformers engine keeps the whole batch in memory
    small_share = estimate(
        config_for(model, *long_rollouts, "rollout.engine=vllm", "rollout.vllm.gpu_memory=0.16"), rtx4090
    )
    message = "the weights and one completion of 8,192 tokens need 4.1 GiB"
    assert any(w.startswith(message) for w in small_share.warnings)
    assert estimate(config_for(model, *long_rollouts, "rollout.engine=server"), rtx4090).stages[0].memory == 0
    every_tenth = estimate(config_for(model, *long_rollouts, "rollout.engine=auto", "evaluate.every=10"), rtx4090)
    seconds = {s.stage: s.seconds for s in every_tenth.stages}
    assert seconds["evaluate"] == pytest.approx(stages["evaluate"].seconds / 10)


def test_the_plan_command_and_its_errors() -> None:
    result = CliRunner().invoke(app, ["plan", str(TINY), "--gpu", "cpu"])
    assert result.exit_code == 0, result.output
    for word in ("sample", "teach", "style", "train", "evaluate", "parameters", "a round on cpu"):
        assert word in result.output
    several = CliRunner().invoke(app, ["plan", str(TINY), "--gpus", "4", "--nodes", "2"])
    assert several.exit_code == 0, several.output
    for text in ("a round on 2 nodes with 4 h100 each", "bottleneck: evaluate", "one more GPU per node: no shorter"):
        assert text in several.output
    assert "set execution.workers = ray" in several.output
    cpus = CliRunner().invoke(app, ["plan", str(TINY), "--gpus", "4", "--gpu", "cpu"])
    assert "--gpus and --nodes count GPUs, but --gpu is cpu; known GPUs: rtx4090" in str(cpus.exception)
    unknown = CliRunner().invoke(app, ["plan", str(TINY), "--gpu", "tpu"])
    assert "unknown machine tpu; known machines: rtx4090" in str(unknown.exception)
    with pytest.raises(ModelError, match="cannot read the configuration of no/such"):
        read_shape(load_config(TINY, ["model.path=no/such"]))


def test_the_doctor_checks_the_processes_that_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def training(*overrides: str) -> list[tuple[str, str, str]]:
        config = small_config(tmp_path, "model.device=cpu", "train.batch_rollouts=4", *overrides)
        found = examine(config)
        start = [f.name for f in found].index("training")
        return [tuple(f) for f in found[start:] if f.name in ("training", "gloo", "nccl")]

    assert training() == [("training", "ok", "one process (train.parallel = none)")]
    two = training("train.parallel=ddp", "train.processes=2")
    assert two[0] == ("training", "ok", "ddp: 2 processes on the CPU, which they share")
    assert [f[:2] for f in two[1:]] == [("gloo", "ok")]
    (unset,) = training("train.parallel=fsdp")
    assert unset[1] == "wrong"
    assert "set train.processes to the number of processes" in unset[2]
    (many,) = training("train.parallel=ddp", "train.processes=6")
    assert "2 of them have no work: lower train.processes" in many[2]
    monkeypatch.setattr(torch.distributed, "is_backend_available", lambda name: False)
    assert training("train.parallel=ddp", "train.processes=2")[1][:2] == ("gloo", "wrong")


def test_the_doctor_reports_what_works_and_what_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    healthy = {f.name: f for f in examine(small_config(tmp_path))}
    assert {f.verdict for f in healthy.values()} <= {"ok", "note"}
    assert healthy["engine"].message == "transformers"
    assert "stops at '<|im_end|>'" in healthy["model"].message
    assert list(tmp_path.iterdir()) == []  # the file of the write test is removed
    blocked = tmp_path / "file"
    blocked.write_text("")
    overrides = (
        f"root={blocked}/store",
        "model.device=cuda",
        "problems.source=nowhere.jsonl",
        "rollout.max_tokens=512",
        "tracking.enabled=true",
        "tracking.uri=http://127.0.0.1:9",
    )
    all_findings = examine(small_config(tmp_path, *overrides))
    assert "nowhere.jsonl does not exist" in [f.message for f in all_findings]
    findings = {f.name: f for f in all_findings}
    assert "there is a file where a folder is needed" in findings["store"].message
    assert "torch sees no CUDA device" in findings["device"].message
    assert "exceed the context of 512: lower max_tokens" in findings["max_tokens"].message
    assert findings["tracking"].verdict == "note"
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    command = [sys.executable, "-m", "flows.cli", "doctor", str(TINY)]
    result = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "no response from http://127.0.0.1:9/api: start it, or unset PREFECT_API_URL" in result.stdout
