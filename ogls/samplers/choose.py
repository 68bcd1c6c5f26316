"""Choosing and creating the sampling engine."""

from __future__ import annotations

from importlib.util import find_spec

from ogls.config import RunConfig
from ogls.models.load import resolve_device
from ogls.models.policy import Policy
from ogls.samplers.base import Sampler


def resolve_engine(config: RunConfig) -> str:
    """The engine that `rollout.engine` selects on this machine."""
    if config.rollout.engine != "auto":
        return config.rollout.engine
    has_vllm = find_spec("vllm") is not None and resolve_device(config.model).type == "cuda"
    return "vllm" if has_vllm else "transformers"


def create_sampler(engine: str, policy: Policy | None, config: RunConfig | None = None) -> Sampler:
    """Create an engine by name. transformers samples from `policy`; the others load the model of `config` themselves.

    Raises ValueError for an unknown name, ModelError if vLLM is not installed.
    """
    if engine == "transformers" and policy:
        from ogls.samplers.transformers import TransformersSampler

        return TransformersSampler(policy)
    if engine == "vllm" and config:
        from ogls.samplers.vllm import VllmSampler, require_vllm

        require_vllm()
        return VllmSampler(config)
    if engine == "server" and config:
        from ogls.samplers.server import ServerSampler

        return ServerSampler(config)
    raise ValueError(f"no engine {engine}")
