"""`ogls plan` against what is measured and counted; `ogls doctor` names what ails."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO, TINY, small_config
from typer.testing import CliRunner

from flows.cli import app
from flows.doctor import examine
from ogls.config import RunConfig
from ogls.configfile import build_config, load_config
from ogls.errors import ModelError
from ogls.plan import GIB, GPUS, plan, shape_of, training_bytes
from ogls.policy import Policy


def qwen(folder: Path, layers: int = 6, hidden: int = 256, vocabulary: int = 32_000) -> Path:
    """A configuration of Qwen3's shape, with the tiny world's tokenizer: no weights."""
    shutil.copytree(REPO / "data" / "tiny" / "model", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": 3 * hidden, "head_dim": 32}
    config |= {"vocab_size": vocabulary, "num_attention_heads": 8, "num_key_value_heads": 4}
    config |= {"layer_types": ["full_attention"] * layers, "max_position_embeddings": 4096}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def config_of(model: Path, *overrides: str) -> RunConfig:
    data = {"evaluate": {"benchmarks": [{}]}, "model": {"path": str(model)}}
    return build_config(data, overrides)


def test_the_shape_is_counted_as_the_model_is(policy: Policy) -> None:
    config = small_config("x", "adapter.rank=4", "adapter.alpha=8")
    shape = shape_of(config)
    assert shape.trained == sum(p.numel() for p in policy.parameters.values())
    whole = sum(p.numel() for n, p in policy.model.named_parameters() if "lora" not in n)
    assert shape.parameters == whole
    assert shape.embedding == policy.head.numel()  # tied: counted once
    assert (shape.vocabulary, shape.hidden) == tuple(policy.head.shape)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_the_memory_of_training_is_near_a_measured_peak(tmp_path: Path, checkpointing: str) -> None:
    """A step on a random model of 32k tokens' vocabulary, in a process of its own; its peak less what it had before."""
    model = qwen(tmp_path / "model")
    overrides = ("train.micro_batch_tokens=4096", "train.head_tokens=512", "adapter.rank=16")
    overrides += (f"train.gradient_checkpointing={checkpointing}",)
    config = config_of(model, *overrides)
    code = f"""
import json, resource, torch
from transformers import AutoConfig, AutoModelForCausalLM
AutoModelForCausalLM.from_config(AutoConfig.from_pretrained({str(model)!r})).save_pretrained({str(model)!r})
from ogls.batching import TrainItem
from ogls.configfile import build_config
from ogls.policy import Policy
from ogls.train import Trainer
data = {{"evaluate": {{"benchmarks": [{{}}]}}, "model": {{"path": {str(model)!r}}}}}
config = build_config(data, {list(overrides)!r})
policy = Policy(config.model, config.adapter)
trainer = Trainer(policy, config.train)
items = []
for i in range(16):
    tokens = tuple(torch.randint(3, 32000, (256,)).tolist())
    top = torch.randn(224, 64).log_softmax(-1)
    ids = torch.stack([torch.randperm(32000)[:64] for _ in range(224)])
    items.append(TrainItem(("p", i), tokens[:32], tokens[32:], 224, 0, ids, top, torch.full((224,), 1e-3)))
trainer.update(items[:1])  # torch's own buffers
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
trainer.update(items)
print(json.dumps((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    measured = json.loads(done.stdout.splitlines()[-1])
    planned = training_bytes(config, shape_of(config))
    assert 0.6 < planned / measured < 1.7, (planned / GIB, measured / GIB)


def test_what_does_not_fit_is_said_with_what_to_change(tmp_path: Path) -> None:
    model = qwen(tmp_path / "model", layers=28, hidden=2048, vocabulary=151_936)
    config = config_of(model, "model.dtype=bfloat16", "rollout.max_tokens=2048", "train.micro_batch_tokens=65536")
    found = plan(config, GPUS["rtx4090"])
    told = "\n".join(found.warnings)
    assert "train needs " in told
    assert "lower train.micro_batch_tokens and set train.gradient_checkpointing" in told
    assert "8,192 tokens to sample do not fit a context of 4,096" in told  # evaluate.max_tokens
    lean = config_of(
        model, "model.dtype=bfloat16", "train.micro_batch_tokens=4096", "train.gradient_checkpointing=true"
    )
    needs = {n.stage: n for n in plan(lean, GPUS["rtx4090"]).needs}
    assert needs["train"].memory < 24 * GIB
    faster = {n.stage: n.seconds for n in plan(lean, GPUS["h100"]).needs}
    assert all(faster[stage] < need.seconds for stage, need in needs.items())
    assert 1.2e9 < found.shape.parameters < 2.2e9
    states = 32 * 8 * min(2048 // 3, 1024) * 3 * 2048 * 2
    assert found.disk["teacher_states"] == pytest.approx(states)


def test_the_command_and_its_mistakes() -> None:
    done = CliRunner().invoke(app, ["plan", str(TINY), "--gpu", "cpu"])
    assert done.exit_code == 0, done.output
    for word in ("sample", "teach", "train", "evaluate", "parameters", "a round on cpu"):
        assert word in done.output
    wrong = CliRunner().invoke(app, ["plan", str(TINY), "--gpu", "tpu"])
    assert "no machine tpu; there are rtx4090" in str(wrong.exception)
    with pytest.raises(ModelError, match="cannot read the configuration of no/such"):
        shape_of(load_config(TINY, ["model.path=no/such"]))


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
