"""The base model, and what of it is trained."""

from __future__ import annotations

from typing import Literal

from ogls.config.section import Section, setting


class ModelConfig(Section):
    """The base model, which is also the teacher."""

    path: str = setting("data/tiny/model", "Folder or Hugging Face id of the base model.")
    revision: str | None = setting(None, "Revision of a Hugging Face id.")
    dtype: Literal["float32", "bfloat16", "float16"] = setting("float32", "Type the weights are held in.")
    device: Literal["auto", "cpu", "cuda"] = setting(
        "auto", "Where models run; auto takes CUDA if there is one.", operational=True
    )
    thinking: bool = setting(False, "The chat template's thinking flag, alike in every stage.")
    trust_remote_code: bool = setting(False, "Let the model's repository run its own code here.")


class AdapterConfig(Section):
    """What is trained. The head and the embeddings never are: teacher states are cached before the head."""

    kind: Literal["lora", "full"] = setting("lora", "lora, or full: every weight but head and embeddings.")
    start: str = setting("", "Folder of an adapter that round 0 is; empty: the base model itself.")
    rank: int = setting(64, "Rank of the LoRA matrices.", ge=1)
    alpha: int = setting(128, "LoRA scale; the update is alpha / rank * B A.", ge=1)
    modules: tuple[str, ...] = setting(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        "Names of the projections that get LoRA matrices.",
        min_length=1,
    )
