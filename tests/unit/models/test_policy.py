"""Policies: which models are refused, adapters that load in peft, and hashes of adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import REPO
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from ogls.config import AdapterConfig, ModelConfig
from ogls.errors import ModelError
from ogls.models.adapter import Adapter, adapter_files
from ogls.models.load import load_head, load_tokenizer
from ogls.models.policy import Policy, _check_head

MODEL = str(REPO / "data/tiny/model")
SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


def random_adapter(policy: Policy, seed: int = 0) -> Adapter:
    """An adapter with random weights in place of trained ones."""
    generator = torch.Generator().manual_seed(seed)
    return Adapter.from_weights(
        {n: 0.05 * torch.randn(p.shape, generator=generator) for n, p in policy.parameters.items()}
    )


def test_an_adapter_loads_in_plain_peft(policy: Policy, tmp_path: Path) -> None:
    from peft import PeftModel

    policy.use_adapter(random_adapter(policy))
    files = adapter_files(policy.copy_adapter(), ModelConfig(path=MODEL), AdapterConfig(rank=4, alpha=8))
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = policy.logits(policy.run_body(ids).last_hidden_state)
        policy.use_adapter(None)
        base = policy.logits(policy.run_body(ids).last_hidden_state)
        peft_model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL), str(tmp_path))
        actual = peft_model(input_ids=ids).logits
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    assert (actual - base).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_adapters_can_be_replaced_and_the_base_restored(kind: str) -> None:
    policy = Policy(ModelConfig(path=MODEL), AdapterConfig(kind=kind, rank=2))
    ids = torch.tensor([[5, 6, 7, 8]])

    def states() -> torch.Tensor:
        with torch.no_grad():
            return policy.run_body(ids).last_hidden_state

    base, adapter = states(), random_adapter(policy)
    policy.use_adapter(adapter)
    assert policy.hash == adapter.hash != "base"
    assert not torch.allclose(states(), base)
    files = adapter_files(policy.copy_adapter(), ModelConfig(path=MODEL), AdapterConfig(kind=kind, rank=2))
    parsed = Adapter.from_bytes(next(iter(files.values())))
    assert parsed.hash == adapter.hash
    policy.use_adapter(None)
    assert policy.hash == "base"
    assert torch.equal(states(), base)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_base_takes_the_place_of_the_adapter_within_a_block(kind: str) -> None:
    policy = Policy(ModelConfig(path=MODEL), AdapterConfig(kind=kind, rank=2))
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        base = policy.run_body(ids).last_hidden_state
        policy.use_adapter(random_adapter(policy))
        trained, trained_hash = policy.run_body(ids).last_hidden_state, policy.hash
        with policy.base_weights():
            assert policy.hash == "base"
            assert torch.equal(policy.run_body(ids).last_hidden_state, base)
        policy.move_to("cpu")
        assert policy.hash == trained_hash
        assert torch.equal(policy.run_body(ids).last_hidden_state, trained)
        assert policy.head.shape == policy.logits(trained).shape[-1:] + trained.shape[-1:]


def test_the_hash_depends_on_the_values(policy: Policy) -> None:
    one, other = random_adapter(policy), random_adapter(policy, seed=1)
    assert one.hash == random_adapter(policy).hash != other.hash
    name = next(iter(one.weights))
    changed = {**one.weights, name: one.weights[name] + 1e-6}
    assert Adapter.from_weights(changed).hash != one.hash


def test_an_average_of_adapters(policy: Policy) -> None:
    one, other = random_adapter(policy), random_adapter(policy, seed=1)
    mean = one.average(other, 0.25)
    for name, value in mean.weights.items():
        torch.testing.assert_close(value, 0.25 * one.weights[name] + 0.75 * other.weights[name])


def test_an_adapter_of_another_model_is_refused(policy: Policy) -> None:
    with pytest.raises(ModelError, match="names differ"):
        policy.use_adapter(Adapter.from_weights({"x": torch.zeros(1)}))
    wide = Policy(ModelConfig(path=MODEL), AdapterConfig(rank=8))
    with pytest.raises(ModelError, match=r"is \(8, 96\), not \(4, 96\)"):
        policy.use_adapter(wide.copy_adapter())


def test_heads_that_are_not_a_plain_matrix_are_refused() -> None:
    capped = Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=5.0, pad_token_id=0)).eval()
    with torch.no_grad():
        capped.lm_head.weight.mul_(100)
    with pytest.raises(ModelError, match="soft-caps its logits at 5"):
        _check_head(capped, "capped")
    biased = Qwen3ForCausalLM(Qwen3Config(**SMALL)).eval()
    biased.lm_head = torch.nn.Linear(16, 32, bias=True)
    with pytest.raises(ModelError, match="missing or has a bias"):
        _check_head(biased, "biased")
    plain = Qwen3ForCausalLM(Qwen3Config(**SMALL)).eval()
    assert _check_head(plain, "plain").shape == (32, 16)


@pytest.mark.parametrize("modules", [("lm_head",), ("q_proj", "embed_tokens")])
def test_training_the_head_or_embeddings_is_refused(modules: tuple) -> None:
    with pytest.raises(ModelError, match="cached states need an untrained head"):
        Policy(ModelConfig(path=MODEL), AdapterConfig(modules=modules))


def test_unknown_modules_are_refused() -> None:
    with pytest.raises(ModelError, match=r"adapter\.modules"):
        Policy(ModelConfig(path=MODEL), AdapterConfig(modules=("nothing_proj",)))


def test_models_that_cannot_be_loaded_are_refused(tmp_path: Path) -> None:
    for load in (load_tokenizer, load_head):
        with pytest.raises(ModelError, match="cannot load the model"):
            load(ModelConfig(path=str(tmp_path)))
    with pytest.raises(ModelError, match="cannot load the model no-such/model"):
        Policy(ModelConfig(path="no-such/model"), AdapterConfig())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is present")
def test_cuda_without_a_device_is_refused() -> None:
    with pytest.raises(ModelError, match=r"model\.device is cuda, but torch sees no CUDA device"):
        Policy(ModelConfig(path=MODEL, device="cuda"), AdapterConfig())


def test_loading_does_not_change_the_global_random_state() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = Policy(ModelConfig(path=MODEL), AdapterConfig(), seed=1).copy_adapter()
    assert torch.equal(torch.rand(3), expected)
    assert Policy(ModelConfig(path=MODEL), AdapterConfig(), seed=1).copy_adapter().hash == first.hash
    assert Policy(ModelConfig(path=MODEL), AdapterConfig(), seed=2).copy_adapter().hash != first.hash


def weights_of(policy: Policy) -> dict[str, torch.Tensor]:
    return {n: w.clone() for n, w in policy.model.state_dict().items()}


def test_merged_weights_give_the_same_logits_and_the_base_comes_back_bit_by_bit() -> None:
    policy = Policy(ModelConfig(path=MODEL), AdapterConfig(rank=4, alpha=8))
    policy.use_adapter(random_adapter(policy))
    before, ids = weights_of(policy), torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        apart = policy.logits(policy.run_body(ids).last_hidden_state)
        with policy.merged():
            changed = sum(not torch.equal(w, before[n]) for n, w in policy.model.state_dict().items())
            together = policy.logits(policy.run_body(ids).last_hidden_state)
    assert changed == len(policy.parameters) / 2  # one weight for each pair of A and B
    torch.testing.assert_close(together.log_softmax(-1), apart.log_softmax(-1), atol=1e-5, rtol=0)
    with pytest.raises(RuntimeError, match="interrupted"), policy.merged():
        raise RuntimeError("interrupted")
    assert all(torch.equal(w, before[n]) for n, w in weights_of(policy).items())
    with torch.inference_mode():
        assert torch.equal(policy.logits(policy.run_body(ids).last_hidden_state), apart)


@pytest.mark.parametrize("settings", [("bfloat16", "lora"), ("float32", "full")])
def test_weights_that_would_be_rounded_and_full_ones_are_not_merged(settings: tuple[str, str]) -> None:
    policy = Policy(ModelConfig(path=MODEL, dtype=settings[0]), AdapterConfig(kind=settings[1], rank=4))
    before = weights_of(policy)
    with policy.merged():
        assert all(torch.equal(w, before[n]) for n, w in weights_of(policy).items())
