"""Sampling with transformers: a plain decoding loop over the key-value cache.

Each token is sampled by inverting the CDF at a uniform number from a counter-based random stream of the rollout, so
neither the batch nor its order affects the result.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import DynamicCache

from ogls.config import SamplingConfig
from ogls.models.adapter import Adapter
from ogls.models.policy import Policy
from ogls.records import Completion, Request
from ogls.samplers.base import Batch, make_completion, sample_in_turn
from ogls.samplers.draw import sample_tokens

if TYPE_CHECKING:
    from torch import Tensor


class TransformersSampler:
    """Samples from a loaded policy (see `base.Sampler`)."""

    restarts = 0

    def __init__(self, policy: Policy):
        self.policy = policy

    @property
    def hash(self) -> str:
        return self.policy.hash

    def use_adapter(self, adapter: Adapter | None) -> None:
        self.policy.use_adapter(adapter)

    def release_memory(self) -> None:
        """Does nothing: the caller owns the policy."""

    def sample(self, requests: Sequence[Request], sampling: SamplingConfig) -> list[Completion]:
        """One completion a request; `sampling.batch_size` requests are decoded together."""
        size = sampling.batch_size
        batches = (requests[i : i + size] for i in range(0, len(requests), size))
        with self.policy.merged():
            return [completion for batch in batches for completion in self._batch(batch, sampling)]

    def sample_batches(self, batches: Sequence[Batch]) -> Generator[tuple[int, list[Completion]]]:
        """Yield the completions of one batch after the other."""
        return sample_in_turn(self, batches)

    @torch.inference_mode()
    def _batch(self, requests: Sequence[Request], sampling: SamplingConfig) -> list[Completion]:
        policy, device = self.policy, self.policy.device
        uniforms = torch.from_numpy(np.stack([_uniforms(r.seed, sampling.max_tokens) for r in requests])).to(device)
        stops = torch.tensor(policy.stop_ids, device=device)
        ids, mask = _left_pad([r.prompt_ids for r in requests], policy.tokenizer.pad_token_id or 0)
        ids, mask = ids.to(device), mask.to(device)
        position = mask.sum(1, keepdim=True)
        cache = DynamicCache(config=policy.body.config)
        out = policy.run_body(
            ids, mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), past_key_values=cache, use_cache=True
        )
        active = torch.arange(len(requests), device=device)
        steps: list[tuple[Tensor, Tensor, Tensor]] = []
        for t in range(sampling.max_tokens):
            logits = policy.logits(out.last_hidden_state[:, -1])
            cuts = sampling.top_k, sampling.top_p, sampling.min_p
            token = sample_tokens(logits, uniforms[active, t], sampling.temperature, *cuts)
            logprob = logits.gather(1, token[:, None])[:, 0] - logits.logsumexp(1)
            steps.append((active, token, logprob))
            unfinished = ~torch.isin(token, stops)
            if not unfinished.any() or t + 1 == sampling.max_tokens:
                break
            keep = unfinished.nonzero()[:, 0]
            if len(keep) < len(active):
                cache.batch_select_indices(keep)
                active, token, mask, position = active[keep], token[keep], mask[keep], position[keep]
            mask = torch.cat([mask, mask.new_ones(len(active), 1)], 1)
            out = policy.run_body(token[:, None], mask, position_ids=position, past_key_values=cache, use_cache=True)
            position = position + 1
        return self._completions(len(requests), steps)

    def _completions(self, count: int, steps: list[tuple[Tensor, Tensor, Tensor]]) -> list[Completion]:
        tokens: list[list[int]] = [[] for _ in range(count)]
        logprobs: list[list[float]] = [[] for _ in range(count)]
        for rows, token, logprob in steps:
            for row, i, p in zip(rows.tolist(), token.tolist(), logprob.tolist(), strict=True):
                tokens[row].append(i)
                logprobs[row].append(p)
        texts = self.policy.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        stops = set(self.policy.stop_ids)
        return [make_completion(ids, lps, text, stops) for ids, lps, text in zip(tokens, logprobs, texts, strict=True)]


def _uniforms(seed: int, count: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=seed)).random(count)


def _left_pad(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(r)) + list(r) for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    return ids, mask
