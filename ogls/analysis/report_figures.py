"""The figures of the report as inline SVG with selectable text, in the colours of the page (light or dark)."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from ogls.analysis.figures import COLOURS, line_style

Rows = Sequence[Mapping[str, Any]]


_TEXT_COLOUR = "#010203"  # placeholder that is replaced by the text colour of the page


_RC: dict[Any, Any] = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _TEXT_COLOUR),
    **{"svg.fonttype": "none", "font.size": 9, "legend.frameon": False, "axes.spines.top": False},
    **{"axes.spines.right": False, "font.family": "sans-serif", "figure.facecolor": "none", "axes.facecolor": "none"},
}


def draw_accuracy(summaries: Mapping[str, Rows]) -> Markup:
    """Draw accuracy by round with its 95% interval over problems, and greedy accuracy; one line per run."""
    with _Drawing(9, 3.2, "Accuracy by round, sampled with 95% interval, and greedy") as drawing:
        sampled, greedy = drawing.figure.subplots(1, 2, sharey=True)
        for index, (run, rows) in enumerate(summaries.items()):
            rounds = [r["round"] for r in rows]
            style = line_style(index, run)
            low, high = [r["accuracy_low"] for r in rows], [r["accuracy_high"] for r in rows]
            sampled.fill_between(rounds, low, high, color=style["color"], alpha=0.2, linewidth=0)
            sampled.plot(rounds, [r["accuracy"] for r in rows], **style)
            greedy.plot(rounds, [r["greedy_accuracy"] for r in rows], **style)
        sampled.set_ylabel("accuracy (avg@k), 95% interval")
        greedy.set_ylabel("greedy accuracy")
        _label_rounds(sampled, greedy)
        sampled.legend()
    return drawing.svg


_MEASURES = {
    "mean_length": "length, tokens",
    "entropy": "entropy, nats per token",
    "kl_base": "KL(policy || base), nats per token",
    "truncated": "truncated, share",
}


def draw_measures(summaries: Mapping[str, Rows]) -> Markup:
    """Draw length (with a band from median to 95th percentile), entropy, KL to the base and truncation by round."""
    with _Drawing(9, 5, "Length, entropy, KL to the base model and truncation by round") as drawing:
        panels = drawing.figure.subplots(2, 2).flat
        for axes, (measure, label) in zip(panels, _MEASURES.items(), strict=True):
            for index, (run, rows) in enumerate(summaries.items()):
                measured = [r for r in rows if r[measure] is not None]
                rounds, style = [r["round"] for r in measured], line_style(index, run)
                axes.plot(rounds, [r[measure] for r in measured], **style)
                if measure == "mean_length":
                    band = [r["length_p50"] for r in measured], [r["length_p95"] for r in measured]
                    axes.fill_between(rounds, *band, color=style["color"], alpha=0.15, linewidth=0)
            axes.set_ylabel(label)
            axes.set_ylim(bottom=0)
            _label_rounds(axes)
        drawing.figure.axes[0].legend()
    return drawing.svg


def draw_costs(rows: Rows) -> Markup:
    """Draw the wall time of each stage in seconds, one bar per run."""
    runs = list(dict.fromkeys(r["run"] for r in rows))
    stages = list(dict.fromkeys(r["stage"] for r in sorted(rows, key=lambda r: -r["seconds"])))
    with _Drawing(9, 1.6 + 0.45 * len(runs), "Wall time by stage") as drawing:
        axes = drawing.figure.subplots()
        left = dict.fromkeys(runs, 0.0)
        hatches = ("", "//", "..")
        for index, stage in enumerate(stages):
            seconds = {r["run"]: r["seconds"] for r in rows if r["stage"] == stage}
            widths = [seconds.get(run, 0.0) for run in runs]
            style: dict[str, Any] = {"color": COLOURS[index % 7], "hatch": hatches[index // 7 % 3]}
            style |= {"edgecolor": _TEXT_COLOUR, "linewidth": 0.3}
            axes.barh(runs, widths, left=list(left.values()), label=stage, **style)
            left = {run: left[run] + width for run, width in zip(runs, widths, strict=True)}
        axes.set_xlabel("wall time, seconds")
        axes.invert_yaxis()
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.05), ncols=2)
    return drawing.svg


def draw_problem_states(rows: Rows) -> Markup:
    """Draw the numbers of known, learned, forgotten and unsolved problems, one bar per run."""
    runs = list(dict.fromkeys(r["run"] for r in rows))
    states = ("known", "learned", "forgotten", "unsolved")
    with _Drawing(9, 1.2 + 0.45 * len(runs), "Problems known, learned, forgotten and unsolved") as drawing:
        axes = drawing.figure.subplots()
        left = [0] * len(runs)
        for colour, state in zip((COLOURS[2], COLOURS[0], COLOURS[1], "#999999"), states, strict=True):
            counts = [sum(r["run"] == run and r["state"] == state for r in rows) for run in runs]
            bars = axes.barh(runs, counts, left=left, label=state, color=colour, edgecolor=_TEXT_COLOUR, linewidth=0.3)
            axes.bar_label(bars, [str(c) if c else "" for c in counts], label_type="center", color="#000000")
            left = [a + b for a, b in zip(left, counts, strict=True)]
        axes.set_xlabel("benchmark problems")
        axes.invert_yaxis()
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.05))
    return drawing.svg


def draw_steering(positions: Rows, classes: Rows) -> Markup:
    """Draw the norm of the direction and KL(target || base) by position, and KL by class of token."""
    runs = list(dict.fromkeys(r["run"] for r in positions))
    with _Drawing(12, 3.2, "Steering by position in the rollout and by class of token") as drawing:
        norm, kl, by_class = drawing.figure.subplots(1, 3)
        for index, run in enumerate(runs):
            of_run = [r for r in positions if r["run"] == run]
            x = [(r["position_from"] + r["position_to"]) / 2 for r in of_run]
            norm.plot(x, [r["direction_norm"] for r in of_run], **line_style(index, run))
            kl.plot(x, [r["kl"] for r in of_run], **line_style(index, run))
        names = list(dict.fromkeys(r["token_class"] for r in classes))
        width = 0.8 / max(len(runs), 1)
        for index, run in enumerate(runs):
            kl_by_class = {r["token_class"]: r["kl"] for r in classes if r["run"] == run}
            x = [i + index * width for i in range(len(names))]
            by_class.bar(x, [kl_by_class.get(n, 0.0) for n in names], width, color=COLOURS[index % 7], label=run)
        by_class.set_xticks([i + 0.4 - width / 2 for i in range(len(names))], names)
        for axes, label in ((norm, "norm of the direction, logits"), (kl, "KL(target || base), nats per token")):
            axes.set_xlabel("position in the rollout, tokens")
            axes.set_ylabel(label)
            axes.set_ylim(bottom=0)
        by_class.set_ylabel("KL(target || base), nats per token")
        norm.legend()
    return drawing.svg


def _label_rounds(*panels: Any) -> None:
    for axes in panels:
        axes.set_xlabel("round")
        axes.xaxis.get_major_locator().set_params(integer=True)


class _Drawing:
    """Context manager for a figure in the style of the report; sets `svg` at the end of the block."""

    def __init__(self, width: float, height: float, title: str):
        self.size, self.title = (width, height), title

    def __enter__(self) -> _Drawing:
        import matplotlib as mpl
        from matplotlib.figure import Figure

        self.context = mpl.rc_context({**_RC, "svg.hashsalt": self.title})  # ids that are unique in the page
        self.context.__enter__()
        self.figure = Figure(figsize=self.size, layout="constrained")
        return self

    def __exit__(self, error_type: Any, *rest: Any) -> None:
        if error_type is None:
            buffer = io.StringIO()
            self.figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
            text = buffer.getvalue()
            text = text[text.index("<svg") :].replace(_TEXT_COLOUR, "currentColor")
            text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
            references = set(re.findall(r"url\(#([^)]+)\)|href=\"#([^\"]+)\"", text))
            referenced = {name for pair in references for name in pair}
            text = re.sub(r' id="([^"]+)"', lambda m: m[0] if m[1] in referenced else "", text)
            label = f'<svg role="img" aria-label="{escape(self.title)}" '
            self.svg = Markup(text.replace("<svg ", label, 1))
        self.context.__exit__(error_type, *rest)
