"""An adapter merged into the base model's weights: for engines that reload them, and for export. No peft is needed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ogls.config import AdapterConfig, RunConfig
from ogls.errors import ModelError
from ogls.policy import WEIGHTS, Adapter, load_causal

if TYPE_CHECKING:
    from torch import Tensor

_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


def merged_weights(config: RunConfig, adapter: Adapter | None) -> dict[str, Tensor]:
    """The weights of the policy by name, on the CPU in the model's type; None: the base model's."""
    state: dict[str, Tensor] = load_causal(config.model).state_dict()
    return merge(state, adapter, config.adapter) if adapter else state


def merge(state: Mapping[str, Tensor], adapter: Adapter, config: AdapterConfig) -> dict[str, Tensor]:
    """W + alpha / rank * B A in fp32 for every LoRA pair, or the weights of a full adapter in place of the base's.

    Raises ModelError if the adapter names a weight that the model does not have.
    """
    changed: dict[str, Tensor] = {}
    for name, weight in adapter.weights.items():
        if config.kind == "full":
            changed[name] = weight
        elif name.endswith(_A):
            target = name.removeprefix(_PREFIX).removesuffix(_A) + ".weight"
            if target in state:
                low = adapter.weights[name.removesuffix(_A) + _B].float() @ weight.float()
                changed[target] = state[target].float() + config.alpha / config.rank * low
            else:
                changed[target] = weight
    if unknown := sorted(set(changed) - set(state)):
        raise ModelError(f"the adapter is of another model: {len(unknown)} weights such as {unknown[0]} are not in it")
    return {n: changed[n].to(w.dtype) if n in changed else w for n, w in state.items()}


def check_about(about: Mapping[str, Any], config: RunConfig) -> None:
    """Raise ModelError where an adapter_config.json is not of an adapter that this configuration goes on with.

    A base is known by the last part of its name, so that a model's id and a copy of it in a folder are one.
    """
    base, model = about.get("base_model_name_or_path") or "", config.model.path
    if base and Path(base).name != Path(model).name:
        raise ModelError(
            f"adapter.start: {config.adapter.start} was trained on {base}, and model.path is {model}; name the same "
            "model, or, if they are one, say so in base_model_name_or_path of its adapter_config.json"
        )
    for key, setting in (("r", "rank"), ("lora_alpha", "alpha")):
        found, wanted = about.get(key), getattr(config.adapter, setting)
        if found is not None and found != wanted:
            raise ModelError(f"adapter.start: {config.adapter.start} has {key} = {found}: set adapter.{setting} to it")


def save_weights(weights: Mapping[str, Tensor], folder: Path) -> None:
    """One safetensors file in a folder. Weights that are one and the same (tied embeddings) are written once."""
    from safetensors.torch import save_file

    kept: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, weight in weights.items():
        if weight.data_ptr() not in seen:
            seen.add(weight.data_ptr())
            kept[name] = weight.detach().cpu().contiguous()
    save_file(kept, str(folder / "model.safetensors"), metadata={"format": "pt"})


def adapter_files(adapter: Adapter, config: RunConfig) -> dict[str, bytes]:
    """A LoRA adapter as the two files that peft and vLLM load."""
    from safetensors.torch import save

    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.model.path,
        "r": config.adapter.rank,
        "lora_alpha": config.adapter.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(config.adapter.modules),
        "inference_mode": True,
    }
    return {
        WEIGHTS["lora"]: save(dict(adapter.weights), metadata={"format": "pt"}),
        "adapter_config.json": json.dumps(about, indent=2).encode(),
    }
