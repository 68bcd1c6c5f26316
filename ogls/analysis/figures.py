"""Figures as PNG bytes, with colours for colour-blind readers and units on the axes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
_MARKERS = "osD^vPX"


def line_style(number: int, label: str) -> dict[str, Any]:
    """Colour, marker and line style of the n-th series; from the eighth on dashed, so that no two look the same."""
    line = ("-", "--", ":")[number // 7 % 3]
    return {"color": COLOURS[number % 7], "marker": _MARKERS[number % 7], "linestyle": line, "label": label}


def sweep_figure(rows: Sequence[dict[str, Any]], positions: Sequence[dict[str, Any]], title: str) -> bytes:
    """Strength against KL and AUC, and AUC by position at each recipe's best strength."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    by_kl, by_auc, by_place = figure.subplots(1, 3)
    for number, recipe in enumerate(dict.fromkeys(r["recipe"] for r in rows)):
        style = line_style(number, recipe)
        mine = [r for r in rows if r["recipe"] == recipe]
        if mine[0]["strength"] is None:
            by_kl.axhline(mine[0]["kl"], color=style["color"], linestyle="--", label=recipe)
            if mine[0]["auc"] is not None:
                by_auc.axhline(mine[0]["auc"], color=style["color"], linestyle="--", label=recipe)
        else:
            by_kl.plot([r["strength"] for r in mine], [r["kl"] for r in mine], **style)
            judged = [r for r in mine if r["auc"] is not None]
            by_auc.plot([r["strength"] for r in judged], [r["auc"] for r in judged], **style)
        best = max(mine, key=lambda r: r["auc"] or 0)
        there = [p for p in positions if (p["recipe"], p["strength"]) == (recipe, best["strength"])]
        there = [p for p in there if p["auc"] is not None]
        label = recipe if best["strength"] is None else f"{recipe} {best['strength']:g}"
        middles = [(p["position_from"] + p["position_to"]) / 2 for p in there]
        by_place.plot(middles, [p["auc"] for p in there], **{**style, "label": label})
    for axes in (by_auc, by_place):
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
    by_kl.set_ylabel("KL(target || base), nats a token")
    by_place.set_xlabel("position in the rollout, tokens")
    for axes in (by_kl, by_auc, by_place):
        axes.legend(fontsize=8)
    figure.suptitle(title)
    return _png(figure)


def run_figure(rounds: Sequence[int], summaries: Sequence[Mapping[str, Any]]) -> bytes:
    """Accuracy with its 95% interval, greedy accuracy, and mean length, by round, as a small figure."""
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
    return _png(figure)


_CURVE_LABELS = {
    "accuracy": "accuracy (avg@k)",
    "greedy_accuracy": "greedy accuracy",
    "mean_length": "length, tokens",
    "entropy": "entropy, nats a token",
    "kl_base": "KL(policy || base), nats a token",
    "truncated": "truncated, share",
    "distinct_answers": "distinct answers a problem",
}


def study_figure(
    curves: Mapping[str, Sequence[dict[str, Any]]], passes: Sequence[dict[str, Any]], a_round: int, title: str
) -> bytes:
    """One panel a measure over rollouts, with bands over seeds, and pass@k of the last round."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 7.5), layout="constrained")
    panels = figure.subplots(2, 4).flat
    shown: list[tuple[Any, Sequence[dict[str, Any]], str, float, str]] = [
        (axes, rows, "round", a_round, _CURVE_LABELS[measure])
        for axes, (measure, rows) in zip(panels, curves.items(), strict=False)
    ]
    shown.append((figure.axes[7], passes, "k", 1, "pass@k, last round"))
    methods = list(dict.fromkeys(row["method"] for _, rows, *_ in shown for row in rows))
    for axes, rows, across, scale, label in shown:
        for number, method in enumerate(methods):
            mine = [r for r in rows if r["method"] == method]
            style = {**line_style(number, method), "markersize": 4}
            x = [r[across] * scale for r in mine]
            axes.plot(x, [r["mean"] for r in mine], **style)
            axes.fill_between(
                x, [r["low"] for r in mine], [r["high"] for r in mine], color=style["color"], alpha=0.15, linewidth=0
            )
        axes.set_xlabel("k" if across == "k" else "rollouts")
        axes.set_ylabel(label)
        if label.endswith("share"):
            axes.set_ylim(bottom=0)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=9, fontsize=9)
    figure.suptitle(title)
    return _png(figure)


def _png(figure: Any) -> bytes:
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=110, metadata={"Software": None})
    return sink.getvalue()
