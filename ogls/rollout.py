"""What every engine offers: completions for requests, each decided by its own seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from ogls.config import ModelConfig, SamplingConfig
from ogls.policy import Adapter, Policy
from ogls.prompts import Prompter
from ogls.records import Completion, Problem, Request
from ogls.seeds import derive_seed


class Sampler(Protocol):
    """Samples completions of the policy in use.

    A completion depends on its request alone, not on what is sampled beside it (up to rounding in the
    model's own arithmetic). Log-probs are those of the policy at temperature 1, before top-p and top-k.
    """

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


def make_sampler(engine: str, policy: Policy) -> Sampler:
    """The engine of that name (`rollout.engine`)."""
    if engine == "transformers":
        from ogls.engines.transformers import TransformersSampler

        return TransformersSampler(policy)
    raise ValueError(f"no engine {engine}")


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
