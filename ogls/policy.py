"""The model: loading, its body and head, and the adapter. The only import of peft.

Only what comes before the head is ever trained, so logits are always `body(tokens) @ head.T` with the base
model's own head. That is what lets the teacher cache hold states in place of logits; a model whose logits
are anything else (bias, soft cap, scale) is refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from ogls.adapter import BASE, Adapter
from ogls.config import AdapterConfig, ModelConfig
from ogls.errors import ModelError
from ogls.head import head_logits

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


class Policy:
    """A base model with one set of trainable weights, which can be exchanged."""

    def __init__(self, model: ModelConfig, adapter: AdapterConfig, seed: int = 0):
        import torch

        self.tokenizer = load_tokenizer(model)
        self.device = device_of(model)
        causal = load_causal(model).to(self.device).eval()
        self.head: Tensor = _plain_head(causal, model.path)
        self.context: int = getattr(causal.config.get_text_config(), "max_position_embeddings", 1 << 30)
        self.stop_ids = _stop_ids(causal, self.tokenizer)
        for parameter in causal.parameters():
            parameter.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = _with_lora(causal, adapter) if adapter.kind == "lora" else causal
        self.body = causal.base_model
        if adapter.kind == "full":
            frozen = {
                id(p) for e in (causal.get_input_embeddings(), causal.get_output_embeddings()) for p in e.parameters()
            }
            for parameter in causal.parameters():
                if id(parameter) not in frozen:
                    parameter.data = parameter.data.float()  # as peft's are: see _mixed
                    parameter.requires_grad_(True)
        self.parameters = {_plain(n): p for n, p in self.model.named_parameters() if p.requires_grad}
        self._initial = {n: p.detach().clone() for n, p in self.parameters.items()}  # LoRA's B is zero: the base
        self.hash = BASE

    def use(self, adapter: Adapter | None) -> None:
        """Make `adapter` the weights in use; None stands for the base model."""
        import torch

        weights = adapter.weights if adapter else self._initial
        if set(weights) != set(self.parameters):
            odd = sorted(set(weights) ^ set(self.parameters))
            raise ModelError(f"the adapter is of another model or kind: {len(odd)} names differ, such as {odd[0]}")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if parameter.shape != weights[name].shape:
                    raise ModelError(
                        f"the adapter's {name} is {tuple(weights[name].shape)}, not {tuple(parameter.shape)}"
                    )
                parameter.copy_(weights[name])
        self.hash = adapter.hash if adapter else BASE

    def adapter(self) -> Adapter:
        """A copy of the weights in use."""
        return Adapter.of({n: p.detach().cpu().clone() for n, p in self.parameters.items()})

    def initial(self) -> Adapter:
        """The trainable weights as they are before any training."""
        return Adapter.of(self._initial)

    def hidden(self, ids: Int[Tensor, "B L"], mask: Int[Tensor, "B L"] | None = None, **more: Any) -> Any:
        """The body's output; `last_hidden_state` [B, L, D] is what the head is applied to."""
        with self._mixed():
            return self.body(input_ids=ids, attention_mask=mask, **more)

    def _mixed(self) -> AbstractContextManager[Any]:
        """Trained weights are kept in fp32, where updates of 1e-5 count, and run in the model's type."""
        import torch

        kind = self.head.dtype
        return nullcontext() if kind == torch.float32 else torch.autocast(self.device.type, dtype=kind)

    @contextmanager
    def checkpointing(self, on: bool) -> Iterator[None]:
        """Within, if `on`, layers drop their activations in the forward pass and compute them again in the backward.

        Only within: such a layer takes no cache of keys and values, which every other pass lives by.
        """
        if not on:
            yield
            return
        self.body.gradient_checkpointing_enable({"use_reentrant": False})
        layers = [m for m in self.body.modules() if hasattr(type(m), "gradient_checkpointing")]
        for layer in layers:
            layer.training = True  # its own flag alone; what is in it stays in evaluation: no dropout
        try:
            yield
        finally:
            self.body.gradient_checkpointing_disable()
            for layer in layers:
                layer.training = False

    def logits(self, hidden: Float[Tensor, "*B D"]) -> Float[Tensor, "*B V"]:
        """The head's logits in fp32, whatever the model's type."""
        return head_logits(hidden, self.head)


