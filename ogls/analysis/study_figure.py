"""The figure of a study: a row of panels for a few methods at a time, the lines labelled where they end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from ogls.analysis.figures import COLOURS, png

if TYPE_CHECKING:
    from ogls.analysis.study import Method, StudyConfig

MOST_LINES = 5  # lines per panel, the reference among them
REFERENCE = {"color": "#000000", "linestyle": "--"}
_WIDTH = 8.5  # inches; at 110 dots per inch a little wider than the text of the docs
_LABEL_GAP = 0.07  # share of the panel's height between two labels


def figure_rows(study: StudyConfig) -> list[list[str]]:
    """The methods of each row, the reference and at most MOST_LINES - 1 others; of a study with cases, of one case.

    Methods that stand side by side in the study and share a configuration file share a row.
    """
    return [row for reference, methods in study.by_case() for row in _case_rows(reference, methods)]


def _case_rows(reference: str, methods: Sequence[Method]) -> list[list[str]]:
    most = MOST_LINES - 1
    rows: list[list[str]] = []
    others = [m for m in methods if m.name != reference]
    for _, group in groupby(others, key=lambda method: method.config):
        names = [method.name for method in group]
        parts = -(-len(names) // most)
        size = -(-len(names) // parts)
        for start in range(0, len(names), size):
            part = names[start : start + size]
            if rows and len(rows[-1]) + len(part) <= most:
                rows[-1] += part
            else:
                rows.append(part)
    return [[reference, *row] for row in rows] or [[reference]]


def study_figure(
    rows: Sequence[Sequence[str]],
    curves: Mapping[str, Sequence[dict[str, Any]]],
    pass_rows: Sequence[dict[str, Any]] = (),
) -> bytes:
    """Return a PNG: a row of panels for each list of methods in `rows`, the reference first (dashed).

    The panels are accuracy and length by round with 95% intervals over seeds, and, with `pass_rows`, pass@k of the last
    round. `curves` has the rows of `study.curve_rows` by measure.
    """
    from matplotlib.figure import Figure

    panels: list[tuple[str, str, Sequence[dict[str, Any]]]] = [
        ("accuracy (avg@k)", "round", curves["accuracy"]),
        ("length, tokens", "round", curves["mean_length"]),
    ]
    if pass_rows:
        panels.append(("pass@k", "k", pass_rows))
    figure = Figure(figsize=(_WIDTH, 2.4 * len(rows)), layout="constrained")
    grid = figure.subplots(
        len(rows), len(panels), squeeze=False, sharex="col", width_ratios=[2.2, *[1] * (len(panels) - 1)]
    )
    longest = max((r["mean"] for r in curves["mean_length"] if r["mean"] is not None), default=1)
    for row, (methods, line) in enumerate(zip(rows, grid, strict=True)):
        for column, (axes, (label, x, points)) in enumerate(zip(line, panels, strict=True)):
            for index, method in enumerate(methods):
                style = REFERENCE if index == 0 else {"color": COLOURS[index - 1]}
                draw_curve(axes, [p for p in points if p["method"] == method], x, method, style)
            axes.set_ylim(0, 1.2 * longest if column == 1 else 1.02)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.spines[["top", "right"]].set_visible(False)
            if row == 0:
                axes.set_title(label, fontsize=10)
            if row == len(rows) - 1:
                axes.set_xlabel(x)
        label_ends(line[0])
    return png(figure)


def draw_curve(axes: Any, points: Sequence[dict[str, Any]], x: str, label: str, style: dict[str, Any]) -> None:
    """Draw the means of `points` over the column `x`, with the band from `low` to `high`."""
    known = [p for p in points if p["mean"] is not None]
    at = [p[x] for p in known]
    axes.plot(at, [p["mean"] for p in known], **style, linewidth=1.8, label=label)
    low, high = [p["low"] for p in known], [p["high"] for p in known]
    axes.fill_between(at, low, high, color=style["color"], alpha=0.12, linewidth=0)


def label_ends(axes: Any) -> None:
    """Write the name of each line at its right end, moved up or down until no two overlap."""
    bottom, top = axes.get_ylim()
    lines = sorted((line for line in axes.get_lines() if len(line.get_xdata())), key=lambda line: line.get_ydata()[-1])
    places: list[float] = []
    for line in lines:
        y = (line.get_ydata()[-1] - bottom) / (top - bottom)
        places.append(max(y, places[-1] + _LABEL_GAP) if places else max(y, 0.0))
    places = [min(y, 1 - _LABEL_GAP * (len(places) - 1 - i)) for i, y in enumerate(places)]  # and none above the panel
    for line, y in zip(lines, places, strict=True):
        axes.annotate(
            line.get_label(), (1.02, y), xycoords="axes fraction", va="center", fontsize=9, color=line.get_color()
        )
