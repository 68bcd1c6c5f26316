"""The pictures of the README and of the docs, by one command: make pictures.

The headline is drawn from a study. The pages are those of two runs of the quickstart's world, `tiny` and `tiny-opsd`,
which are trained if the store does not have them.
"""

from __future__ import annotations

from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
IMAGES = REPO / "docs/pages/images"
HEADLINE = {"ogls-sd": ("OGLS-SD", "#0072B2"), "grpo": ("GRPO", "#009E73"), "opsd": ("OPSD, forward KL", "#D55E00")}


def draw_headline() -> None:
    """Accuracy and length by round in the study `family`: means and 95% intervals over five seeds."""
    import pyarrow.parquet as pq
    from matplotlib.figure import Figure

    rows = pq.read_table(REPO / "data/studies/family/curves.parquet").to_pylist()
    figure = Figure(figsize=(8.6, 2.9), layout="constrained")
    panels = figure.subplots(1, 2, width_ratios=[1, 1])
    for axes, measure, title in zip(
        panels, ("accuracy", "mean_length"), ("accuracy, sampled", "length of a solution, tokens"), strict=True
    ):
        for method, (name, colour) in HEADLINE.items():
            points = [r for r in rows if r["method"] == method and r["measure"] == measure and r["round"] % 4 == 0]
            rounds = [p["round"] for p in points]
            axes.plot(rounds, [p["mean"] for p in points], color=colour, linewidth=2.2)
            axes.fill_between(
                rounds, [p["low"] for p in points], [p["high"] for p in points], color=colour, alpha=0.15, linewidth=0
            )
            if axes is panels[0]:
                axes.annotate(
                    name, (12.3, points[-1]["mean"]), color=colour, va="center", fontsize=10, annotation_clip=False
                )
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("round")
        axes.set_xticks(range(0, 13, 4))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylim(0, 1)
    panels[1].set_ylim(0, 38)
    figure.savefig(IMAGES / "headline.png", dpi=140, metadata={"Software": None})


if __name__ == "__main__":
    draw_headline()
