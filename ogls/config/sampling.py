"""Sampling settings that rollouts and evaluation share, and the sampling engines."""

from __future__ import annotations

from typing import Literal

from ogls.config.section import Section, setting


class SamplingConfig(Section):
    """How completions are sampled."""

    samples: int = setting(8, "Completions per problem.", ge=1)
    temperature: float = setting(1.0, "Sampling temperature; 0 is greedy decoding.", ge=0)
    top_p: float = setting(
        1.0,
        "Nucleus sampling: sample from the smallest set of most likely tokens whose probabilities sum to at least this "
        "value; 1 disables the cut.",
        gt=0,
        le=1,
    )
    top_k: int = setting(0, "Sample only from the k most likely tokens; 0 disables the cut.", ge=0)
    min_p: float = setting(
        0.0,
        "Sample only tokens with at least this fraction of the most likely token's probability; 0 disables the cut.",
        ge=0,
        le=1,
        later=True,
    )
    max_tokens: int = setting(8192, "Maximum length of a completion, in tokens.", ge=1)
    batch_size: int = setting(
        256,
        "Completions sampled together, and rows per shard. With the transformers engine, lower it to save memory.",
        ge=1,
        numerics=True,
    )


class VllmConfig(Section):
    """The vLLM engine. None of these settings changes results, except by floating-point rounding."""

    gpu_memory: float = setting(
        0.85, "Fraction of the GPU's memory that the engine may use.", gt=0, le=1, numerics=True
    )
    cpu_cache_gib: int = setting(1, "Size of the key-value cache on a CPU, in GiB.", ge=1, numerics=True)
    max_sequences: int = setting(256, "Maximum number of completions decoded at once.", ge=1, numerics=True)
    batched_tokens: int = setting(16384, "Maximum number of tokens in one engine step.", ge=1, numerics=True)
    prompt_tokens: int = setting(
        2048,
        "Maximum length of a prompt, in tokens. The engine's context is this plus the largest max_tokens, but at most "
        "the model's context.",
        ge=1,
        numerics=True,
    )
    one_queue: bool = setting(
        True,
        "Give the engine the requests of all shards of a stage at once, so that none waits for the longest completion "
        "of another. Off: one shard after the other; then a stage that was interrupted has the same bits as one that "
        "was not, also where rounding depends on what the engine runs together.",
        numerics=True,
    )
    tensor_parallel: int = setting(1, "Number of GPUs that one engine is split over.", ge=1, numerics=True)
    stall_seconds: float = setting(
        3600.0,
        "Wall-clock limit in seconds until the next completion is finished. An engine that exceeds it is considered "
        "stalled and is restarted.",
        gt=0,
        operational=True,
    )


class ServerConfig(Section):
    """A running vLLM server, for rollout.engine = server."""

    url: str = setting("http://127.0.0.1:8000", "Base URL of the server, without /v1.", operational=True)
    adapters: str = setting(
        "data/served",
        "Folder where each round's adapter is written. The server must be able to read it under the same path.",
        operational=True,
    )
    at_once: int = setting(64, "Maximum number of concurrent requests.", ge=1, operational=True)
    timeout_seconds: float = setting(
        3600.0, "Timeout of the HTTP request for one completion, in seconds.", gt=0, operational=True
    )


class RolloutConfig(SamplingConfig):
    """Sampling of training rollouts; `samples` is the group size G."""

    samples: int = setting(8, "Group size G: rollouts per problem.", ge=2)
    engine: Literal["transformers", "vllm", "server", "auto"] = setting(
        "transformers",
        "Sampling engine for training and evaluation. server: a running `vllm serve`. auto: vllm if it is installed "
        "and model.device resolves to CUDA, else transformers.",
    )
    imported: str = setting(
        "",
        "Digest of the rollouts that `ogls import` made round 1 from. That command sets it, and the run keeps it: a "
        "configuration need not name it. Empty: round 1 is sampled.",
        later=True,
    )
    vllm: VllmConfig = setting(VllmConfig(), "The vLLM engine.")
    server: ServerConfig = setting(ServerConfig(), "A running vLLM server.")

    def decodes_together(self, engine: str) -> bool:
        """Whether an engine, by its name, works on the requests of several shards together."""
        return engine == "server" or (engine == "vllm" and self.vllm.one_queue)
