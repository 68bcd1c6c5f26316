"""The dimensions of a model, read from its configuration without loading weights."""

from __future__ import annotations

from dataclasses import dataclass

from ogls.config import RunConfig
from ogls.errors import ModelError


@dataclass(frozen=True)
class Shape:
    """A model in numbers."""

    parameters: int
    embedding: int  # parameters of the embeddings and, where it is not tied to them, the head
    trained: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int

    @property
    def body(self) -> int:
        """Parameters that every token of a pass goes through; the head is counted where it is run."""
        return self.parameters - self.embedding

    def cache(self, tokens: float, width: int) -> float:
        """Bytes of keys and values."""
        return tokens * 2 * self.layers * self.kv_heads * self.head_dim * width


def read_shape(config: RunConfig) -> Shape:
    """The model's numbers from its configuration alone: no weights are loaded. ModelError if it is not to be had."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model = config.model
    try:
        found = AutoConfig.from_pretrained(
            model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read the configuration of {model.path}: {str(error).splitlines()[0]}") from None
    text = found.get_text_config()
    with torch.device("meta"):
        causal = AutoModelForCausalLM.from_config(found, trust_remote_code=model.trust_remote_code)
    parameters = sum(p.numel() for p in causal.parameters())
    embedded = {
        id(p): p.numel()
        for e in (causal.get_input_embeddings(), causal.get_output_embeddings())
        for p in e.parameters()
    }
    rank = config.adapter.rank
    matched = [
        m
        for n, m in causal.named_modules()
        if n.rsplit(".", 1)[-1] in config.adapter.modules and hasattr(m, "in_features")
    ]
    lora = sum(rank * (m.in_features + m.out_features) for m in matched)
    return Shape(
        parameters=parameters,
        embedding=sum(embedded.values()),
        trained=lora if config.adapter.kind == "lora" else parameters - sum(embedded.values()),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", 4 * text.hidden_size),
        heads=text.num_attention_heads,
        kv_heads=getattr(text, "num_key_value_heads", text.num_attention_heads),
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        vocabulary=text.vocab_size,
        context=getattr(text, "max_position_embeddings", 1 << 30),
    )
