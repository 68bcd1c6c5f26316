"""Peak memory of passes in bytes, without the weights of the model, and the shapes of a run's models."""

from __future__ import annotations

from ogls.config import RunConfig, SamplingConfig
from ogls.models.head import HEAD_BLOCK
from ogls.models.shape import Shape, read_shape
from ogls.planning.gpus import Gpu

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}  # of a number, by data type
STATES_IN_MEMORY = 2**28  # bytes of fp32 states that the stage teach holds at once, unless one group has more
STEER_SHARD_STATES = 2**18  # cached states, of all pools, per shard of the stage steer
TRAINED_BYTES = 16  # of a trained weight: itself, its gradient and AdamW's two moments, all in fp32
LOGIT_COPIES = 6  # fp32 tensors [tokens, V] in memory at once while a target or a full-vocabulary loss is computed


def other_shapes(config: RunConfig) -> dict[str, Shape]:
    """Return the dimensions of the other models that compute pools, by path."""
    models = config.other_models().items()
    return {path: read_shape(config.model_copy(update={"model": model})) for path, model in models}


_STYLE_COPIES = 7  # as LOGIT_COPIES, in the style stage
_WIDE = 4096  # samplers.draw searches a vocabulary of more tokens in two steps


def logit_bytes(config: RunConfig, sampling: SamplingConfig, shape: Shape, gpu: Gpu) -> float:
    """Return the peak memory in bytes of sampling one token for each sequence of a batch with transformers.

    It has the fp32 logits, and what `samplers.draw` makes of them. Of a wide vocabulary, only the most likely tokens
    are cut in fp64 (all of them if they do not decide, which is not counted).
    """
    cut = sampling.top_p < 1 or sampling.top_k > 0
    narrow = 52 if sampling.top_p < 1 else 28
    per_logit = narrow if shape.vocabulary <= _WIDE else 17 if cut else 24
    size = sampling.batch_size * shape.vocabulary * float(per_logit)
    if gpu.name == "cpu" and BYTES[config.model.dtype] < 4:
        size += min(shape.vocabulary, HEAD_BLOCK) * shape.hidden * 4  # rows of the head in fp32
    return size


def steering_bytes(config: RunConfig, shape: Shape, width: int) -> float:
    """Return the peak memory of steering in bytes: the heads [V, width] side by side, and fp32 logits."""
    logits = config.steer.batch_tokens * shape.vocabulary * 4 * LOGIT_COPIES
    return _heads_bytes(config, shape, width) + logits


def style_bytes(config: RunConfig, shape: Shape, width: int, tokens: float) -> float:
    """Return the peak memory of the style stage in bytes: as in steering, for one rollout of `tokens` at a time."""
    at_once = min(config.steer.batch_tokens, tokens)
    return _heads_bytes(config, shape, width) + at_once * shape.vocabulary * 4 * _STYLE_COPIES


def _heads_bytes(config: RunConfig, shape: Shape, width: int) -> float:
    """The heads in the model's type, and of a 16-bit type the rows that are multiplied at once, in fp32."""
    size = BYTES[config.model.dtype]
    return shape.vocabulary * width * size + (min(shape.vocabulary, HEAD_BLOCK) * width * 4 if size < 4 else 0)


def teaching_bytes(config: RunConfig, shape: Shape) -> float:
    """Return the peak memory of a teacher pass in bytes, without the model's weights.

    It consists of the keys and values of the prefixes, their copies for the continuations in one layer (twice, while
    they are put beside those of the continuations), and one layer's activations.
    """
    width, tokens = BYTES[config.model.dtype], config.teacher.batch_tokens
    return (1 + 2 / shape.layers) * shape.cache(tokens, width) + tokens * (
        6 * shape.hidden + 3 * shape.intermediate
    ) * width


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
    return _pass_bytes(config, shape) + shape.trained * TRAINED_BYTES


def device_training_bytes(config: RunConfig, shape: Shape, ranks: int) -> float:
    """Return the peak memory of the train stage in bytes on the device of one of `ranks` processes.

    With DDP each has everything. With FSDP2 each has its part of the weights, gradients and optimizer state, two layers
    that are gathered at a time, and the whole head and embeddings.
    """
    width, train = BYTES[config.model.dtype], config.train
    if train.parallel != "fsdp" or ranks == 1:
        return shape.parameters * width + training_bytes(config, shape)
    size = _pass_bytes(config, shape) + shape.embedding * width + TRAINED_BYTES * shape.trained / ranks
    layer = shape.body / max(shape.layers, 1)
    if config.adapter.kind == "lora":
        return size + shape.body * width / ranks + 2 * layer * width
    size += 3 * layer * 4  # two layers of fp32 weights, and the gradient of one
    # Autocast copies the weights of a layer for its backward pass, which FSDP2 does not split.
    return size + (width < 4) * width * (layer if train.gradient_checkpointing else shape.body)


def _pass_bytes(config: RunConfig, shape: Shape) -> float:
    """Activations of a micro-batch for the backward pass, and one chunk of the head."""
    width, train = BYTES[config.model.dtype], config.train
    attention = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    adapted = len(config.adapter.modules) * config.adapter.rank if config.adapter.kind == "lora" else 0
    layer = 6 * shape.hidden + 3 * attention + 4 * shape.intermediate + adapted
    stored = shape.hidden * shape.layers + layer if train.gradient_checkpointing else layer * shape.layers
    activations = train.micro_batch_tokens * stored * width
    # With support = top_k: one fp32 buffer, and a copy of it in the model's dtype if that is smaller.
    bytes_per_logit = 4 * LOGIT_COPIES if train.support == "full" else 4 + width * (width < 4)
    head = min(train.head_tokens, train.micro_batch_tokens) * shape.vocabulary * bytes_per_logit
    return activations + head
