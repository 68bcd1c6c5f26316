"""Commands that show runs as HTML pages: view and report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flows.console import LOOK, Open, Root, count_of, err, out, show_page, write_file
from ogls.errors import UserError


def register(app: Any) -> None:
    """Add the commands to the command line."""
    for command in (view, report):
        app.command(rich_help_panel=LOOK)(command)


def view(
    run: Annotated[str, typer.Argument(help="Name of a run.")],
    rounds: Annotated[list[int] | None, typer.Option("--round", help="Only this round. Repeatable.")] = None,
    problem: Annotated[str, typer.Option(help="Only rollouts of this problem.")] = "",
    sample: Annotated[int | None, typer.Option(help="Only this sample of --problem.")] = None,
    show: Annotated[
        str, typer.Option("--show", help="Rollouts to show: all, steered, collapsed, fixed, correct or failed.")
    ] = "all",
    most: Annotated[int, typer.Option(help="Maximum number of rollouts.", min=1)] = 20,
    policy: Annotated[
        bool,
        typer.Option(help="Run the policies to show the student's distributions; --no-policy loads only the head."),
    ] = True,
    to: Annotated[Path | None, typer.Option("--out", help="HTML file; default: <run>-tokens.html.")] = None,
    serve_: Annotated[
        bool,
        typer.Option(
            "--serve", help="Serve the page on this machine instead, with search over all rollouts of the run."
        ),
    ] = False,
    port: Annotated[int, typer.Option(help="Port of --serve on 127.0.0.1; 0: any free port.", min=0, max=65535)] = 8787,
    open_: Open = False,
    root: Root = "data/runs",
) -> None:
    """Write an HTML page that shows rollouts token by token, and how steering changes each token."""
    from ogls.analysis.select_rollouts import SHOW
    from ogls.analysis.token_view import TokenViewer, render_token_view
    from ogls.stages.run import open_run
    from tasks.progress import show_progress_on, terminal_progress

    if show not in SHOW:
        raise UserError(f"unknown --show {show}; choices: {', '.join(SHOW)}")
    if sample is not None and not problem:
        raise UserError("--sample needs --problem: it is the number of a sample of that problem")
    viewer = TokenViewer(open_run(root, run), policy)
    show_progress_on(err)
    with terminal_progress("view", rounds[0] if rounds else 0) as progress:
        data = viewer.page_data(rounds or (), problem, sample, show, most, progress=progress, whole=not serve_)
    if serve_:
        from ogls.analysis.serve import bind, create_app, serve

        bound, url = bind(port)
        out.print(f"all {count_of(data['total'], 'rollout')} of {run} at {url}; Ctrl+C ends the server", soft_wrap=True)
        if open_:
            typer.launch(url)
        serve(create_app(viewer, data), bound)
        return
    path = to or Path(f"{run}-tokens.html")
    write_file(path, render_token_view(data))
    show_page(path, f"{count_of(len(data['rollouts']), 'rollout')} in ", open_)
    if not data["complete"]:
        out.print(
            f"the page has the groups of these rollouts only; all rollouts: ogls view {run} --serve", soft_wrap=True
        )


def report(
    names: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Names of runs; all others are compared with the first.")
    ],
    to: Annotated[Path | None, typer.Option("--out", help="HTML file; default: <run>-report.html.")] = None,
    tokens: Annotated[bool, typer.Option(help="Include the token view of some rollouts.")] = True,
    policy: Annotated[bool, typer.Option(help="Run the policies for the token view; --no-policy is faster.")] = True,
    open_: Open = False,
    root: Root = "data/runs",
) -> None:
    """Write the report of a run, or a comparison of several runs, as one self-contained HTML file."""
    from ogls.analysis.report import render_report as make
    from ogls.stages.run import open_run
    from tasks.progress import show_progress_on, terminal_progress

    show_progress_on(err)
    with terminal_progress("report", 0) as progress:
        page = make([open_run(root, name) for name in names], tokens, policy, progress)
    path = to or Path(f"{names[0]}-report.html")
    write_file(path, page)
    show_page(path, "", open_)
