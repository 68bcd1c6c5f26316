"""The protocol of every sampling engine: one completion for each request, determined by the seed of the request."""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from typing import Protocol

from ogls.config import SamplingConfig
from ogls.models.adapter import Adapter
from ogls.records import Completion, Request

Batch = tuple[Sequence[Request], SamplingConfig]


class Sampler(Protocol):
    """Samples completions of the policy in use.

    A completion depends on its request alone and not on the rest of the batch (up to rounding in the model).
    Log-probs are those of the policy at temperature 1, before top-p and top-k.
    """

    restarts: int  # how many times the engine died and was restarted

    @property
    def hash(self) -> str:
        """Hash of the adapter in use (`base` for the base model); it is written to every trajectory."""
        ...

    def use_adapter(self, adapter: Adapter | None) -> None:
        """Sample from this adapter from now on; None selects the base model."""
        ...

    def sample(self, requests: Sequence[Request], sampling: SamplingConfig) -> list[Completion]:
        """One completion a request, in the order of the requests."""
        ...

    def sample_batches(self, batches: Sequence[Batch]) -> Generator[tuple[int, list[Completion]]]:
        """Yield the index of each batch with its completions as soon as it is complete, in any order.

        An engine that decodes several batches together has all of them, so none waits for the longest completion of
        another. Take all of them, or close the generator.
        """
        ...

    def release_memory(self) -> None:
        """Release memory that is not needed until the next call of `sample`."""
        ...


def sample_in_turn(sampler: Sampler, batches: Sequence[Batch]) -> Generator[tuple[int, list[Completion]]]:
    """`sample_batches` for an engine that is full with one batch."""
    for index, (requests, sampling) in enumerate(batches):
        yield index, sampler.sample(requests, sampling)


def make_completion(
    token_ids: Sequence[int], logprobs: Sequence[float], text: str, stops: Collection[int]
) -> Completion:
    """A Completion; its finish reason is `stop` if the last token is a stop token, else `length`."""
    return Completion(tuple(token_ids), tuple(logprobs), text, "stop" if token_ids[-1] in stops else "length")
