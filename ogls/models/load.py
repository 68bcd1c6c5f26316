"""Loading a model, its tokenizer or its head, and reading its properties without loading it."""

from __future__ import annotations

import json
from pathlib import Path
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
    """The LM head alone [V, D] in the model's type on its device, for steering from cached states.

    Only its tensor is read from the safetensors files, if they have it under the name that the model gives it; else the
    whole model is loaded. `prepare` has checked that the head is a plain matrix. Raises ModelError if the model cannot
    be loaded.
    """
    import torch

    weight = _read_head(model)
    if weight is None:
        weight = load_causal(model).get_output_embeddings().weight.detach()
    return weight.to(getattr(torch, model.dtype)).to(resolve_device(model))


def _read_head(model: ModelConfig) -> Tensor | None:
    """The tensor of the head as the checkpoint has it; None if it has none of that name, or no safetensors."""
    from safetensors import safe_open
    from transformers import AutoConfig
    from transformers.utils.hub import cached_file

    prepare_hub(model.path)
    try:
        config = AutoConfig.from_pretrained(
            model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
        names = _names_of_the_head(config)
        found = [
            cached_file(model.path, name, revision=model.revision, _raise_exceptions_for_missing_entries=False)
            for name in ("model.safetensors.index.json", "model.safetensors")
        ]
    except (OSError, ValueError) as error:
        raise ModelError(_load_error(model, error)) from error
    if found[0]:
        files = json.loads(Path(found[0]).read_text())["weight_map"]
        file_of = {n: cached_file(model.path, files[n], revision=model.revision) for n in names if n in files}
    else:
        file_of = dict.fromkeys(names, found[1]) if found[1] else {}
    for name, file in file_of.items():
        with safe_open(file, "pt") as opened:
            if name in opened.keys():  # noqa: SIM118
                return opened.get_tensor(name)
    return None


def _names_of_the_head(config: Any) -> list[str]:
    """The names of the weights of the head, the one of its own first; a tied head has the name of the embedding too."""
    import torch
    from transformers import AutoModelForCausalLM

    if getattr(config, "auto_map", None):  # code of its own: what it builds is known only by loading it
        return []
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    head = empty.get_output_embeddings()
    if head is None:
        return []
    own = [name for name, module in empty.named_modules() if module is head]
    tied = [n for n, p in empty.named_parameters(remove_duplicate=False) if p is head.weight]
    return list(dict.fromkeys([*(f"{name}.weight" for name in own), *tied]))


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
