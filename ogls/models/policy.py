"""The policy: a base model with trainable weights. The only import of peft.

Only weights before the head are trained, so logits are always `body(tokens) @ head.T` with the head of the base model.
Therefore the teacher cache can store states in place of logits. A model whose logits are anything else (bias, soft cap,
scale) is refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from ogls.config import AdapterConfig, ModelConfig
from ogls.errors import ModelError
from ogls.models.adapter import BASE, Adapter
from ogls.models.continuation import check_continuations
from ogls.models.head import head_logits
from ogls.models.load import collect_stop_ids, load_causal, load_tokenizer, resolve_device

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


class Policy:
    """A base model with one set of trainable weights, which can be replaced; without `adapter`, a frozen model."""

    def __init__(self, model: ModelConfig, adapter: AdapterConfig | None, seed: int = 0):
        import torch

        self.tokenizer = load_tokenizer(model)
        self.device = resolve_device(model)
        causal = load_causal(model).to(self.device).eval()
        self.head: Tensor = _check_head(causal, model.path)
        self.context: int = getattr(causal.config.get_text_config(), "max_position_embeddings", 1 << 30)
        self.stop_ids = collect_stop_ids(causal.generation_config, self.tokenizer)
        for parameter in causal.parameters():
            parameter.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = _with_lora(causal, adapter) if adapter and adapter.kind == "lora" else causal
        self.body = causal.base_model
        if adapter and adapter.kind == "full":
            frozen = {
                id(p) for e in (causal.get_input_embeddings(), causal.get_output_embeddings()) for p in e.parameters()
            }
            for parameter in causal.parameters():
                if id(parameter) not in frozen:
                    parameter.data = parameter.data.float()  # as in peft; see _autocast
                    parameter.requires_grad_(True)
        self.find_parameters()
        # The base model: LoRA's B is zero. On the CPU, as every Adapter; full weights would fill a GPU twice.
        self._initial = {n: p.detach().to("cpu", copy=True) for n, p in self.parameters.items()}
        self.hash = BASE
        check_continuations(self, model.dtype, len(self.head), model.path)

    def find_parameters(self) -> None:
        """Collect the trainable weights of the model by name, again after something has replaced them."""
        self.parameters = {_peft_name(n): p for n, p in self.model.named_parameters() if p.requires_grad}

    def use_adapter(self, adapter: Adapter | None) -> None:
        """Load an adapter into the trainable weights; None selects the base model.

        Raises ModelError if names or shapes differ.
        """
        import torch

        weights = adapter.weights if adapter else self._initial
        if set(weights) != set(self.parameters):
            differing = sorted(set(weights) ^ set(self.parameters))
            raise ModelError(
                f"the adapter belongs to another model or kind: {len(differing)} names differ, such as {differing[0]}"
            )
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if parameter.shape != weights[name].shape:
                    raise ModelError(
                        f"the adapter has another rank or belongs to another model: the shape of {name} is "
                        f"{tuple(weights[name].shape)}, not {tuple(parameter.shape)}"
                    )
                parameter.copy_(weights[name])
        self.hash = adapter.hash if adapter else BASE

    @contextmanager
    def base_weights(self) -> Iterator[None]:
        """The base model within the block; the current trainable weights wait on the CPU and come back."""
        kept = Adapter({n: p.detach().cpu().clone() for n, p in self.parameters.items()}, self.hash)
        self.use_adapter(None)
        try:
            yield
        finally:
            self.use_adapter(kept)

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Within the block, LoRA is part of the weights of the model, which then runs as fast as the base model.

        Afterwards the base weights are what they were, bit by bit. Does nothing for full weights, and for a model in 16
        bits, whose merged weights would be rounded.
        """
        import torch

        layers = [m for m in self.model.modules() if hasattr(m, "get_delta_weight")]
        if self.head.dtype != torch.float32 or not layers:
            yield
            return
        kept = [layer.base_layer.weight.data for layer in layers]
        try:
            with torch.no_grad():
                for layer, base in zip(layers, kept, strict=True):
                    layer.base_layer.weight.data = base + layer.get_delta_weight("default")
                    layer.merged_adapters.append("default")
            yield
        finally:
            for layer, base in zip(layers, kept, strict=True):
                layer.base_layer.weight.data = base
                layer.merged_adapters.clear()

    def move_to(self, device: Any) -> None:
        """Move the model to another device, to make room for another user of a GPU."""
        import torch

        self.model.to(device)
        self.head = self.model.get_output_embeddings().weight.detach()
        self.device = torch.device(device)

    def copy_adapter(self) -> Adapter:
        """A copy of the current trainable weights."""
        return Adapter.from_weights({n: p.detach().cpu().clone() for n, p in self.parameters.items()})

    def initial_adapter(self) -> Adapter:
        """The trainable weights before any training."""
        return Adapter.from_weights(self._initial)

    def run_body(self, ids: Int[Tensor, "B L"], mask: Int[Tensor, "B L"] | None = None, **arguments: Any) -> Any:
        """The output of the model without its head; `last_hidden_state` is [B, L, D], after the final norm."""
        with self._autocast():
            return self.body(input_ids=ids, attention_mask=mask, **arguments)

    def _autocast(self) -> AbstractContextManager[Any]:
        """Autocast to the type of the model. Trained weights are kept in fp32, so that updates of 1e-5 are not lost."""
        import torch

        dtype = self.head.dtype
        return nullcontext() if dtype == torch.float32 else torch.autocast(self.device.type, dtype=dtype)

    @contextmanager
    def checkpointing(self, on: bool) -> Iterator[None]:
        """Gradient checkpointing within the block, if `on`: layers recompute activations in the backward pass.

        It is limited to the block because a checkpointed layer ignores the key-value cache, which other passes need.
        """
        if not on:
            yield
            return
        self.body.gradient_checkpointing_enable({"use_reentrant": False})
        layers = [m for m in self.body.modules() if hasattr(type(m), "gradient_checkpointing")]
        for layer in layers:
            layer.training = True  # only the flag of the layer; its submodules stay in evaluation mode, without dropout
        try:
            yield
        finally:
            self.body.gradient_checkpointing_disable()
            for layer in layers:
                layer.training = False

    def logits(self, hidden: Float[Tensor, "*B D"]) -> Float[Tensor, "*B V"]:
        """The logits of hidden states, in fp32 whatever the type of the model."""
        return head_logits(hidden, self.head)


