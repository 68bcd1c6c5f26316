"""Figures as PNG bytes, with colours for colour-blind readers and units on the axes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
_MARKERS = "osD^vPX"


def line_style(index: int, label: str) -> dict[str, Any]:
    """Return colour, marker and line style of a series, with its label.

    From index 7 on, lines are dashed or dotted, so that no two of 21 series look the same.
    """
    line = ("-", "--", ":")[index // 7 % 3]
    return {"color": COLOURS[index % 7], "marker": _MARKERS[index % 7], "linestyle": line, "label": label}


def sweep_figure(rows: Sequence[dict[str, Any]], positions: Sequence[dict[str, Any]], title: str) -> bytes:
    """Return a PNG with KL and AUC by strength, and AUC by position at the best strength of each recipe."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    by_kl, by_auc, by_position = figure.subplots(1, 3)
    for index, recipe in enumerate(dict.fromkeys(r["recipe"] for r in rows)):
        style = line_style(index, recipe)
        of_recipe = [r for r in rows if r["recipe"] == recipe]
        if of_recipe[0]["strength"] is None:
            by_kl.axhline(of_recipe[0]["kl"], color=style["color"], linestyle="--", label=recipe)
            if of_recipe[0]["auc"] is not None:
                by_auc.axhline(of_recipe[0]["auc"], color=style["color"], linestyle="--", label=recipe)
        else:
            by_kl.plot([r["strength"] for r in of_recipe], [r["kl"] for r in of_recipe], **style)
            with_auc = [r for r in of_recipe if r["auc"] is not None]
            by_auc.plot([r["strength"] for r in with_auc], [r["auc"] for r in with_auc], **style)
        best = max(of_recipe, key=lambda r: r["auc"] or 0)
        bins = [p for p in positions if (p["recipe"], p["strength"]) == (recipe, best["strength"])]
        bins = [p for p in bins if p["auc"] is not None]
        label = recipe if best["strength"] is None else f"{recipe} {best['strength']:g}"
        middles = [(p["position_from"] + p["position_to"]) / 2 for p in bins]
        by_position.plot(middles, [p["auc"] for p in bins], **{**style, "label": label})
    for axes in (by_auc, by_position):
        axes.axhline(0.5, color="#999999", linewidth=0.8)
        axes.set_ylabel("AUC, correct over failed rollouts")
    strengths = [r["strength"] for r in rows if r["strength"]]
    for axes in (by_kl, by_auc):
        axes.set_xlabel("strength (lambda, a)")
        if strengths:
            axes.set_xscale("log")
            axes.set_xlim(min(strengths) / 1.3, max(strengths) * 1.3)
    if any(r["kl"] > 0 for r in rows):
        by_kl.set_yscale("log")
    by_kl.set_ylabel("KL(target || base), nats per token")
    by_position.set_xlabel("position in the rollout, tokens")
    for axes in (by_kl, by_auc, by_position):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    figure.suptitle(title)
    return png(figure)


def run_figure(rounds: Sequence[int], summaries: Sequence[Mapping[str, Any]]) -> bytes:
    """Return a small PNG: accuracy with its 95% interval, greedy accuracy, and mean length, by round."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.8), layout="constrained")
    accuracy, length = figure.subplots(1, 2)
    accuracy.fill_between(
        rounds,
        [s["accuracy_low"] for s in summaries],
        [s["accuracy_high"] for s in summaries],
        color=COLOURS[0],
        alpha=0.2,
        linewidth=0,
    )
    accuracy.plot(rounds, [s["accuracy"] for s in summaries], **line_style(0, "sampled, 95% interval"))
    accuracy.plot(rounds, [s["greedy_accuracy"] for s in summaries], **line_style(1, "greedy"))
    accuracy.set_ylabel("accuracy")
    accuracy.legend(fontsize=7)
    length.plot(rounds, [s["mean_length"] for s in summaries], **line_style(2, "length"))
    length.set_ylabel("mean length, tokens")
    length.set_ylim(0, 1.15 * max(s["mean_length"] for s in summaries))
    for axes in (accuracy, length):
        axes.set_xlabel("round")
        axes.xaxis.get_major_locator().set_params(integer=True)
    return png(figure)


def png(figure: Any) -> bytes:
    """Return the figure as PNG, without the version of the library in it."""
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=110, metadata={"Software": None})
    return sink.getvalue()
