"""Means of the metrics of a loss: over the tokens of an optimizer step, and over the steps of a round."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ogls.training.contract import LossOutput


class MetricMeans:
    """Adds up the metrics of a step. A mean is over the tokens that have the metric, without token weights."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._tokens: dict[str, int] = {}

    def add(self, output: LossOutput) -> None:
        """Add the metrics of some tokens; one number counts once for each token."""
        import torch

        if not output.metrics:
            return
        tokens = len(output.loss)
        sums = [v.detach().float().expand(tokens).sum() for v in output.metrics.values()]
        for name, value in zip(output.metrics, torch.stack(sums).tolist(), strict=True):  # one copy to the CPU
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._tokens[name] = self._tokens.get(name, 0) + tokens

    def merge(self, other: MetricMeans) -> None:
        """Add the metrics of other tokens of the same step."""
        for name, value in other._sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._tokens[name] = self._tokens.get(name, 0) + other._tokens[name]

    def to_column(self) -> list[tuple[str, float | None]] | None:
        """Return the column `metrics` of the table updates: (name, mean), None for a mean that is not finite.

        None if the loss has no metrics.
        """
        means = {name: total / self._tokens[name] for name, total in sorted(self._sums.items())}
        return [(name, mean if math.isfinite(mean) else None) for name, mean in means.items()] or None


def round_means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the mean of each metric over the rows of the table updates that have a number for it."""
    values: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row["metrics"] or ():
            if value is not None:
                values.setdefault(name, []).append(value)
    return {name: sum(found) / len(found) for name, found in values.items()}
