"""The dimensions of a model, read from its configuration without loading weights."""

from __future__ import annotations

from dataclasses import dataclass

from ogls.config import RunConfig
from ogls.errors import ModelError
from ogls.hub import prepare_hub


@dataclass(frozen=True)
class Shape:
    """The dimensions of a model."""

    parameters: int
    embedding: int  # parameters of the embeddings and, unless it is tied to them, of the head
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
        """Parameters without embeddings and head: those that every token passes through."""
        return self.parameters - self.embedding

    def cache(self, tokens: float, width: int) -> float:
        """Bytes of the key-value cache for `tokens` tokens, with `width` bytes a number."""
        return tokens * 2 * self.layers * self.kv_heads * self.head_dim * width


def read_shape(config: RunConfig) -> Shape:
    """The dimensions of the configured model, read without loading weights. Raises ModelError if it cannot be read."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model = config.model
    prepare_hub(model.path)
    try:
        model_config = AutoConfig.from_pretrained(
            model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read the configuration of {model.path}: {str(error).splitlines()[0]}") from None
    text_config = model_config.get_text_config()
    with torch.device("meta"):
        causal = AutoModelForCausalLM.from_config(model_config, trust_remote_code=model.trust_remote_code)
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
        layers=text_config.num_hidden_layers,
        hidden=text_config.hidden_size,
        intermediate=getattr(text_config, "intermediate_size", 4 * text_config.hidden_size),
        heads=text_config.num_attention_heads,
        kv_heads=getattr(text_config, "num_key_value_heads", text_config.num_attention_heads),
        head_dim=getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads,
        vocabulary=text_config.vocab_size,
        context=getattr(text_config, "max_position_embeddings", 1 << 30),
    )
