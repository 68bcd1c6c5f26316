"""Peak memory of passes in bytes, without the weights of the model, and the shapes of a run's models."""

from __future__ import annotations

from ogls.config import RunConfig
from ogls.models.shape import Shape, read_shape

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}  # of a number, by data type
STATES_IN_MEMORY = 2**28  # bytes of fp32 states that the stage teach holds at once, unless one group has more
LOGIT_COPIES = 6  # fp32 tensors [tokens, V] in memory at once while a target or a full-vocabulary loss is computed


def other_shapes(config: RunConfig) -> dict[str, Shape]:
    """Return the dimensions of the other models that compute pools, by path."""
    models = config.other_models().items()
    return {path: read_shape(config.model_copy(update={"model": model})) for path, model in models}


def teaching_bytes(config: RunConfig, shape: Shape) -> float:
    """Return the peak memory of a teacher pass in bytes, without the model's weights.

    It consists of the keys and values of the prefixes, their copies for the continuations, and one layer's
    activations.
    """
    width, tokens = BYTES[config.model.dtype], config.teacher.batch_tokens
    return 2 * shape.cache(tokens, width) + tokens * (6 * shape.hidden + 3 * shape.intermediate) * width


def scoring_bytes(config: RunConfig, shape: Shape) -> float:
    """Return the peak memory in bytes, without the model's weights, of the log-probs of completions under a model.

    It consists of a teacher pass and the logits of 1,024 tokens of one completion.
    """
    width, tokens = BYTES[config.model.dtype], min(1024, config.evaluate.max_tokens)
    return teaching_bytes(config, shape) + tokens * shape.vocabulary * (4 + width * (width < 4))


def training_bytes(config: RunConfig, shape: Shape) -> float:
    """Return the peak memory of a training step in bytes, without the base model's weights.

    It consists of the activations for the backward pass, one chunk of the head, the trained weights, their gradients
    and the state of AdamW.
    """
    width, train = BYTES[config.model.dtype], config.train
    attention = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    adapted = len(config.adapter.modules) * config.adapter.rank if config.adapter.kind == "lora" else 0
    layer = 6 * shape.hidden + 3 * attention + 4 * shape.intermediate + adapted
    stored = shape.hidden * shape.layers + layer if train.gradient_checkpointing else layer * shape.layers
    activations = train.micro_batch_tokens * stored * width
    # With support = top_k: one fp32 buffer, and a copy of it in the model's dtype if that is smaller.
    bytes_per_logit = 4 * LOGIT_COPIES if train.support == "full" else 4 + width * (width < 4)
    head = min(train.head_tokens, train.micro_batch_tokens) * shape.vocabulary * bytes_per_logit
    return activations + head + shape.trained * 16  # weights, gradients and AdamW's two moments, all in fp32