def load_tokenizer(model: ModelConfig) -> Any:
    """The model's tokenizer. Raises ModelError if it is not to be had or has no chat template."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ModelError(_unreachable(model, error)) from error
    if not tokenizer.chat_template:
        raise ModelError(f"{model.path}: its tokenizer has no chat template; use an instruction-tuned model")
    return tokenizer


def load_causal(model: ModelConfig) -> Any:
    """The model as transformers loads it, on the CPU. Raises ModelError if it is not to be had."""
    import torch
    import transformers

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
        raise ModelError(_unreachable(model, error)) from error


def load_head(model: ModelConfig) -> Tensor:
    """The LM head alone [V, D] in fp32 on the model's device, for steering from cached states.

    Nothing runs: that the head is a plain matrix was seen when the run was prepared.
    """
    return load_causal(model).get_output_embeddings().weight.detach().float().to(device_of(model))


def _unreachable(model: ModelConfig, error: Exception) -> str:
    first = str(error).strip().splitlines()[0]
    return (
        f"cannot load the model {model.path}: {first} "
        "(model.path is a folder or a Hugging Face id; gated models need `hf auth login`)"
    )


def device_of(model: ModelConfig) -> Any:
    """Where the model runs. Raises ModelError where CUDA is asked for and is not there."""
    import torch

    if model.device == "cuda" and not torch.cuda.is_available():
        raise ModelError("model.device is cuda, but torch sees no CUDA device; set it to auto or cpu")
    return torch.device("cuda" if model.device != "cpu" and torch.cuda.is_available() else "cpu")


def _plain_head(causal: Any, path: str) -> Tensor:
    """The head's matrix [V, D], once it is sure that logits are states times it and nothing else."""
    import torch

    head = causal.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        raise ModelError(f"{path}: its LM head is missing or has a bias; cached states could not give its logits")
    device = head.weight.device
    ids = torch.arange(4, device=device)[None]
    with torch.inference_mode():
        got = causal(input_ids=ids).logits.float()
        want = (causal.base_model(input_ids=ids).last_hidden_state @ head.weight.T).float()
    error = (got - want).abs().max() / want.abs().max().clamp(min=1)
    if not error < (1e-4 if head.weight.dtype == torch.float32 else 3e-2):
        cap = getattr(causal.config.get_text_config(), "final_logit_softcapping", None)
        why = f"it soft-caps its logits at {cap}" if cap else f"they differ by {error:.2g}"
        raise ModelError(f"{path}: logits are not hidden states times the head ({why}); such a model cannot be steered")
    return head.weight.detach()


def _stop_ids(causal: Any, tokenizer: Any) -> tuple[int, ...]:
    """Every stop id of the generation config and the tokenizer's eos."""
    return _all_stops(causal.generation_config, tokenizer)


def stop_ids_of(model: ModelConfig, tokenizer: Any) -> tuple[int, ...]:
    """The same without loading the model."""
    from transformers import GenerationConfig

    try:
        found = GenerationConfig.from_pretrained(model.path, revision=model.revision or "main")
    except OSError:
        found = None  # a model without the file: its tokenizer says
    return _all_stops(found, tokenizer)


def context_of(model: ModelConfig) -> int:
    """The longest sequence that the model takes, in tokens, without loading it."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model.path, revision=model.revision, trust_remote_code=model.trust_remote_code)
    return int(getattr(config.get_text_config(), "max_position_embeddings", 1 << 30))


def _all_stops(generation: Any, tokenizer: Any) -> tuple[int, ...]:
    listed = generation.eos_token_id if generation else None
    ids = {*(listed if isinstance(listed, list) else [listed]), tokenizer.eos_token_id} - {None}
    if not ids:
        raise ModelError("neither the generation config nor the tokenizer names a stop token")
    return tuple(sorted(ids))


def _with_lora(causal: Any, adapter: AdapterConfig) -> Any:
    from peft import LoraConfig, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    trained = {"lm_head", "embed_tokens"} & set(adapter.modules)
    if trained:
        raise ModelError(f"adapter.modules names {', '.join(sorted(trained))}: cached states need an untrained head")
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=0.0,
        target_modules=list(adapter.modules),
        task_type="CAUSAL_LM",
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft warns of tied embeddings, which are not trained here
            adapted = get_peft_model(causal, config)
    except ValueError as error:
        raise ModelError(f"adapter.modules: {error}") from error
    for module in adapted.modules():
        if isinstance(module, BaseTunerLayer):
            # Else an fp32 copy of each module's input is kept for the backward pass: see Policy._mixed.
            module.cast_input_dtype_enabled = False  # type: ignore[assignment]
    return adapted


def _plain(name: str) -> str:
    """A parameter's name as peft writes it to disk."""
    return name.replace(".default.", ".")
