"""Shared by all commands: consoles, output formats, and running a flow in the foreground."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.status import Status
from rich.table import Table

from flows.shipped import find_file
from ogls.errors import UserError
from ogls.store.atomic import atomic_write

out, err = Console(), Console(stderr=True)

_WRAPPED = 24  # characters of a column of texts in a terminal that is too narrow for them

# Groups of commands in `ogls --help`.
GROUPS = RUN, LOOK, OPERATE, DATA, DEVELOP = (
    "Train and evaluate",
    "Look at runs",
    "Operate",
    "Data and models",
    "Develop",
)

# Arguments that several commands share.
CONFIG_HELP = "TOML file of a run, or the name of one in deployments/runs/, such as tiny."
Config = Annotated[Path, typer.Argument(help=CONFIG_HELP, parser=partial(find_file, kind="runs"))]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override a setting: section.key=value. Repeatable.")]
Open = Annotated[bool, typer.Option("--open", help="Open the page in a browser.")]
Root = Annotated[str, typer.Option(help="Store of the runs: a folder, or s3://bucket/path (gs://, az://).")]


def show_table(table: Any, format_: str, to: Path | None) -> None:
    """Print an Arrow table, or write it to the file `to`.

    Equal column names get a number. Raises UserError for an unknown format, for parquet without a file, and if the file
    cannot be written.
    """
    table = table.rename_columns(_unique(table.schema.names))
    if format_ == "parquet":
        if to is None:
            raise UserError("the format parquet needs a file: add --out FILE")
        import pyarrow as pa
        import pyarrow.parquet as pq

        with atomic_write(to, replace=True, errors=(OSError, pa.ArrowException)) as file:
            pq.write_table(table, file)
        return
    if format_ == "table" and to is None:
        _print_table(table)
        return
    if format_ == "table":
        text = _render_table(table)
    elif format_ == "csv":
        text = _to_csv(table)
    elif format_ == "json":
        text = json.dumps(_json_value(table.to_pylist()), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    else:
        raise UserError(f"unknown format {format_}; formats: table, csv, json and parquet")
    write_file(to, text) if to else typer.echo(text, nl=False)


def _unique(names: Sequence[str]) -> list[str]:
    """The names, with _1, _2, ... after a name that occurred before, as DuckDB names the columns of a table."""
    unique: list[str] = []
    for name in names:
        candidates = (f"{name}_{n}" if n else name for n in count())
        unique.append(next(c for c in candidates if c not in unique))
    return unique


def _json_value(value: Any) -> Any:
    """A value of a query as JSON: NaN and infinity as null, times in ISO format, bytes in hex, other types as text."""
    if isinstance(value, dict):
        return {str(k): _json_value(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, bytes):
        return value.hex()
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _to_csv(table: Any) -> str:
    """CSV text; lists, structs and other values that CSV does not have are JSON text."""
    import pyarrow as pa
    import pyarrow.csv as pc

    flat = table
    for i, column in enumerate(table.schema):
        is_plain = pa.types.is_primitive(column.type) or pa.types.is_null(column.type)
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            flat = flat.set_column(i, column.name, [[_escape_formula(v) for v in table[column.name].to_pylist()]])
        elif not is_plain or pa.types.is_duration(column.type):
            values = [None if v is None else json.dumps(_json_value(v)) for v in table[column.name].to_pylist()]
            flat = flat.set_column(i, column.name, pa.array(values, pa.string()))
    sink = io.BytesIO()
    pc.write_csv(flat, sink)
    return sink.getvalue().decode()


def count_of(number: int, noun: str) -> str:
    """A number with its noun: 1 row, 2 rows."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def write_file(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_write(path, replace=True) as file:
        file.write_text(text, encoding="utf-8")


def show_page(path: Path, what: str, in_browser: bool) -> None:
    """Say where a page is, or open it in a browser."""
    import webbrowser

    opened = in_browser and webbrowser.open(path.resolve().as_uri())
    out.print(f"{what}{path}" + ("" if opened else ": open it in a browser"), soft_wrap=True, highlight=False)


def _escape_formula(text: str | None) -> str | None:
    """Add a quote before text that a spreadsheet would run as a formula: that starts with =, +, -, @, tab or newline.

    Numbers stay unchanged. See OWASP, "CSV Injection".
    """
    if not text or text[0] not in "=+-@\t\r\n":
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text


def escape_control_characters(text: str) -> str:
    """Escape control characters, so that the text of a rollout cannot control the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def _cell(value: Any) -> str:
    """A value as the text of a cell, at most 80 characters."""
    text = f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)
    return escape_control_characters(text if len(text) <= 80 else text[:79] + "…")


def _rich_table(table: Any) -> Table:
    """The first 1000 rows as a Rich table."""
    from rich.markup import escape
    from rich.text import Text

    rendered = Table(*[escape(n) for n in table.schema.names])
    for row in table.slice(0, 1000).to_pylist():
        rendered.add_row(*[Text(_cell(v)) for v in row.values()])
    return rendered


def _render_table(table: Any) -> str:
    sink = io.StringIO()
    Console(file=sink, width=200).print(_rich_table(table))
    return sink.getvalue()


def _print_table(table: Any) -> None:
    console = out if out.is_terminal else Console(width=160)
    shown = _fitting(table, console.width)
    console.print(_rich_table(table.select(shown)))
    notes = [count_of(len(table), "row")]
    if len(table) > 1000:
        notes.append("only the first 1000 are shown")
    if hidden := [name for name in table.schema.names if name not in shown]:
        notes.append(f"without {', '.join(hidden)}, for which the terminal is too narrow (--format csv or json)")
    err.print(", ".join(notes), style="dim", highlight=False, soft_wrap=True)


def _fitting(table: Any, width: int) -> list[str]:
    """The first columns that fit into `width` characters with their names whole; longer texts wrap."""
    names: list[str] = []
    used = 1
    for name in table.schema.names:
        longest = max((len(_cell(v)) for v in table[name].slice(0, 1000).to_pylist()), default=0)
        used += max(len(name), min(longest, _WRAPPED)) + 3  # padding and a border
        if names and used > width:
            break
        names.append(name)
    return names


@contextmanager
def waiting(text: str) -> Iterator[Status]:
    """Show a spinner and what is being waited for; without a terminal, print it."""
    if not err.is_terminal:
        err.print(text, style="dim", highlight=False, soft_wrap=True)
    with err.status(text) as status:
        yield status
