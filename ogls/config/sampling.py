"""How completions are sampled, and by which engine: shared by rollouts and evaluation."""

from __future__ import annotations

from typing import Literal

from ogls.config.section import Section, setting


class SamplingConfig(Section):
    """How completions are drawn."""

    samples: int = setting(8, "Completions a problem.", ge=1)
    temperature: float = setting(1.0, "Sampling temperature; 0 is greedy.", ge=0)
    top_p: float = setting(1.0, "Nucleus: smallest set of tokens with this probability.", gt=0, le=1)
    top_k: int = setting(0, "Draw from the so many likeliest tokens only; 0 from all.", ge=0)
    min_p: float = setting(
        0.0,
        "Only tokens with at least this share of the likeliest one's probability are drawn.",
        ge=0,
        le=1,
        later=True,
    )
    max_tokens: int = setting(8192, "Longest completion, in tokens.", ge=1)
    batch_size: int = setting(256, "Completions sampled together; also the rows of a shard.", ge=1)


class VllmConfig(Section):
    """The vLLM engine. Nothing here changes a result beyond rounding."""

    gpu_memory: float = setting(0.85, "Share of a GPU's memory that it takes.", gt=0, le=1, operational=True)
    cpu_cache_gib: int = setting(1, "GiB of key-value cache on a CPU.", ge=1, operational=True)
    max_sequences: int = setting(256, "Most completions decoded at once.", ge=1, operational=True)
    batched_tokens: int = setting(16384, "Most tokens in one step of the engine.", ge=1, operational=True)
    prompt_tokens: int = setting(2048, "Room for a prompt beside the longest completion.", ge=1, operational=True)
    tensor_parallel: int = setting(1, "GPUs that one engine is spread over.", ge=1, operational=True)
    stall_seconds: float = setting(
        3600.0, "Wall limit of one batch; an engine that takes longer is taken for hung.", gt=0, operational=True
    )


class ServerConfig(Section):
    """A running vLLM server, for rollout.engine = server."""

    url: str = setting("http://127.0.0.1:8000", "Its address, without /v1.", operational=True)
    adapters: str = setting(
        "data/served", "Folder that the server can read too, for the rounds' adapters.", operational=True
    )
    at_once: int = setting(64, "Most completions asked for at once.", ge=1, operational=True)
    timeout_seconds: float = setting(3600.0, "Wall limit of one completion.", gt=0, operational=True)


class RolloutConfig(SamplingConfig):
    """Sampling of training rollouts; `samples` is the group size G."""

    samples: int = setting(8, "Group size G: rollouts a problem.", ge=2)
    engine: Literal["transformers", "vllm", "server", "auto"] = setting(
        "transformers",
        "What samples, in training and evaluation. server: a running `vllm serve`. auto: vllm where it is installed "
        "and there is CUDA, else transformers.",
    )
    vllm: VllmConfig = setting(VllmConfig(), "The vLLM engine.", operational=True)
    server: ServerConfig = setting(ServerConfig(), "A running vLLM server.", operational=True)
