"""Tell people about a round: the table as a Prefect artifact, and MLflow."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger
from rich.markup import escape

from ogls.analysis import report as htmlreport
from ogls.analysis import rounds as report
from ogls.analysis.figures import run_figure
from ogls.config import RunConfig
from ogls.stages.health import is_last_round
from ogls.stages.run import Run
from tasks.artifacts import artifact_key
from tasks.events import emit_round
from tasks.progress import print_line, terminal_progress
from tasks.tracking import REPORT_ARTIFACT, track

_MOST_TEXT = 2000


@task(task_run_name="report", cache_policy=NO_CACHE, persist_result=False)
def write_report(config: RunConfig) -> None:
    """Write the report of the whole run into its folder. The training is done by now, and never fails with it."""
    if config.tracking.report == "off":
        return
    try:
        with terminal_progress("report", config.rounds) as progress:
            path = htmlreport.write_report(Run(config), progress)
    except Exception as error:  # what the page lacks, `ogls report` can still say; the adapter is there
        said = f"no report ({type(error).__name__}: {error}); `ogls report {config.name}` makes it"
        get_run_logger().warning(said)
        print_line(f"  [yellow]{escape(said)}[/yellow]")
        return
    get_run_logger().info(f"report: {path}")


@task(task_run_name="publish r{round_:03d}", cache_policy=NO_CACHE, persist_result=False)
def publish(config: RunConfig, round_: int) -> None:
    """Publish the table up to a round, a few of its rollouts, and its metrics."""
    run = Run(config)
    records = run.records
    rows = report.read_rounds(records, round_)
    key = artifact_key(f"{config.name}-r{round_:03d}")
    page = track(config, round_)
    text = "\n\n".join(
        [
            f"# {config.name}, round {round_}",
            f"[Its MLflow run]({page})" if page else "",
            _report_link(run, page) if is_last_round(run, round_) else "",
            report.rounds_markdown(rows),
            _curve(rows),
            shown_rollouts(report.sample_rollouts(records, round_)),
        ]
    )
    create_markdown_artifact(text, key=key, description=f"{config.name}: rounds 0 to {round_}")
    if rows and rows[-1].round == round_:
        emit_round(config, rows[-1])
        print_line(report.round_line(rows[-1]))


def _report_link(run: Run, page: str | None) -> str:
    """Where the report is: at the MLflow server, else in the store, which no browser opens from another page."""
    if htmlreport.read_report(run) is None:
        return ""
    if page:
        return f"[The report of the whole run]({page}/artifacts/{REPORT_ARTIFACT})"
    return f"The report of the whole run: `{run.records.url(htmlreport.REPORT)}`"


def _curve(rows: Sequence[report.RoundRow]) -> str:
    """Accuracy and length over the rounds, as a picture inside the text: it needs no server of its own."""
    evaluated = [row for row in rows if row.summary]
    if len(evaluated) < 2:
        return ""
    figure = run_figure([row.round for row in evaluated], [row.summary or {} for row in evaluated])
    picture = base64.b64encode(figure).decode()
    return f"![accuracy and length by round](data:image/png;base64,{picture})"


def shown_rollouts(rows: Sequence[dict[str, object]]) -> str:
    """Rollouts with their verdicts, as text that no browser takes for markup."""
    return "\n".join(_rollout(row) for row in rows)


def _rollout(row: dict[str, object]) -> str:
    """A rollout as an indented, escaped block under its problem's name: nothing of either is markup."""
    text = html.escape(str(row["text"])[:_MOST_TEXT])
    block = "\n".join("    " + line for line in text.splitlines())
    return f"**{_plain(str(row['problem_id']))}, sample {row['sample']}: {row['verdict']}**\n\n{block}\n"


def _plain(text: str) -> str:
    """One line of text with all but letters, digits and dashes as entities, which markdown reads as no mark of its."""
    return "".join(c if c.isalnum() or c in "- " else f"&#{ord(c)};" for c in " ".join(text.split()))