def _check_head(causal: Any, path: str) -> Tensor:
    """The matrix of the head [V, D]. Raises ModelError unless logits are exactly hidden states times this matrix."""
    import torch

    head = causal.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        raise ModelError(
            f"{path}: its LM head is missing or has a bias; its logits cannot be computed from cached states"
        )
    device = head.weight.device
    ids = torch.arange(4, device=device)[None]
    with torch.inference_mode():
        actual = causal(input_ids=ids).logits.float()
        expected = (causal.base_model(input_ids=ids).last_hidden_state @ head.weight.T).float()
    error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1)
    if not error < (1e-4 if head.weight.dtype == torch.float32 else 3e-2):
        cap = getattr(causal.config.get_text_config(), "final_logit_softcapping", None)
        reason = f"it soft-caps its logits at {cap}" if cap else f"they differ by {error:.2g}"
        raise ModelError(
            f"{path}: logits are not hidden states times the head ({reason}); such a model cannot be steered"
        )
    return head.weight.detach()


def _with_lora(causal: Any, adapter: AdapterConfig) -> Any:
    """The model with LoRA weights. Raises ModelError if `adapter.modules` names unknown modules, or the head."""
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
            warnings.simplefilter("ignore")  # peft warns about tied embeddings, which are not trained here
            adapted = get_peft_model(causal, config)
    except ValueError as error:
        raise ModelError(f"adapter.modules: {error}") from error
    for module in adapted.modules():
        if isinstance(module, BaseTunerLayer):
            # Otherwise peft keeps an fp32 copy of each module's input for the backward pass (see Policy._autocast).
            module.cast_input_dtype_enabled = False  # type: ignore[assignment]
    return adapted


def _peft_name(name: str) -> str:
    """The name of a parameter as peft writes it to disk."""
    return name.replace(".default.", ".")
