"""Metrics of evaluation completions: avg@k and pass@k with intervals, lengths, truncation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

_RESAMPLED_AT_ONCE = 2**20  # values that a bootstrap holds in memory


def summarize(rows: Sequence[dict[str, Any]], benchmark: str, place: int, resamples: int, seed: int) -> dict[str, Any]:
    """One row of the table `summaries` from the `scores` rows of a benchmark."""
    sampled: dict[str, list[dict[str, Any]]] = defaultdict(list)
    greedy: list[bool] = []
    for row in rows:
        if row["greedy"]:
            greedy.append(row["verdict"] == "correct")
        else:
            sampled[row["problem_id"]].append(row)
    correct = np.array([[r["verdict"] == "correct" for r in group] for group in sampled.values()])
    drawn = [r for group in sampled.values() for r in group]
    lengths = np.array([r["n_tokens"] for r in drawn])
    logprob = sum(r["logprob"] for r in drawn)
    base = [r["base_logprob"] for r in drawn if r["base_logprob"] is not None]
    k = correct.shape[1]
    low, high = bootstrap_interval(correct.mean(1), resamples, seed)
    return {
        "benchmark": benchmark,
        "place": place,
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
        "truncated": float(np.mean([r["finish_reason"] == "length" for r in drawn])),
        "repeated": float(np.mean([r["repeated"] for r in drawn])),
        "stop_mass": float(np.mean([np.exp(r["last_logprob"]) * (r["finish_reason"] == "stop") for r in drawn])),
        "distinct_answers": float(np.mean([len({r["answer"] for r in group}) for group in sampled.values()])),
        "entropy": -float(logprob / lengths.sum()),
        "kl_base": float((logprob - sum(base)) / lengths.sum()) if len(base) == len(drawn) else None,
    }


def bootstrap_interval(values: np.ndarray, resamples: int, seed: int, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of [N] values, one a problem; no width for a single value."""
    from scipy import stats

    if len(values) == 1:
        return float(values[0]), float(values[0])
    found = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=resamples,
        batch=max(1, _RESAMPLED_AT_ONCE // len(values)),
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def ends_in_loop(token_ids: Sequence[int], times: int = 4, least: int = 16, longest: int = 64) -> bool:
    """Whether a completion ends in an n-gram of up to `longest` tokens, repeated `times` times over `least` tokens
    or more."""
    for n in range(1, longest + 1):
        tail = token_ids[-max(n * times, least) :]
        if len(tail) < max(n * times, least):
            return False
        if tail[n:] == tail[:-n]:
            return True
    return False


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased estimate of the probability that one of k samples is correct, from n samples with `correct` correct ones
    (2107.03374, eq. 1).

    1 - C(n - c, k) / C(n, k). Raises ValueError if k > n.
    """
    if k > n:
        raise ValueError(f"pass@{k} needs at least {k} samples, not {n}")
    if n - correct < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(n - correct + 1, n + 1)))
