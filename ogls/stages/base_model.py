"""The base model beside a sampling engine, for the log-probs of completions under it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ogls.distillation.teacher import rollout_logprobs
from ogls.models.policy import Policy
from ogls.samplers.base import Sampler
from ogls.stages.run import Run


class BaseModel:
    """Computes log-probs under the base model. At no time are both it and the engine in the memory of a GPU.

    The transformers engine has the model already: its trained weights are put aside. With another engine, the model
    waits on the CPU while the engine samples, and the engine sleeps while the model runs.
    """

    def __init__(self, run: Run, sampler: Sampler):
        self.run, self.sampler = run, sampler
        self.takes_turns = getattr(sampler, "cuda", False)  # with an engine that has a model of its own on a GPU
        self._own: Policy | None = None
        self._device: Any = None

    def logprobs(self, prompts: Sequence[tuple[int, ...]], completions: Sequence[tuple[int, ...]]) -> list[float]:
        """The log-probability (nats, summed over tokens) of each completion given its prompt."""
        batch_tokens = self.run.config.teacher.batch_tokens
        if policy := getattr(self.sampler, "policy", None):  # the transformers engine
            with policy.base_weights():
                return rollout_logprobs(policy, prompts, completions, batch_tokens)
        self.sampler.release_memory()
        if self._own is None:
            self._own = self.run.load_policy()
            self._device = self._own.device
        self._own.move_to(self._device)
        try:
            return rollout_logprobs(self._own, prompts, completions, batch_tokens)
        finally:
            if self._device.type == "cuda":
                self._own.move_to("cpu")  # the engine gives the cached memory back before it wakes up
