"""Publish a round: a Prefect artifact with the table of rounds, metrics in MLflow, events."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from typing import Any

from prefect import task
from prefect.artifacts import Artifact, create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger
from rich.markup import escape

from ogls.analysis import report as htmlreport
from ogls.analysis import rounds as report
from ogls.analysis.figures import run_figure
from ogls.config import RunConfig
from ogls.stages.kept_models import process_models
from ogls.stages.rounds import RoundRow, read_rounds, record_round
from ogls.stages.run import Run
from tasks.artifacts import artifact_key
from tasks.events import emit_round
from tasks.files import PUBLISHED
from tasks.progress import print_line, terminal_progress
from tasks.tracking import REPORT_ARTIFACT, TRAINING_VIEW, track

_SHOWN = 50  # rounds of the table, and entries of published.json: a long run publishes as much as a short one
_MAX_TEXT = 2000  # characters of a rollout that the artifact shows


@task(task_run_name="report", cache_policy=NO_CACHE, persist_result=False)
def write_report(config: RunConfig) -> None:
    """Write the report of the run into its folder. An error becomes a warning, because the training is done."""
    if config.tracking.report == "off":
        return
    try:
        with terminal_progress("report", config.rounds) as progress:
            run = Run(config, process_models(config))
            path = htmlreport.write_report(run, progress)
            run.release_memory()
    except Exception as error:  # the adapter is saved, and `ogls report` can write the report later
        message = f"the report was not written ({type(error).__name__}: {error}); `ogls report {config.name}` writes it"
        get_run_logger().warning(message)
        print_line(f"  [yellow]{escape(message)}[/yellow]")
        return
    get_run_logger().info(f"report: {path}")


@task(task_run_name="publish r{round_:03d}", cache_policy=NO_CACHE, persist_result=False)
def publish(config: RunConfig, round_: int) -> None:
    """Publish the table of rounds up to `round_`, a few rollouts of the round, and its metrics.

    A resumed run publishes nothing again, except a round that was evaluated since. The cost does not depend on the
    number of rounds: what is read of earlier ones is the summary of the newest `_SHOWN` (`ogls.stages.rounds`).
    """
    run = Run(config)
    records = run.records
    record_round(records, round_)
    published = records.read_json(PUBLISHED) or {}
    stages = (records.manifest(table, round_) for table in ("updates", "scores"))
    occasion = "/".join(manifest.digest if manifest else "" for manifest in stages)
    if published.get(str(round_)) == occasion:
        track(config, round_)  # rounds that MLflow lacks, for example because it was unavailable
        return
    rows = shown_rounds(run, round_)
    key = round_key(config.name, round_)
    text = round_markdown(run, round_, rows, track(config, round_))
    existing: Any = Artifact.get(key)
    if existing is None or existing.data != text:  # an interrupted attempt may have created it
        create_markdown_artifact(text, key=key, description=f"{config.name}: rounds 0 to {round_}")
    if rows and rows[-1].round == round_:
        emit_round(config, rows[-1], occasion, new=str(round_) not in published)
        print_line(report.round_line(rows[-1]))
    newest = sorted({**published, str(round_): occasion}.items(), key=lambda entry: int(entry[0]))[-_SHOWN:]
    records.write_json(PUBLISHED, {**dict(newest), str(round_): occasion})


def shown_rounds(run: Run, round_: int) -> list[RoundRow]:
    """The rounds of the table in an artifact: the base model, and the newest ones up to `round_`."""
    first = max(round_ - _SHOWN + 1, 0)
    return [*(read_rounds(run.records, 0) if first else []), *read_rounds(run.records, round_, first)]


def round_key(name: str, round_: int) -> str:
    """The key of the artifact of a round."""
    return artifact_key(f"{name}-r{round_:03d}")


def round_markdown(run: Run, round_: int, rows: Sequence[RoundRow], mlflow_page: str | None) -> str:
    """The artifact of a round: links, the table and the curve of the rounds in `rows`, and a few of its rollouts."""
    return "\n\n".join(
        [
            f"# {run.records.name}, round {round_}",
            f"[MLflow run]({mlflow_page}{TRAINING_VIEW})" if mlflow_page else "",
            _report_link(run, mlflow_page),
            report.rounds_markdown(rows),
            _left_out(rows),
            _curve(rows),
            report.workers_markdown(run.records, round_) if run.config.execution.workers == "ray" else "",
            rollouts_markdown(report.sample_rollouts(run.records, round_)),
        ]
    )


def _left_out(rows: Sequence[RoundRow]) -> str:
    """The rounds between the base model and the newest ones, which the table does not show; empty if there are none."""
    if len(rows) < 2 or rows[1].round <= 1:
        return ""
    return f"Rounds 1 to {rows[1].round - 1} are in MLflow, in the report, and in `ogls query --name rounds`."


def _report_link(run: Run, mlflow_page: str | None) -> str:
    """A link to the report at the MLflow server, or its path in the store if MLflow has no page; empty without one.

    The path is plain text, because a browser does not open a local file from a web page.
    """
    if htmlreport.read_report(run) is None:
        return ""
    if mlflow_page:
        return f"[The report of the whole run]({mlflow_page}/artifacts/{REPORT_ARTIFACT}{TRAINING_VIEW})"
    return f"The report of the whole run: `{run.records.url(htmlreport.REPORT)}`"


def _curve(rows: Sequence[RoundRow]) -> str:
    """A figure of accuracy and length by round, embedded in the markdown; empty for fewer than two evaluations."""
    evaluated = [row for row in rows if row.summary]
    if len(evaluated) < 2:
        return ""
    figure = run_figure([row.round for row in evaluated], [row.summary or {} for row in evaluated])
    image = base64.b64encode(figure).decode()
    return f"![accuracy and length by round](data:image/png;base64,{image})"


def rollouts_markdown(rows: Sequence[dict[str, object]]) -> str:
    """Rollouts and their verdicts as markdown; the text is escaped, so that no browser interprets it as markup."""
    return "\n".join(_rollout_markdown(row) for row in rows)


def _rollout_markdown(row: dict[str, object]) -> str:
    """A rollout with its problem and the expected answer, the texts as indented, escaped blocks."""
    title = f"**{_escape_markdown(str(row['problem_id']))}, sample {row['sample']}: {row['verdict']}**"
    expected = f"expected **{_escape_markdown(str(row['expected']))}**" if row["expected"] else "no expected answer"
    answer = f", answered **{_escape_markdown(str(row['answer']))}**" if row["answer"] else ""
    problem, text = _indented(str(row["problem"])), _indented(str(row["text"]))
    return f"{title}, {expected}{answer}\n\nThe problem:\n\n{problem}\n\nThe rollout:\n\n{text}\n"


def _indented(text: str) -> str:
    """Text as an indented, escaped block, at most 2000 characters of it."""
    return "\n".join("    " + line for line in html.escape(text[:_MAX_TEXT]).splitlines())


def _escape_markdown(text: str) -> str:
    """One line of text with all characters except letters, digits, spaces and dashes as HTML entities.

    Markdown does not interpret entities.
    """
    return "".join(c if c.isalnum() or c in "- " else f"&#{ord(c)};" for c in " ".join(text.split()))
