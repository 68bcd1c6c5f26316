"""The base model, and the weights that are trained."""

from __future__ import annotations

from typing import Literal

from ogls.config.section import Section, setting


class ModelConfig(Section):
    """The base model. Student and teacher both start from it."""

    path: str = setting("data/tiny/model", "Local folder or Hugging Face id of the base model.")
    revision: str | None = setting(None, "Revision (branch, tag or commit) of a Hugging Face id.")
    dtype: Literal["float32", "bfloat16", "float16"] = setting("float32", "Data type of the model's weights.")
    device: Literal["auto", "cpu", "cuda"] = setting(
        "auto", "Device to run models on. auto: CUDA if it is available, else the CPU.", numerics=True
    )
    thinking: bool = setting(
        False, "Value of `enable_thinking` for the chat template. All prompts of a run use the same value."
    )
    trust_remote_code: bool = setting(
        False,
        "Allow the model's repository to run its own Python code on this machine. Enable it only if you trust it.",
    )


class AdapterConfig(Section):
    """The weights that are trained. The head and the embeddings stay frozen, since cached teacher states precede the
    head."""

    kind: Literal["lora", "full"] = setting(
        "lora", "lora: train LoRA matrices. full: train all weights except the head and the embeddings."
    )
    start: str = setting("", "Folder of an adapter to start from in round 0. Empty: start from the base model.")
    rank: int = setting(64, "Rank of the LoRA matrices. A higher rank trains more parameters.", ge=1)
    alpha: int = setting(128, "LoRA scale: the weight update is alpha / rank * B A.", ge=1)
    modules: tuple[str, ...] = setting(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        "Names of the linear layers that get LoRA matrices.",
        min_length=1,
    )
