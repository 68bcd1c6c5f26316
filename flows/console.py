"""What the commands share: consoles, output formats, and running a flow in the foreground."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ogls.errors import UserError
from ogls.store.atomic import atomic_write

out, err = Console(), Console(stderr=True)
_PATIENCE = 600.0  # seconds to wait for a Prefect server that stopped responding during a flow

# Arguments that several commands share.
Config = Annotated[Path, typer.Argument(help="TOML file, such as deployments/runs/tiny.toml.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override a setting: section.key=value. Repeatable.")]
Root = Annotated[str, typer.Option(help="Store: a directory, s3://bucket/path, or another fsspec URL.")]


def show_table(table: Any, format_: str, to: Path | None) -> None:
    """Print an Arrow table, or write it to a file."""
    import json

    if format_ == "parquet":
        if to is None:
            raise UserError("the format parquet needs a file: add --out FILE")
        import pyarrow.parquet as pq

        pq.write_table(table, to)
        return
    if format_ == "csv":
        import io

        import pyarrow.csv as pc

        flat = table
        for i, column in enumerate(table.schema):
            if str(column.type).startswith("list"):
                flat = flat.set_column(i, column.name, [[json.dumps(v) for v in table[column.name].to_pylist()]])
            elif str(column.type) == "string":
                flat = flat.set_column(i, column.name, [[_escape_formula(v) for v in table[column.name].to_pylist()]])
        sink = io.BytesIO()
        pc.write_csv(flat, sink)
        text = sink.getvalue().decode()
    elif format_ == "json":
        text = json.dumps(table.to_pylist(), indent=1, default=repr, ensure_ascii=False) + "\n"
    elif format_ == "table":
        _print_table(table, to)
        return
    else:
        raise UserError(f"unknown format {format_}; formats: table, csv, json and parquet")
    to.write_text(text) if to else typer.echo(text, nl=False)


def write_file(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_write(path, replace=True) as file:
        file.write_text(text, encoding="utf-8")


def _escape_formula(text: str | None) -> str | None:
    """Text that a spreadsheet does not interpret as a formula: a quote before =, +, -, @, control characters (OWASP).

    Numbers stay unchanged.
    """
    if not text or text[0] not in "=+-@\t\r\n":
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text


def escape_control_characters(text: str) -> str:
    """Text with control characters escaped, so that a rollout cannot move the cursor of a terminal or change its
    colours."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def _print_table(table: Any, to: Path | None) -> None:
    from rich.markup import escape
    from rich.text import Text

    def cell(value: Any) -> Text:
        text = f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)
        return Text(escape_control_characters(text if len(text) <= 80 else text[:79] + "…"))

    printed = Table(*[escape(n) for n in table.schema.names])
    for row in table.slice(0, 1000).to_pylist():
        printed.add_row(*[cell(v) for v in row.values()])
    caption = f"{len(table)} rows" + (", the first 1000 shown" if len(table) > 1000 else "")
    if to:
        with open(to, "w") as file:
            Console(file=file, width=200).print(printed)
    else:
        (out if out.is_terminal else Console(width=160)).print(printed)
    err.print(caption, style="dim")


def configure_prefect() -> None:
    """Set environment variables that Prefect reads on import; variables that the user has set stay."""
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    # The command prints an error once; Prefect would add a traceback, which is in the log of the server.
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    os.environ.setdefault("PREFECT_LOGGING_INTERNAL_LEVEL", "CRITICAL")
    # The first start creates a database, which can take longer than Prefect's 20 seconds on a busy machine.
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "180")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")


def run_in_foreground(flow: Callable[[], Any]) -> Any:
    """Run a flow in this process and show its progress on the terminal.

    If the Prefect server stops responding, wait for it and start the flow again: finished stages are not repeated.
    Raises UserError if the server does not come back.
    """
    import httpx

    from tasks.progress import show_progress_on

    show_progress_on(err)
    if address := prefect_address():
        _check_prefect(address)
    else:
        from flows.services import end_orphaned_servers

        end_orphaned_servers()
        err.print("starting a temporary Prefect server (set PREFECT_API_URL to use a running one)", style="dim")
    interrupted = False

    def interrupt(number: int, frame: Any) -> None:
        nonlocal interrupted
        interrupted = True
        signal.default_int_handler(number, frame)

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        while True:
            try:
                return flow()
            except httpx.TransportError:
                if not address or interrupted:
                    raise
                _await_prefect(address)
    except BaseException:
        # Ctrl-C between two tasks can surface as any error of Prefect.
        if interrupted:
            raise Interrupted from None
        raise
    finally:
        signal.signal(signal.SIGINT, before)


def prefect_address() -> str:
    """The Prefect API URL from the environment or the user's profile; empty if there is none."""
    from prefect.settings import PREFECT_API_URL

    return PREFECT_API_URL.value() or ""


def _await_prefect(address: str) -> None:
    from flows.services import responds

    err.print(
        f"the Prefect server at {address} does not respond; waiting for it; finished stages are kept", style="yellow"
    )
    deadline = time.monotonic() + _PATIENCE
    while not responds(f"{address}/health", "true"):
        if time.monotonic() > deadline:
            raise UserError(
                f"the Prefect server at {address} has not come back in {_PATIENCE / 60:.0f} minutes; start it and run "
                "the same command again: it continues where this one ended"
            )
        time.sleep(1)


def _check_prefect(address: str) -> None:
    import httpx

    try:
        httpx.get(f"{address}/health", timeout=10)
    except httpx.TransportError:
        raise UserError(
            f"no Prefect server answers at {address}; start one (prefect server start), or unset PREFECT_API_URL"
        ) from None


class Interrupted(Exception):
    """Ctrl-C, as an exception that typer does not handle."""
