"""Continuations of a shared prefix equal full sequences, for every kind of attention that we support."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from ogls.errors import ModelError
from ogls.models.continuation import check_continuations, run_continuations

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
WINDOW = {"sliding_window": 8}
ALTERNATING = ["sliding_attention", "full_attention"] * 2
SUPPORTED = {
    "Qwen3": {},
    "Qwen2": {"use_sliding_window": True, "max_window_layers": 2, **WINDOW},
    "Llama": {},
    "Mistral": WINDOW,
    "Gemma3Text": {**WINDOW, "layer_types": ALTERNATING, "query_pre_attn_scalar": 8},
    "Phi3": {**WINDOW, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "GptOss": {**WINDOW, "layer_types": ALTERNATING, "num_local_experts": 4, "num_experts_per_tok": 2},
}
LINEAR = {
    "Qwen3Next": {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "Lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "Mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8},
}


class Body:
    """A small random model without its head."""

    device = torch.device("cpu")

    def __init__(self, name: str, overrides: dict[str, Any], dtype: torch.dtype = torch.float32):
        config = getattr(transformers, f"{name}Config")(**SMALL | overrides)
        torch.manual_seed(0)
        self.model = transformers.AutoModel.from_config(config, dtype=dtype).eval()
        for parameter in self.model.parameters():
            if parameter.ndim > 1:
                parameter.data.mul_(5)  # so that attention distinguishes tokens

    def run_body(self, ids: Any, mask: Any = None, **arguments: Any) -> Any:
        return self.model(input_ids=ids, attention_mask=mask, **arguments)


@pytest.mark.parametrize("name", SUPPORTED)
def test_continuations_equal_full_sequences(name: str) -> None:
    """Prefixes and continuations of several lengths, shorter and longer than the window."""
    body = Body(name, SUPPORTED[name])
    generator = torch.Generator().manual_seed(1)
    prefixes = [torch.randint(64, (n,), generator=generator).tolist() for n in (3, 25, 12)]
    rollouts = [torch.randint(64, (n,), generator=generator).tolist() for n in (1, 6, 30)]
    pairs = [(i, tokens) for i in range(3) for tokens in rollouts]
    with torch.inference_mode():
        for (i, tokens), states in zip(pairs, run_continuations(body, prefixes, pairs, 150), strict=True):
            ids = torch.tensor([[*prefixes[i], *tokens[:-1]]])
            full = body.run_body(ids, torch.ones_like(ids), use_cache=False).last_hidden_state[0]
            torch.testing.assert_close(states, full[len(prefixes[i]) - 1 :], atol=1e-4, rtol=1e-4)
    check_continuations(body, "float32", 64, name)


@pytest.mark.parametrize("name", ["Qwen3", "Mistral", "GptOss"])
def test_the_check_passes_in_bfloat16(name: str) -> None:
    check_continuations(Body(name, SUPPORTED[name], torch.bfloat16), "bfloat16", 64, name)


def test_a_layout_with_gaps_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefixes padded on the right leave a gap before the continuation, which a sliding window counts."""
    from ogls.models import continuation

    def right(rows: Any, device: Any, left: bool) -> Any:
        return original(rows, device, left=False)

    original = continuation._pad
    body = Body("Mistral", {"sliding_window": 4})
    check_continuations(body, "float32", 64, "m")
    monkeypatch.setattr(continuation, "_pad", right)
    with pytest.raises(ModelError, match=r"differ by .* of their norm from those of the whole sequence"):
        check_continuations(body, "float32", 64, "m")


@pytest.mark.parametrize("name", LINEAR)
def test_linear_attention_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match=r"its attention cache cannot be shared|differ by .* of their norm"):
        check_continuations(Body(name, LINEAR[name]), "float32", 64, name)
