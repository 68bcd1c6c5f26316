"""Choosing and creating the sampling engine."""

from __future__ import annotations

from importlib.util import find_spec

from ogls.config import RunConfig
from ogls.models.load import resolve_device
from ogls.models.policy import Policy
from ogls.samplers.base import Sampler


def resolve_engine(config: RunConfig) -> str:
    """The engine that samples here: what `rollout.engine` says, with auto resolved."""
    if config.rollout.engine != "auto":
        return config.rollout.engine
    there = find_spec("vllm") is not None and resolve_device(config.model).type == "cuda"
    return "vllm" if there else "transformers"


def create_sampler(engine: str, policy: Policy | None, config: RunConfig | None = None) -> Sampler:
    """The engine of that name. transformers samples from `policy`; others load the model of `config` themselves."""
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
