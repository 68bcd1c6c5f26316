"""Models with the Qwen3 architecture, random weights and the tokenizer of the tiny world."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

TINY_MODEL = Path(__file__).parents[1] / "data" / "tiny" / "model"
SMALL = {
    "num_hidden_layers": 3,
    "hidden_size": 256,
    "intermediate_size": 768,
    "head_dim": 32,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 320,
    "max_position_embeddings": 4096,
}
QWEN3_1_7B = {
    "num_hidden_layers": 28,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "head_dim": 128,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 151_936,
    "max_position_embeddings": 40_960,
}


def shaped(folder: Path, **shape: int) -> Path:
    """Write a configuration (SMALL, changed by `shape`) and a tokenizer, without weights, to a new folder."""
    shutil.copytree(TINY_MODEL, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text()) | SMALL | shape
    config["layer_types"] = ["full_attention"] * config["num_hidden_layers"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def random_model(folder: Path, dtype: str = "float32", device: str = "cpu", **shape: int) -> Path:
    """Write a model as `shaped` does, with weights from the initialisation of the architecture at seed 0.

    A large model is initialised faster on a GPU, with other weights than on the CPU.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shaped(folder, **shape)
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=getattr(torch, dtype))
    model.save_pretrained(folder)
    return folder
