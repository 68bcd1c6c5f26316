"""Trained weights, their hash, and the files that peft and vLLM load. Does not need peft."""

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


BASE = "base"  # the hash of the base model without an adapter
WEIGHTS = {"lora": "adapter_model.safetensors", "full": "model.safetensors"}


@dataclass(frozen=True)
class Adapter:
    """Trained weights by name, and the hash that identifies them in the records."""

    weights: Mapping[str, Tensor]
    hash: str

    @classmethod
    def from_weights(cls, weights: Mapping[str, Tensor]) -> Adapter:
        """An adapter from weights. The hash covers names, shapes and values, not the file layout."""
        digest = hashlib.sha256()
        for name in sorted(weights):
            tensor = weights[name].detach().cpu().float().contiguous()
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.numpy().tobytes())
        return cls(dict(weights), digest.hexdigest()[:16])

    @classmethod
    def from_bytes(cls, content: bytes) -> Adapter:
        """An adapter from the bytes of a safetensors file."""
        from safetensors.torch import load

        return cls.from_weights(load(content))

    def average(self, other: Adapter, decay: float) -> Adapter:
        """`decay * self + (1 - decay) * other`, weight by weight in fp32 (LoRA's A and B separately).

        The average of the products B A would have a rank that grows with every round. In eight rounds of the tiny
        world, the product of the averages differs from it by 1 to 8% of its norm at decay 0.5 and by 15 to 18% at 0.9;
        its direction is the same (cosine above 0.986), and it is up to 9% shorter.
        """
        old, new = self.weights, other.weights
        return Adapter.from_weights(
            {n: (decay * old[n].float() + (1 - decay) * new[n].float()).to(new[n].dtype) for n in new}
        )


def adapter_files(adapter: Adapter, model: ModelConfig, config: AdapterConfig) -> dict[str, bytes]:
    """The files of an adapter: content by file name. For LoRA, the two files that peft loads."""
    from safetensors.torch import save

    weights = {n: w.contiguous() for n, w in adapter.weights.items()}
    files = {WEIGHTS[config.kind]: save(weights, metadata={"format": "pt"})}
    if config.kind == "lora":
        peft_config = {
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
        files["adapter_config.json"] = json.dumps(peft_config, indent=2).encode()
    return files


def check_adapter_config(adapter_config: Mapping[str, Any], config: RunConfig) -> None:
    """Raise ModelError if an adapter_config.json does not match the configuration: another base, rank or scale.

    Bases are compared by the last part of their name, so a model id and a local copy in a folder are equal.
    """
    base, model = adapter_config.get("base_model_name_or_path") or "", config.model.path
    if base and Path(base).name != Path(model).name:
        raise ModelError(
            f"adapter.start: {config.adapter.start} was trained on {base}, and model.path is {model}; set the same "
            "model, or, if both are the same model, change base_model_name_or_path in its adapter_config.json"
        )
    for key, setting in (("r", "rank"), ("lora_alpha", "alpha")):
        found, expected = adapter_config.get(key), getattr(config.adapter, setting)
        if found is not None and found != expected:
            raise ModelError(f"adapter.start: {config.adapter.start} has {key} = {found}: set adapter.{setting} to it")
