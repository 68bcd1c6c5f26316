"""The figures of the report as inline SVG: they use the colours of the page, light or dark, and their text is
selectable."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from ogls.analysis.figures import COLOURS, line_style

Rows = Sequence[Mapping[str, Any]]


_INK = "#010203"  # placeholder for the text colour of the page


_RC: dict[Any, Any] = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
    **{"svg.fonttype": "none", "font.size": 9, "legend.frameon": False, "axes.spines.top": False},
    **{"axes.spines.right": False, "font.family": "sans-serif", "figure.facecolor": "none", "axes.facecolor": "none"},
}


def curves(summaries: Mapping[str, Rows]) -> Markup:
    """Accuracy by round with its 95% interval over problems, and greedy accuracy; a line a run."""
    with _drawing(9, 3.2, "Accuracy by round, sampled with 95% interval, and greedy") as page:
        sampled, greedy = page.figure.subplots(1, 2, sharey=True)
        for number, (run, rows) in enumerate(summaries.items()):
            rounds = [r["round"] for r in rows]
            style = line_style(number, run)
            low, high = [r["accuracy_low"] for r in rows], [r["accuracy_high"] for r in rows]
            sampled.fill_between(rounds, low, high, color=style["color"], alpha=0.2, linewidth=0)
            sampled.plot(rounds, [r["accuracy"] for r in rows], **style)
            greedy.plot(rounds, [r["greedy_accuracy"] for r in rows], **style)
        sampled.set_ylabel("accuracy (avg@k), 95% interval")
        greedy.set_ylabel("greedy accuracy")
        _rounds(sampled, greedy)
        sampled.legend()
    return page.svg


_MEASURES = {
    "mean_length": "length, tokens",
    "entropy": "entropy, nats a token",
    "kl_base": "KL(policy || base), nats a token",
    "truncated": "truncated, share",
}


def measures(summaries: Mapping[str, Rows]) -> Markup:
    """Length (with its median to 95th percentile), entropy, KL to the base and truncation by round."""
    with _drawing(9, 5, "Length, entropy, KL to the base model and truncation by round") as page:
        panels = page.figure.subplots(2, 2).flat
        for axes, (measure, label) in zip(panels, _MEASURES.items(), strict=True):
            for number, (run, rows) in enumerate(summaries.items()):
                known = [r for r in rows if r[measure] is not None]
                rounds, style = [r["round"] for r in known], line_style(number, run)
                axes.plot(rounds, [r[measure] for r in known], **style)
                if measure == "mean_length":
                    band = [r["length_p50"] for r in known], [r["length_p95"] for r in known]
                    axes.fill_between(rounds, *band, color=style["color"], alpha=0.15, linewidth=0)
            axes.set_ylabel(label)
            axes.set_ylim(bottom=0)
            _rounds(axes)
        page.figure.axes[0].legend()
    return page.svg


def costs(rows: Rows) -> Markup:
    """Seconds of each stage, a bar a run."""
    runs = list(dict.fromkeys(r["run"] for r in rows))
    stages = list(dict.fromkeys(r["stage"] for r in sorted(rows, key=lambda r: -r["seconds"])))
    with _drawing(9, 1.6 + 0.45 * len(runs), "Wall time by stage") as page:
        axes = page.figure.subplots()
        left = dict.fromkeys(runs, 0.0)
        hatches = ("", "//", "..")
        for number, stage in enumerate(stages):
            seconds = {r["run"]: r["seconds"] for r in rows if r["stage"] == stage}
            widths = [seconds.get(run, 0.0) for run in runs]
            style: dict[str, Any] = {"color": COLOURS[number % 7], "hatch": hatches[number // 7 % 3], "edgecolor": _INK}
            axes.barh(runs, widths, left=list(left.values()), label=stage, linewidth=0.3, **style)
            left = {run: left[run] + width for run, width in zip(runs, widths, strict=True)}
        axes.set_xlabel("wall time, seconds")
        axes.invert_yaxis()
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.05), ncols=2)
    return page.svg


def learned(rows: Rows) -> Markup:
    """Problems known, learned, forgotten and unsolved, a bar a run."""
    runs = list(dict.fromkeys(r["run"] for r in rows))
    states = ("known", "learned", "forgotten", "unsolved")
    with _drawing(9, 1.2 + 0.45 * len(runs), "Problems known, learned, forgotten and unsolved") as page:
        axes = page.figure.subplots()
        left = [0] * len(runs)
        for colour, state in zip((COLOURS[2], COLOURS[0], COLOURS[1], "#999999"), states, strict=True):
            counts = [sum(r["run"] == run and r["state"] == state for r in rows) for run in runs]
            bars = axes.barh(runs, counts, left=left, label=state, color=colour, edgecolor=_INK, linewidth=0.3)
            axes.bar_label(bars, [str(c) if c else "" for c in counts], label_type="center", color="#000000")
            left = [a + b for a, b in zip(left, counts, strict=True)]
        axes.set_xlabel("benchmark problems")
        axes.invert_yaxis()
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.05))
    return page.svg


def steering(places: Rows, classes: Rows) -> Markup:
    """Norm of the direction and KL(target || base) by position, and KL by class of token."""
    runs = list(dict.fromkeys(r["run"] for r in places))
    with _drawing(12, 3.2, "Steering by position in the rollout and by class of token") as page:
        norm, kl, by_class = page.figure.subplots(1, 3)
        for number, run in enumerate(runs):
            mine = [r for r in places if r["run"] == run]
            x = [(r["position_from"] + r["position_to"]) / 2 for r in mine]
            norm.plot(x, [r["direction_norm"] for r in mine], **line_style(number, run))
            kl.plot(x, [r["kl"] for r in mine], **line_style(number, run))
        names = list(dict.fromkeys(r["token_class"] for r in classes))
        width = 0.8 / max(len(runs), 1)
        for number, run in enumerate(runs):
            found = {r["token_class"]: r["kl"] for r in classes if r["run"] == run}
            places_ = [i + number * width for i in range(len(names))]
            by_class.bar(places_, [found.get(n, 0.0) for n in names], width, color=COLOURS[number % 7], label=run)
        by_class.set_xticks([i + 0.4 - width / 2 for i in range(len(names))], names)
        for axes, label in ((norm, "norm of the direction, logits"), (kl, "KL(target || base), nats a token")):
            axes.set_xlabel("position in the rollout, tokens")
            axes.set_ylabel(label)
            axes.set_ylim(bottom=0)
        by_class.set_ylabel("KL(target || base), nats a token")
        norm.legend()
    return page.svg


def _rounds(*panels: Any) -> None:
    for axes in panels:
        axes.set_xlabel("round")
        axes.xaxis.get_major_locator().set_params(integer=True)


class _drawing:  # noqa: N801
    """A figure with the settings of the report; `svg` is set when the block ends."""

    def __init__(self, width: float, height: float, title: str):
        self.size, self.title = (width, height), title

    def __enter__(self) -> _drawing:
        import matplotlib as mpl
        from matplotlib.figure import Figure

        self.context = mpl.rc_context({**_RC, "svg.hashsalt": self.title})  # ids that are unique in the page
        self.context.__enter__()
        self.figure = Figure(figsize=self.size, layout="constrained")
        return self

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if kind is None:
            sink = io.StringIO()
            self.figure.savefig(sink, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
            text = sink.getvalue()
            text = text[text.index("<svg") :].replace(_INK, "currentColor")
            text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
            used = set(re.findall(r"url\(#([^)]+)\)|href=\"#([^\"]+)\"", text))
            kept = {name for pair in used for name in pair}
            text = re.sub(r' id="([^"]+)"', lambda m: m[0] if m[1] in kept else "", text)
            label = f'<svg role="img" aria-label="{escape(self.title)}" '
            self.svg = Markup(text.replace("<svg ", label, 1))
        self.context.__exit__(kind, *rest)
