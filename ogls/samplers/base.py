"""The protocol of every sampling engine: completions for requests, each decided by its own seed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from ogls.config import SamplingConfig
from ogls.models.adapter import Adapter
from ogls.records import Completion, Request


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

    def use_adapter(self, adapter: Adapter | None) -> None:
        """Sample from this adapter from now on; None stands for the base model."""
        ...

    def sample(self, requests: Sequence[Request], sampling: SamplingConfig) -> list[Completion]:
        """One completion a request, in their order."""
        ...

    def release_memory(self) -> None:
        """Nothing is sampled for a while: give back what memory can be given back."""
        ...


def make_completion(
    token_ids: Sequence[int], logprobs: Sequence[float], text: str, stops: Collection[int]
) -> Completion:
    """A completion as every engine returns it."""
    return Completion(tuple(token_ids), tuple(logprobs), text, "stop" if token_ids[-1] in stops else "length")
