"""What every engine offers: completions for requests, each decided by its own seed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from importlib.util import find_spec
from typing import Any, Protocol

from ogls.adapter import Adapter
from ogls.config import ModelConfig, RunConfig, SamplingConfig
from ogls.policy import Policy, device_of
from ogls.prompts import Prompter
from ogls.records import Completion, Problem, Request
from ogls.seeds import derive_seed


class Sampler(Protocol):
    """Samples completions of the policy in use.

    A completion depends on its request alone, not on what is sampled beside it (up to rounding in the
    model's own arithmetic). Log-probs are those of the policy at temperature 1, before top-p and top-k.
    """

    restarts: int  # times that the engine died and was started anew

    @property
    def hash(self) -> str:
        """Hash of the adapter in use (`base` for none); it is written to every trajectory."""
        ...

    def use(self, adapter: Adapter | None) -> None:
        """Sample from this adapter from now on; None stands for the base model."""
        ...

    def sample(self, requests: Sequence[Request], sampling: SamplingConfig) -> list[Completion]:
        """One completion a request, in their order."""
        ...

    def rest(self) -> None:
        """Nothing is sampled for a while: give back what memory can be given back."""
        ...


def engine_of(config: RunConfig) -> str:
    """The engine that samples here: what `rollout.engine` says, with auto resolved."""
    if config.rollout.engine != "auto":
        return config.rollout.engine
    there = find_spec("vllm") is not None and device_of(config.model).type == "cuda"
    return "vllm" if there else "transformers"


def make_sampler(engine: str, policy: Policy | None, config: RunConfig | None = None) -> Sampler:
    """The engine of that name. transformers samples from `policy`; others load the model of `config` themselves."""
    if engine == "transformers" and policy:
        from ogls.engines.transformers import TransformersSampler

        return TransformersSampler(policy)
    if engine == "vllm" and config:
        from ogls.engines.vllm import VllmSampler, require_vllm

        require_vllm()
        return VllmSampler(config)
    if engine == "server" and config:
        from ogls.engines.server import ServerSampler

        return ServerSampler(config)
    raise ValueError(f"no engine {engine}")


def completion_of(token_ids: Sequence[int], logprobs: Sequence[float], text: str, stops: Collection[int]) -> Completion:
    """A completion as every engine returns it."""
    return Completion(tuple(token_ids), tuple(logprobs), text, "stop" if token_ids[-1] in stops else "length")


def requests_for(
    problems: Sequence[Problem], prompter: Prompter, samples: int, run_seed: int, *purpose: Any
) -> list[Request]:
    """`samples` requests a problem, in order; seeds derive from (run, purpose, problem, sample)."""
    requests = []
    for problem in problems:
        ids = tuple(prompter.student(problem.problem))
        for sample in range(samples):
            seed = derive_seed(run_seed, *purpose, problem.problem_id, sample)
            requests.append(Request(problem.problem_id, sample, ids, seed))
    return requests


def check_context(model: ModelConfig, context: int, prompt_tokens: int, max_tokens: int) -> str:
    """Why a prompt and its completion do not fit the model's context; empty if they do."""
    needed = prompt_tokens + max_tokens
    return f"{needed} tokens with its completion; {model.path} takes {context}" if needed > context else ""
