"""Merging an adapter into the weights of the base model, for engines that reload weights and for export."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ogls.config import AdapterConfig, RunConfig
from ogls.errors import ModelError
from ogls.models.adapter import Adapter
from ogls.models.load import load_causal

if TYPE_CHECKING:
    from torch import Tensor


_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


def merged_weights(config: RunConfig, adapter: Adapter | None) -> dict[str, Tensor]:
    """The weights of the policy by name, on the CPU in the type of the model. None selects the base model."""
    state: dict[str, Tensor] = load_causal(config.model).state_dict()
    return merge(state, adapter, config.adapter) if adapter else state


def merge(state: Mapping[str, Tensor], adapter: Adapter, config: AdapterConfig) -> dict[str, Tensor]:
    """W + alpha / rank * B A in fp32 for every LoRA pair, or the weights of a full adapter.

    Raises ModelError if the adapter has a weight that the model does not have.
    """
    changed: dict[str, Tensor] = {}
    for name, weight in adapter.weights.items():
        if config.kind == "full":
            changed[name] = weight
        elif name.endswith(_A):
            target = name.removeprefix(_PREFIX).removesuffix(_A) + ".weight"
            if target in state:
                delta = adapter.weights[name.removesuffix(_A) + _B].float() @ weight.float()
                changed[target] = state[target].float() + config.alpha / config.rank * delta
            else:
                changed[target] = weight
    if unknown := sorted(set(changed) - set(state)):
        raise ModelError(
            f"the adapter belongs to another model, which lacks {len(unknown)} of its weights, such as {unknown[0]}"
        )
    return {n: changed[n].to(w.dtype) if n in changed else w for n, w in state.items()}


def save_weights(weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write the weights as one safetensors file in a folder. Tied weights (shared storage) are written once."""
    from safetensors.torch import save_file

    kept: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, weight in weights.items():
        if weight.data_ptr() not in seen:
            seen.add(weight.data_ptr())
            kept[name] = weight.detach().cpu().contiguous()
    save_file(kept, str(folder / "model.safetensors"), metadata={"format": "pt"})
