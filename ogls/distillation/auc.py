"""How well a number tells correct rollouts from failed ones: over all rollouts, and within the groups of a problem."""

from __future__ import annotations

import numpy as np

_RESAMPLES, _SEED = 1000, 0


def auc(positive: np.ndarray, negative: np.ndarray) -> float | None:
    """Return the area under the ROC curve: the probability that a positive value is above a negative one, with ties
    counted half. Returns None if there is no positive or no negative value."""
    from scipy import stats

    if not len(positive) or not len(negative):
        return None
    u = stats.mannwhitneyu(positive, negative, method="asymptotic").statistic
    return float(u / (len(positive) * len(negative)))


def group_auc(values: np.ndarray, correct: np.ndarray, group: np.ndarray) -> tuple[float, float, float] | None:
    """Return the AUC over the pairs of a correct and a failed rollout of the same group, and its 95% interval.

    Arrays [N], one entry for each rollout. Pairs of one group share its problem, so the difficulty of problems plays no
    part, as in the direction, which contrasts rollouts of one group. The interval is a percentile bootstrap over groups
    (1,000 resamples, seed 0). Returns None if no group has both outcomes.
    """
    from scipy import stats

    wins, pairs = [], []
    for name in np.unique(group):
        member = group == name
        positive, negative = values[member & correct], values[member & ~correct]
        if len(positive) and len(negative):
            above = positive[:, None] - negative[None, :]
            wins.append(float((above > 0).sum() + 0.5 * (above == 0).sum()))
            pairs.append(above.size)
    if not pairs:
        return None
    value = sum(wins) / sum(pairs)
    if len(pairs) == 1:
        return value, value, value
    found = stats.bootstrap(
        (np.array(wins), np.array(pairs)),
        lambda w, n, axis: w.sum(axis) / n.sum(axis),
        paired=True,
        n_resamples=_RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(_SEED),
    ).confidence_interval
    return value, float(found.low), float(found.high)
