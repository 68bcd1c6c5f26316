"""The teacher pass: the averaged final hidden states of rollouts under the contexts of their exemplars.

A context is a prompt with one exemplar (`exemplars.py`). Each context is prefilled once, and every rollout that it
scores continues from a copy of its key-value cache: G prefills and G (G - 1) short continuations per group, instead of
G (G - 1) full sequences. The head is not applied here. It is linear, so the head applied to the mean state over a pool
gives the mean of the pool's logits, and [T, D] states replace [T, V] logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

from ogls.config import Pool
from ogls.distillation.exemplars import ScoredRollout
from ogls.errors import ModelError
from ogls.models.continuation import run_continuations
from ogls.models.head import nll
from ogls.models.policy import Policy
from ogls.progress import Progress, no_progress
from ogls.records import Key

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


T = TypeVar("T")
_Prefixes = Sequence[Sequence[int]]
_Pairs = Sequence[tuple[int, Sequence[int]]]  # (index of a prefix, tokens of a continuation)
_HEAD_TOKENS = 1024  # tokens whose full-vocabulary logits are in memory at once


def score_rollouts(
    policy: Policy, scored: Sequence[ScoredRollout], batch_tokens: int, progress: Progress = no_progress
) -> dict[tuple[Key, Pool], Float[Tensor, "T D"]]:
    """Return the averaged final hidden states [T, D] of each rollout and pool, fp32 on the CPU.

    Runs the current weights of `policy`. State t of a rollout is the state that predicts its token t. Equal contexts
    and equal rollouts run once. A batch that does not fit into memory is repeated on halves. `progress` receives the
    number of finished and of all (context, rollout) pairs. Raises ModelError if a single sequence does not fit.
    """
    # context -> tokens of a rollout -> the means that their states contribute to, with weights
    contributions: dict[tuple[int, ...], dict[tuple[int, ...], list[tuple[tuple[Key, Pool], float]]]] = {}
    for item in scored:
        for context, share in item.shares:
            rows = contributions.setdefault(context.prompt_ids, {}).setdefault(item.token_ids, [])
            rows.append(((item.key, item.pool), share))

    def run_states(prefixes: _Prefixes, pairs: _Pairs) -> list[Tensor]:
        return [states.float().cpu() for states in run_continuations(policy, prefixes, pairs, batch_tokens)]

    advice = "in a new run, lower teacher.exemplar_tokens or train.tokens"
    means: dict[tuple[Key, Pool], Tensor] = {}
    done, total = 0, sum(len(rows) for rows in contributions.values())
    for batch in _batches(list(contributions), [max(map(len, contributions[c])) for c in contributions], batch_tokens):
        pairs = [(i, tokens) for i, context in enumerate(batch) for tokens in contributions[context]]
        for (i, tokens), states in zip(pairs, _within_memory(run_states, policy, batch, pairs, advice), strict=True):
            for rollout_pool, share in contributions[batch[i]][tokens]:
                term = states * share
                means[rollout_pool] = means[rollout_pool] + term if rollout_pool in means else term
        done += len(pairs)
        progress(done, total)
    return means


def _within_memory(
    work: Callable[[_Prefixes, _Pairs], list[T]], policy: Policy, prefixes: _Prefixes, pairs: _Pairs, advice: str
) -> list[T]:
    """Run `work`, which gives one result a pair. If memory runs out, repeat it on halves of `pairs`.

    Raises ModelError, with `advice`, if a single prefix with a single continuation does not fit.
    """
    import torch

    try:
        with torch.inference_mode():
            return work(prefixes, pairs)
    except torch.OutOfMemoryError:
        pass  # retry outside the handler: its traceback holds tensors of the failed pass
    if policy.device.type == "cuda":
        torch.cuda.empty_cache()
    if len(pairs) == 1:
        size = len(prefixes[pairs[0][0]]) + len(pairs[0][1])
        raise ModelError(f"out of memory on one sequence of {size} tokens: {advice}")
    half = len(pairs) // 2
    return [
        result
        for part in (pairs[:half], pairs[half:])
        for result in _within_memory(work, policy, *_drop_unused(prefixes, part), advice)
    ]


def _drop_unused(prefixes: _Prefixes, pairs: _Pairs) -> tuple[_Prefixes, _Pairs]:
    """Return the prefixes that `pairs` use, and the pairs with renumbered prefixes."""
    used = list(dict.fromkeys(i for i, _ in pairs))
    return [prefixes[i] for i in used], [(used.index(i), tokens) for i, tokens in pairs]


def rollout_logprobs(
    policy: Policy, prompts: Sequence[tuple[int, ...]], rollouts: Sequence[tuple[int, ...]], batch_tokens: int
) -> list[float]:
    """Return the log-probability (nats, summed over tokens) of each rollout given its prompt.

    Runs the current weights of `policy`. Equal prompts run once. Logits [1024, V] are in memory at once. A batch that
    does not fit into memory is repeated on halves. Raises ModelError if a single sequence does not fit.
    """
    import torch

    def sum_logprobs(prefixes: _Prefixes, pairs: _Pairs) -> list[float]:
        sums = []
        all_states = run_continuations(policy, prefixes, pairs, batch_tokens)
        for (_, rollout), states in zip(pairs, all_states, strict=True):
            ids = torch.tensor(rollout, device=states.device)
            parts = zip(states.split(_HEAD_TOKENS), ids.split(_HEAD_TOKENS), strict=True)
            sums.append(-sum(float(nll(part, policy.head, part_ids).sum()) for part, part_ids in parts))
        return sums

    advice = "set evaluate.base_kl = false in a new run, or lower evaluate.max_tokens there"
    indices: dict[tuple[int, ...], list[int]] = {}
    for index, prompt in enumerate(prompts):
        indices.setdefault(prompt, []).append(index)
    longest = [max(len(rollouts[i]) for i in indices[p]) for p in indices]
    logprobs = [0.0] * len(prompts)
    for batch in _batches(list(indices), longest, batch_tokens):
        pairs = [(n, i) for n, prompt in enumerate(batch) for i in indices[prompt]]
        sums = _within_memory(sum_logprobs, policy, batch, [(n, rollouts[i]) for n, i in pairs], advice)
        for (_, i), logprob in zip(pairs, sums, strict=True):
            logprobs[i] = logprob
    return logprobs


def _batches(contexts: list[tuple[int, ...]], longest: list[int], batch_tokens: int) -> Iterable[list[tuple[int, ...]]]:
    """Yield batches of contexts of similar length, each at most `batch_tokens` tokens with padding (or one context).

    `longest` is the length of the longest rollout of each context.
    """
    order = sorted(range(len(contexts)), key=lambda i: (len(contexts[i]), longest[i], contexts[i]))
    batch: list[tuple[int, ...]] = []
    for i in order:
        if batch and (len(batch) + 1) * len(contexts[i]) > batch_tokens:
            yield batch
            batch = []
        batch.append(contexts[i])
    if batch:
        yield batch
