"""Trained weights: by name, by hash, and as the files that peft and vLLM load. No peft is needed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ogls.config import AdapterConfig, ModelConfig, RunConfig
from ogls.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor


BASE = "base"  # the hash of no adapter
WEIGHTS = {"lora": "adapter_model.safetensors", "full": "model.safetensors"}


@dataclass(frozen=True)
class Adapter:
    """Trained weights by name, and the hash that follows them through the records."""

    weights: Mapping[str, Tensor]
    hash: str

    @classmethod
    def from_weights(cls, weights: Mapping[str, Tensor]) -> Adapter:
        """The hash covers names, shapes and values, not how a file lays them out."""
        digest = hashlib.sha256()
        for name in sorted(weights):
            tensor = weights[name].detach().cpu().float().contiguous()
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.numpy().tobytes())
        return cls(dict(weights), digest.hexdigest()[:16])

    @classmethod
    def from_bytes(cls, content: bytes) -> Adapter:
        """From the bytes of a safetensors file."""
        from safetensors.torch import load

        return cls.from_weights(load(content))

    def average(self, other: Adapter, decay: float) -> Adapter:
        """`decay * self + (1 - decay) * other`, weight by weight, in fp32 (A and B of a LoRA apart)."""
        old, new = self.weights, other.weights
        return Adapter.from_weights(
            {n: (decay * old[n].float() + (1 - decay) * new[n].float()).to(new[n].dtype) for n in new}
        )


def adapter_files(adapter: Adapter, model: ModelConfig, config: AdapterConfig) -> dict[str, bytes]:
    """The weights as files by name: for LoRA, the two that plain peft loads."""
    from safetensors.torch import save

    weights = {n: w.contiguous() for n, w in adapter.weights.items()}
    files = {WEIGHTS[config.kind]: save(weights, metadata={"format": "pt"})}
    if config.kind == "lora":
        about = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": model.path,
            "r": config.rank,
            "lora_alpha": config.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": sorted(config.modules),
            "inference_mode": True,
        }
        files["adapter_config.json"] = json.dumps(about, indent=2).encode()
    return files


def check_adapter_config(about: Mapping[str, Any], config: RunConfig) -> None:
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
