"""Metrics of evaluation completions: avg@k and pass@k with intervals, lengths, truncation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

_RESAMPLED_AT_ONCE = 2**20  # values of bootstrap resamples in memory at once


def summarize(rows: Sequence[dict[str, Any]], benchmark: str, index: int, resamples: int, seed: int) -> dict[str, Any]:
    """Return the row of the table `summaries` for one benchmark from its rows of the table `scores`.

    `index` is the index of the benchmark in the configuration; `resamples` and `seed` are those of the bootstrap over
    problems. Every problem must have the same number k of sampled completions. Greedy completions count only in
    `greedy_accuracy`. Lengths are in tokens. `entropy` and `kl_base` are Monte Carlo estimates from the sampled
    completions, in nats per token; `kl_base` is None if a log-prob under the base model is missing.
    """
    sampled: dict[str, list[dict[str, Any]]] = defaultdict(list)
    greedy: list[bool] = []
    for row in rows:
        if row["greedy"]:
            greedy.append(row["verdict"] == "correct")
        else:
            sampled[row["problem_id"]].append(row)
    correct = np.array([[r["verdict"] == "correct" for r in group] for group in sampled.values()])
    completions = [r for group in sampled.values() for r in group]
    lengths = np.array([r["n_tokens"] for r in completions])
    logprob = sum(r["logprob"] for r in completions)
    base = [r["base_logprob"] for r in completions if r["base_logprob"] is not None]
    k = correct.shape[1]
    low, high = bootstrap_interval(correct.mean(1), resamples, seed)
    return {
        "benchmark": benchmark,
        "place": index,
        "problems": len(correct),
        "samples": k,
        "accuracy": float(correct.mean()),
        "accuracy_low": low,
        "accuracy_high": high,
        "greedy_accuracy": float(np.mean(greedy)),
        "pass_at_k": float(np.mean([pass_at_k(k, int(c), k) for c in correct.sum(1)])),
        "mean_length": float(lengths.mean()),
        "length_p50": float(np.percentile(lengths, 50)),
        "length_p95": float(np.percentile(lengths, 95)),
        "truncated": float(np.mean([r["finish_reason"] == "length" for r in completions])),
        "repeated": float(np.mean([r["repeated"] for r in completions])),
        "stop_mass": float(np.mean([np.exp(r["last_logprob"]) * (r["finish_reason"] == "stop") for r in completions])),
        "distinct_answers": float(np.mean([len({r["answer"] for r in group}) for group in sampled.values()])),
        "entropy": -float(logprob / lengths.sum()),
        "kl_base": float((logprob - sum(base)) / lengths.sum()) if len(base) == len(completions) else None,
    }


def bootstrap_interval(values: np.ndarray, resamples: int, seed: int, level: float = 0.95) -> tuple[float, float]:
    """Return (low, high) of the percentile bootstrap interval of the mean of `values` [N], one value per problem.

    `level` is the confidence level. A single value has an interval of width 0.
    """
    from scipy import stats

    if len(values) == 1:
        return float(values[0]), float(values[0])
    result = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=resamples,
        batch=max(1, _RESAMPLED_AT_ONCE // len(values)),
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    # Not result.confidence_interval: its quantiles differ from numpy's in the last bit, and old summaries have numpy's.
    low, high = np.quantile(result.bootstrap_distribution, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def ends_in_loop(token_ids: Sequence[int], repeats: int = 4, min_tokens: int = 16, max_ngram: int = 64) -> bool:
    """Return whether a completion ends in a repetition loop.

    A loop is an n-gram of at most `max_ngram` tokens that occurs at least `repeats` times in a row and covers at least
    `min_tokens` tokens.
    """
    for n in range(1, max_ngram + 1):
        tail = token_ids[-max(n * repeats, min_tokens) :]
        if len(tail) < max(n * repeats, min_tokens):
            return False
        if tail[n:] == tail[:-n]:
            return True
    return False


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Return the unbiased estimate of pass@k, 1 - C(n - c, k) / C(n, k) (arXiv 2107.03374, eq. 1).

    It is the probability that at least one of k samples is correct, estimated from n samples of which c = `correct` are
    correct. Raises ValueError if k > n.
    """
    if k > n:
        raise ValueError(f"pass@{k} needs at least {k} samples, but there are {n}")
    if n - correct < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(n - correct + 1, n + 1)))
