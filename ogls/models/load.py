"""Loading a model, its tokenizer or its head, and reading its properties without loading it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ogls.config import ModelConfig
from ogls.errors import ModelError
from ogls.hub import prepare_hub

if TYPE_CHECKING:
    from torch import Tensor


def load_tokenizer(model: ModelConfig) -> Any:
    """The tokenizer. Raises ModelError if it cannot be loaded or has no chat template."""
    from transformers import AutoTokenizer

    prepare_hub(model.path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ModelError(_load_error(model, error)) from error
    if not tokenizer.chat_template:
        raise ModelError(f"{model.path}: its tokenizer has no chat template; use an instruction-tuned model")
    return tokenizer


def load_causal(model: ModelConfig) -> Any:
    """The model as transformers loads it, on the CPU. Raises ModelError if it cannot be loaded."""
    import torch
    import transformers

    prepare_hub(model.path)
    transformers.utils.logging.disable_progress_bar()
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(
            model.path,
            revision=model.revision,
            dtype=getattr(torch, model.dtype),
            trust_remote_code=model.trust_remote_code,
            use_safetensors=True,
        )
    except (OSError, ValueError) as error:
        raise ModelError(_load_error(model, error)) from error


def load_head(model: ModelConfig) -> Tensor:
    """The LM head alone [V, D] in fp32 on the model's device, for steering from cached states.

    `prepare` has checked that the head is a plain matrix.
    """
    return load_causal(model).get_output_embeddings().weight.detach().float().to(resolve_device(model))


def _load_error(model: ModelConfig, error: Exception) -> str:
    first_line = str(error).strip().splitlines()[0]
    return (
        f"cannot load the model {model.path}: {first_line} "
        "(model.path is a folder or a Hugging Face id; gated models need `hf auth login`)"
    )


def resolve_device(model: ModelConfig) -> Any:
    """The device of the model. Raises ModelError if `model.device` is cuda and torch sees no CUDA device."""
    import torch

    if model.device == "cuda" and not torch.cuda.is_available():
        raise ModelError("model.device is cuda, but torch sees no CUDA device; set it to auto or cpu")
    return torch.device("cuda" if model.device != "cpu" and torch.cuda.is_available() else "cpu")


def load_stop_ids(model: ModelConfig, tokenizer: Any) -> tuple[int, ...]:
    """The stop tokens of the model (see `collect_stop_ids`), without loading it."""
    from transformers import GenerationConfig

    prepare_hub(model.path)
    try:
        generation = GenerationConfig.from_pretrained(model.path, revision=model.revision or "main")
    except OSError:
        generation = None  # without a generation config, the tokenizer's eos is the stop token
    return collect_stop_ids(generation, tokenizer)


def load_context_length(model: ModelConfig) -> int:
    """The context length of the model in tokens, without loading it."""
    from transformers import AutoConfig

    prepare_hub(model.path)
    config = AutoConfig.from_pretrained(model.path, revision=model.revision, trust_remote_code=model.trust_remote_code)
    return int(getattr(config.get_text_config(), "max_position_embeddings", 1 << 30))


def collect_stop_ids(generation: Any, tokenizer: Any) -> tuple[int, ...]:
    """Sorted ids of the stop tokens: those of the generation config (may be None) and the tokenizer's eos.

    Raises ModelError if there is no stop token.
    """
    listed = generation.eos_token_id if generation else None
    ids = {*(listed if isinstance(listed, list) else [listed]), tokenizer.eos_token_id} - {None}
    if not ids:
        raise ModelError("neither the generation config nor the tokenizer names a stop token")
    return tuple(sorted(ids))
