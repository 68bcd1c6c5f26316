"""Metrics: pass@k compared with brute force, coverage of intervals, and a summary computed by hand."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest

from ogls.evaluation.metrics import bootstrap_interval, pass_at_k, summarize


@pytest.mark.parametrize(("n", "c"), [(5, 0), (5, 1), (5, 3), (5, 5), (8, 2)])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(n: int, c: int) -> None:
    for k in range(1, n + 1):
        subsets = list(combinations([True] * c + [False] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_more_than_the_number_of_samples_raises_an_error() -> None:
    with pytest.raises(ValueError, match="pass@5 needs at least 5 samples, but there are 4"):
        pass_at_k(4, 1, 5)


def test_the_interval_covers_the_mean_at_its_confidence_level() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(300):
        low, high = bootstrap_interval(rng.binomial(4, 0.6, size=60) / 4, 400, trial)
        covered += low <= 0.6 <= high
    assert 0.91 <= covered / 300 <= 0.98


def row(problem: str, sample: int, verdict: str, length: int, answer: str | None, greedy: bool = False) -> dict:
    """A row of the table `scores`."""
    reason = "length" if verdict == "truncated" else "stop"
    return {
        "problem_id": problem,
        "sample": sample,
        "verdict": verdict,
        "n_tokens": length,
        "answer": answer,
        "greedy": greedy,
        "finish_reason": reason,
        "logprob": -0.5 * length,
        "base_logprob": -0.75 * length,
        "last_logprob": math.log(0.8),
        "repeated": length == 40,
    }


def test_a_summary_computed_by_hand() -> None:
    rows = [
        row("a", 0, "correct", 10, "1"),
        row("a", 1, "correct", 20, "1"),
        row("b", 0, "incorrect", 30, "2"),
        row("b", 1, "truncated", 40, None),
        row("a", 0, "correct", 99, "1", greedy=True),
        row("b", 0, "incorrect", 99, "1", greedy=True),
    ]
    got = summarize(rows, "bench", 0, 200, 0)
    assert got["problems"] == got["samples"] == 2
    assert got["accuracy"] == got["greedy_accuracy"] == got["pass_at_k"] == 0.5
    assert (got["accuracy_low"], got["accuracy_high"]) == (0.0, 1.0)
    assert (got["mean_length"], got["length_p50"]) == (25, 25)
    assert got["truncated"] == 0.25
    assert got["repeated"] == 0.25
    assert got["stop_mass"] == pytest.approx(0.6)  # 0.8 three times, and 0 for the truncated one
    assert got["distinct_answers"] == 1.5
    assert got["entropy"] == pytest.approx(0.5)
    assert got["kl_base"] == pytest.approx(0.25)
    assert summarize([{**r, "base_logprob": None} for r in rows], "bench", 0, 200, 0)["kl_base"] is None
