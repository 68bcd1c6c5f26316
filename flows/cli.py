"""The command line `ogls`. Each command imports heavy modules itself, so `ogls --help` starts fast."""

from __future__ import annotations

import os
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flows import (
    import_command,
    page_commands,
    plan_command,
    run_commands,
    seed_command,
    service_commands,
    store_commands,
)
from flows.console import (
    GROUPS,
    OPERATE,
    RUN,
    Config,
    Set,
    err,
    out,
    show_table,
)
from flows.deploying import DEPLOYMENTS
from flows.foreground import Interrupted, configure_prefect, prefect_address, run_in_foreground
from flows.shipped import create_project, find_file
from ogls.errors import HealthStop, UserError
from ogls.store import run_query

_STUDY_HELP = "TOML file of a study (methods, seeds), or the name of one in deployments/studies/, such as family."
Study = Annotated[Path, typer.Argument(help=_STUDY_HELP, parser=partial(find_file, kind="studies"))]

app = typer.Typer(
    help="Train a language model to reason by on-policy self-distillation with logit steering (OGLS-SD).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        from ogls import __version__

        out.print(f"ogls-sd {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Options without a command."""


@app.command(rich_help_panel=RUN)
def init(folder: Annotated[Path, typer.Argument(help="Folder of the project; default: this one.")] = Path()) -> None:
    """Write a project: configurations, studies, the deployments of `ogls up`, and the tiny world."""
    for name in create_project(folder):
        out.print(f"wrote {folder / name}", soft_wrap=True, highlight=False)
    out.print("Next steps:")
    for command in ([] if folder == Path() else [f"cd {folder}"]) + ["ogls train tiny"]:
        out.print(f"  {command}", soft_wrap=True, highlight=False)


@app.command(rich_help_panel=RUN)
def train(config: Config, set_: Set = None) -> None:
    """Train a model. The same command resumes an interrupted training."""
    from ogls.config import load_config

    configure_prefect()
    loaded = load_config(config, set_ or [])
    from tasks.files import is_nothing_left

    def run_training() -> None:
        from flows.train import train_flow

        train_flow(loaded)

    if is_nothing_left(loaded):
        out.print(f"run {loaded.name} is finished; raise rounds to continue it", soft_wrap=True, highlight=False)
    else:
        run_in_foreground(run_training)
    _print_rounds(loaded)
    out.print("Next steps:")
    for purpose, command in _next_steps(loaded):
        out.print(f"  {purpose}:\n    {command}", soft_wrap=True, highlight=False, markup=False)


def _print_rounds(config: Any) -> None:
    """The table of rounds, with the columns that fit into the terminal."""
    from ogls.analysis import rounds as rounds_table
    from ogls.stages.rounds import read_rounds
    from ogls.store import Store

    console = out if out.is_terminal else Console(width=140)
    rows = read_rounds(Store(config.root).run(config.name))
    columns = rounds_table.fitting_columns(rows, console.width)
    legend = rounds_table.LEGEND if len(columns) == len(rounds_table.HEADINGS) else rounds_table.SHORT_LEGEND
    table = Table(title=f"run {config.name}", caption=legend)
    for index in columns:
        table.add_column(rounds_table.HEADINGS[index], no_wrap=True)
    for row in rows:
        cells = rounds_table.round_cells(row)
        table.add_row(*(cells[index] for index in columns))
    console.print(table)


def _next_steps(config: Any) -> list[tuple[str, str]]:
    """(purpose, command) of what `ogls train` suggests at its end: where to see the run, and how to read it."""
    prefix = "" if shutil.which("ogls") else f"{os.path.relpath(Path(sys.executable).parent)}/"
    ui_address = prefect_address().removesuffix("/api")
    init = "" if DEPLOYMENTS.is_file() else f"{prefix}ogls init, then "
    prefect = f"open {ui_address}" if ui_address else f"{init}{prefix}ogls up, then open http://127.0.0.1:4200"
    steps = [("watch it in the Prefect UI", prefect)]
    if config.tracking.enabled:
        uri = config.tracking.address
        local = f"{prefix}mlflow ui --backend-store-uri {uri} --port 5000, then open http://127.0.0.1:5000"
        steps.append(("open MLflow", local if uri.startswith("sqlite:") else f"open {uri}"))
    root = "" if config.root == "data/runs" else f" --root {config.root}"
    if config.tracking.report != "off":
        steps.append(("read its report", f"open {config.root}/{config.name}/report.html in a browser"))
    steps.append(("read its tokens", f"{prefix}ogls view {config.name}{root}"))
    return [*steps, ("query it", f"{prefix}ogls query --name rounds --run {config.name}{root}")]


@app.command(rich_help_panel=RUN)
def evaluate(
    config: Config,
    round_: Annotated[
        list[int] | None,
        typer.Option("--round", help="Round (0: the base model); default: the newest. Repeatable.", min=0),
    ] = None,
    set_: Set = None,
) -> None:
    """Evaluate rounds of a run on its benchmarks, without training."""
    from ogls.config import load_config

    configure_prefect()
    loaded = load_config(config, set_ or [])
    from ogls.store import Store

    def run_evaluation() -> None:
        from flows.evaluate import evaluate_flow

        evaluate_flow(loaded, round_ or None)

    run_in_foreground(run_evaluation)
    rounds = ", ".join(map(str, round_ or [])) or "SELECT max(round) FROM summaries"
    sql = f"SELECT * EXCLUDE (run, place) FROM summaries WHERE round IN ({rounds}) ORDER BY round, place"
    show_table(run_query(Store(loaded.root), sql, loaded.name), "table", None)


@app.command(rich_help_panel=RUN)
def compare(study: Study) -> None:
    """Train all methods of a study with all its seeds, with equal numbers of rollouts, and write a comparison page."""
    from ogls.analysis.study import load_study

    configure_prefect()
    loaded = load_study(study)
    at_once = loaded.study.at_once
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // at_once)))

    def run_study() -> str:
        from flows.compare import compare as train_and_compare

        return train_and_compare(loaded)

    tuning = f"{len(loaded.tuning)} tuning runs and " if loaded.tuning else ""
    err.print(f"study {loaded.study.name}: {tuning}{len(loaded.runs)} runs, {at_once} in parallel")
    path = run_in_foreground(run_study)
    out.print(Path(path).read_text(), markup=False, highlight=False, soft_wrap=True)
    out.print(f"page: {path}", soft_wrap=True, highlight=False)


@app.command(rich_help_panel=OPERATE)
def doctor(config: Config = Path("tiny"), set_: Set = None) -> None:
    """Check the installation, the device, the model, the store, Prefect and MLflow.

    Exits with code 1 if a check fails.
    """
    from ogls.config import load_config

    configure_prefect()
    loaded = load_config(config, set_ or [])
    from flows.doctor import examine

    findings = examine(loaded)
    colours = {"ok": "green", "note": "yellow", "wrong": "red"}
    for finding in findings:
        mark = f"[{colours[finding.verdict]}]{finding.verdict:>5}[/]"
        out.print(f"{mark}  {finding.name:<18} {escape(finding.message)}", soft_wrap=True, highlight=False)
    if any(f.verdict == "wrong" for f in findings):
        raise typer.Exit(1)


store_commands.register(app)
page_commands.register(app)
run_commands.register(app)
plan_command.register(app)
import_command.register(app)
seed_command.register(app)
service_commands.register(app)
app.registered_commands.sort(key=lambda command: GROUPS.index(str(command.rich_help_panel)))


def main() -> None:
    """Run a command.

    Exit codes: 2 for an error that the user can fix, 3 for a run stopped by health checks, 130 for Ctrl-C.
    """
    try:
        code = app(standalone_mode=False)  # exit code of typer.Exit, or the return value of the command
        sys.exit(code if isinstance(code, int) else 0)
    except HealthStop as error:
        err.print(f"stopped: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(3)
    except UserError as error:
        err.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except (Interrupted, KeyboardInterrupt):
        err.print("interrupted; the same command continues where this one ended", style="yellow")
        sys.exit(130)
    except (typer.Abort, typer.BadParameter, typer.TyperException) as error:
        message = error.format_message() if isinstance(error, typer.TyperException) else "aborted"
        err.print(f"error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
