"""What the commands share: two consoles, results in a format, and flows in the foreground."""

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
_PATIENCE = 600.0  # seconds to wait for a Prefect server that went away in a flow

# Arguments that several commands share.
Config = Annotated[Path, typer.Argument(help="A TOML file, such as deployments/runs/tiny.toml.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override a value: section.key=value. Repeatable.")]
Root = Annotated[str, typer.Option(help="The store: a directory, s3://bucket/path, or another fsspec URL.")]


def show_table(table: Any, format_: str, to: Path | None) -> None:
    """Print an Arrow table, or write it to a file."""
    import json

    if format_ == "parquet":
        if to is None:
            raise UserError("parquet goes to a file: add --out FILE")
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
        raise UserError(f"no format {format_}; there are table, csv, json and parquet")
    to.write_text(text) if to else typer.echo(text, nl=False)


def write_file(path: Path, text: str) -> None:
    """Write a file for people, whole or not at all."""
    with atomic_write(path, replace=True) as file:
        file.write_text(text, encoding="utf-8")


def _escape_formula(text: str | None) -> str | None:
    """Text that no spreadsheet takes for a formula: a quote before =, +, -, @ and control characters, as OWASP has it.
    Numbers stay as they are."""
    if not text or text[0] not in "=+-@\t\r\n":
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text


def escape_control_characters(text: str) -> str:
    """Text with control characters spelt out, so that no rollout moves a terminal's cursor or colours it."""
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
    """Settings that must be in place before prefect is imported; whatever the user has set stays."""
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    # Errors are told once, by the command; Prefect would add a traceback. The server's log has all of it.
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    os.environ.setdefault("PREFECT_LOGGING_INTERNAL_LEVEL", "CRITICAL")
    # A first start makes a database; on a busy machine that has taken longer than Prefect's 20 seconds.
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "180")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")


def run_in_foreground(flow: Callable[[], Any]) -> Any:
    """Carry a flow out here, its progress on the terminal.

    If the Prefect server goes away in it, wait for the server and start the flow anew: finished stages are not done
    again. Raises UserError if the server does not come back.
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
        # Where Ctrl-C hits Prefect between two tasks it can come out as any error of Prefect's own.
        if interrupted:
            raise Interrupted from None
        raise
    finally:
        signal.signal(signal.SIGINT, before)


def prefect_address() -> str:
    """The Prefect API that the environment or the user's profile names; empty for none."""
    from prefect.settings import PREFECT_API_URL

    return PREFECT_API_URL.value() or ""


def _await_prefect(address: str) -> None:
    from flows.services import responds

    err.print(
        f"the Prefect server at {address} has gone away; waiting for it, what is finished is kept", style="yellow"
    )
    deadline = time.monotonic() + _PATIENCE
    while not responds(f"{address}/health", "true"):
        if time.monotonic() > deadline:
            raise UserError(
                f"the Prefect server at {address} has not come back in {_PATIENCE / 60:.0f} minutes; start it and give "
                "the same command again: it goes on where this one ended"
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
    """Ctrl-C, under a name that typer does not take for its own."""
