"""The pictures of the README and of the docs, by one command: make pictures.

Figures are drawn from the tables of studies. Pages are those of two runs of the quickstart's world, `tiny` and
`tiny-opsd`, which are trained if the store does not have them. The pages of Prefect are those of the test of its user
interface.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
IMAGES = REPO / "docs/pages/images"
HEADLINE = {
    "opsd-reverse": ("OPSD, reverse KL", "#CC79A7"),
    "ogls-sd": ("OGLS-SD", "#0072B2"),
    "ogls-sd-plain": ("OGLS-SD, verdicts alone", "#56B4E9"),
    "grpo": ("GRPO", "#009E73"),
    "opsd": ("OPSD, forward KL", "#D55E00"),
}


def draw_headline() -> None:
    """Accuracy and length by round in the study `family`: means and 95% intervals over five seeds."""
    import pyarrow.parquet as pq
    from matplotlib.figure import Figure

    from ogls.analysis.study_figure import draw_curve, label_ends

    rows = pq.read_table(REPO / "data/studies/family/curves.parquet").to_pylist()
    figure = Figure(figsize=(8.6, 2.9), layout="constrained")
    panels = figure.subplots(1, 2, width_ratios=[1, 1])
    for axes, measure, title in zip(
        panels, ("accuracy", "mean_length"), ("accuracy, sampled", "length of a solution, tokens"), strict=True
    ):
        for method, (name, colour) in HEADLINE.items():
            points = [r for r in rows if r["method"] == method and r["measure"] == measure and r["round"] % 4 == 0]
            draw_curve(axes, points, "round", name, {"color": colour})
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("round")
        axes.set_xticks(range(0, 13, 4))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylim(0, 1)
    label_ends(panels[0])
    panels[1].set_ylim(0, 38)
    figure.savefig(IMAGES / "headline.png", dpi=140, metadata={"Software": None})


def draw_real_text() -> None:
    """How often each recipe ranks a right above a wrong solution of the same problem, on all tokens and by class."""
    import pyarrow.parquet as pq
    from matplotlib.figure import Figure

    folder = REPO / "data/studies/real-text"
    sweeps = pq.read_table(folder / "sweeps.parquet").to_pylist()
    rows = [{**r, "token_class": "all"} for r in sweeps] + pq.read_table(folder / "sweep_classes.parquet").to_pylist()
    classes = {
        "all": "all tokens",
        "digit": "digits",
        "operator": "operators",
        "function": "joining words",
        "rest": "the rest",
    }
    recipes = {
        "ogls-sd": ("OGLS-SD", "#0072B2"),
        "contrastive": ("contrastive", "#009E73"),
        "opsd": ("OPSD", "#D55E00"),
        "sdpo": ("SDPO", "#CC79A7"),
    }
    figure = Figure(figsize=(8.6, 3.2), layout="constrained")
    axes = figure.subplots()
    for index, (recipe, (name, colour)) in enumerate(recipes.items()):
        found = {r["token_class"]: r for r in rows if r["recipe"] == recipe}
        x = [place + (index - 1.5) * 0.17 for place in range(len(classes))]
        points = [found[c] for c in classes]
        middle = [p["group_auc"] for p in points]
        low, high = ([abs(p["group_auc"] - p[f"group_auc_{end}"]) for p in points] for end in ("low", "high"))
        axes.errorbar(x, middle, yerr=[low, high], fmt="o", color=colour, capsize=2, linewidth=1.6, label=name)
    axes.axhline(0.5, color="#999999", linewidth=0.8)
    axes.annotate("chance", (-0.45, 0.46), color="#777777", fontsize=9)
    axes.set_xticks(range(len(classes)), list(classes.values()))
    axes.set_ylabel("AUC within groups, 95%")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(ncols=4, loc="upper right", frameon=False)
    axes.set_ylim(0.2, 1.12)
    figure.savefig(folder / "auc.png", dpi=130, metadata={"Software": None})


def take_pages() -> None:
    """The report of `tiny` and `tiny-opsd`, and the token view of `tiny`: opened, compared in dark, and a group."""
    sys.path.insert(0, str(REPO / "tests"))
    from browser import open_browser

    ogls = [sys.executable, "-m", "flows.cli"]
    with tempfile.TemporaryDirectory() as folder, open_browser() as page:
        for run in ("tiny", "tiny-opsd"):
            subprocess.run([*ogls, "train", run], cwd=REPO, check=True)
        report, view = f"{folder}/report.html", f"{folder}/view.html"
        subprocess.run([*ogls, "report", "tiny", "tiny-opsd", "--out", report], cwd=REPO, check=True)
        subprocess.run([*ogls, "view", "tiny", "--out", view], cwd=REPO, check=True)
        page.goto(f"file://{report}")
        page.screenshot(path=str(IMAGES / "report.png"))
        page.goto(f"file://{view}")
        page.screenshot(path=str(IMAGES / "token-view.png"))
        page.locator(".card").first.scroll_into_view_if_needed()
        page.screenshot(path=str(IMAGES / "token-view-group.png"))
        page.emulate_media(color_scheme="dark")
        page.goto(f"file://{view}")
        page.get_by_label("Compare with a second recipe").check()
        page.get_by_label("Recipe B").select_option("opsd")
        page.screenshot(path=str(IMAGES / "token-view-compared.png"))


def take_services() -> None:
    """The pages of Prefect: a run, the artifact of a round, the form of a deployment."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/flows/test_ui.py"]
    environment = {**os.environ, "OGLS_SCREENSHOTS": str(REPO / "deployments/screenshots")}
    subprocess.run(command, cwd=REPO, env=environment, check=True)
    (REPO / "deployments/screenshots/mlflow.png").unlink(missing_ok=True)  # no page shows it


if __name__ == "__main__":
    draw_headline()
    draw_real_text()
    take_pages()
    take_services()
