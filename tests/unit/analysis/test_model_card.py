"""An exported model computes the same logits as base model and adapter, and its card documents its origin."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import torch
from conftest import REPO, carry_out, small_config
from typer.testing import CliRunner

from flows.cli import app
from ogls.analysis.model_card import export_model
from ogls.config import AdapterConfig, ModelConfig
from ogls.errors import ModelError, StoreError, UserError
from ogls.models.adapter import Adapter, adapter_files
from ogls.models.load import load_causal
from ogls.models.merge import merge
from ogls.models.policy import Policy
from ogls.stages.run import Run

IDS = torch.tensor([[5, 6, 7, 8, 30, 31]])


def logits(path: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(path)(input_ids=IDS).logits


def logits_of_round(run: Run, round_: int) -> torch.Tensor:
    policy = run.load_policy(round_)
    with torch.inference_mode():
        return policy.logits(policy.run_body(IDS).last_hidden_state)


def test_the_export_command_writes_the_policy_of_a_round(finished: Run, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    out = tmp_path / "merged"
    root = finished.store.root
    result = CliRunner().invoke(app, ["export", "tiny", str(out), "--round", "2", "--root", root])
    assert result.exit_code == 0, result.output
    torch.testing.assert_close(logits(out), logits_of_round(finished, 2), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(out), logits_of_round(finished, 0), atol=1e-3)
    assert AutoTokenizer.from_pretrained(out).chat_template
    card = (out / "README.md").read_text()
    for text in (f"Policy\n`{finished.policy_hash(2)}`", "base_model: data/tiny/model", finished.split_digest("train")):
        assert text in card
    assert card.count("| 2 | tiny |") == 1
    assert tomllib.loads(card.split("```toml\n")[1].split("```")[0])["name"] == "tiny"
    assert {p.suffix for p in out.iterdir()} <= {".json", ".safetensors", ".md", ".jinja"}
    with pytest.raises(UserError, match="already exists"):
        export_model(finished, 2, out)


def test_full_weights_and_the_base_model_are_exported(tmp_path: Path) -> None:
    run = carry_out(small_config(tmp_path, "name=full", "adapter.kind=full", "rounds=1", "train.learning_rate=1e-4"))
    for round_ in (0, 1):
        export_model(run, round_, tmp_path / str(round_))
        torch.testing.assert_close(logits(tmp_path / str(round_)), logits_of_round(run, round_), atol=1e-4, rtol=1e-4)
    with pytest.raises(StoreError, match="has not trained round 7"):
        export_model(run, 7, tmp_path / "7")
    assert not list(tmp_path.glob(".7*"))


def test_an_adapter_of_another_model_raises(finished: Run) -> None:
    adapter = finished.load_adapter(1)
    assert adapter
    state = load_causal(finished.config.model).state_dict()
    incomplete = {n: w for n, w in state.items() if "layers.2" not in n}
    with pytest.raises(
        ModelError, match=r"belongs to another model, which lacks \d+ of its weights, such as model\.layers\.2"
    ):
        merge(incomplete, adapter, finished.config.adapter)


def test_the_files_of_an_adapter_load_in_peft(finished: Run, tmp_path: Path) -> None:
    from peft import PeftModel

    adapter = finished.load_adapter(2)
    assert adapter
    for name, content in adapter_files(adapter, finished.config.model, finished.config.adapter).items():
        (tmp_path / name).write_bytes(content)
    model = PeftModel.from_pretrained(load_causal(finished.config.model), tmp_path)
    with torch.inference_mode():
        torch.testing.assert_close(model(input_ids=IDS).logits, logits_of_round(finished, 2), atol=1e-5, rtol=1e-5)


def test_merging_is_alpha_over_rank_b_a(policy: Policy) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {n: torch.randn(w.shape, generator=generator) for n, w in policy.initial_adapter().weights.items()}
    base = load_causal(ModelConfig(path=str(REPO / "data/tiny/model"))).state_dict()
    state = {n: torch.randn(w.shape, generator=generator) for n, w in base.items()}
    merged = merge(state, Adapter.from_weights(weights), AdapterConfig(rank=4, alpha=8))
    name = "model.layers.1.self_attn.q_proj.weight"
    a, b = (weights[f"base_model.model.{name.removesuffix('.weight')}.lora_{x}.weight"] for x in "AB")
    torch.testing.assert_close(merged[name], state[name] + 2 * b @ a)
    untouched = "model.embed_tokens.weight"
    assert merged[untouched] is state[untouched]
