"""Commands that read or clean the store: query, dataset, export, tables, runs, config, gc."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flows.console import (
    DATA,
    DEVELOP,
    LOOK,
    OPERATE,
    Config,
    Root,
    Set,
    count_of,
    out,
    show_table,
)
from flows.gc_command import gc
from ogls.errors import UserError
from ogls.store import run_query

Format = Annotated[str, typer.Option("--format", help="Output format: table, csv, json or parquet.")]
OneRun = Annotated[str | None, typer.Option("--run", help="Only this run; default: all runs.")]


def register(app: Any) -> None:
    """Add the commands to the command line."""
    groups = {LOOK: (runs, query, tables), DATA: (dataset, export), OPERATE: (gc,)}
    for group, commands in groups.items():
        for command in commands:
            app.command(rich_help_panel=group)(command)
    app.command("config", rich_help_panel=DEVELOP)(show_config)


def query(
    sql: Annotated[
        str | None, typer.Argument(help="A SELECT statement on the tables that `ogls tables` lists.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Run this named query; an unknown name lists all of them.")] = None,
    run: OneRun = None,
    root: Root = "data/runs",
    format_: Format = "table",
    to: Annotated[Path | None, typer.Option("--out", help="Write the result to this file.")] = None,
    export: Annotated[
        Path | None,
        typer.Option("--export-db", help="Write a DuckDB file of views, for any DuckDB client, and run no query."),
    ] = None,
) -> None:
    """Query the store in SQL: trajectories, verdicts, targets, scores and more."""
    from ogls.store import existing_store, export_database, named_queries

    queries = named_queries()
    if export:
        if sql or name:
            raise UserError("--export-db takes no query: the file has a view for every table and every named query")
        export_database(existing_store(root), export, run)
        out.print(f"{export}: open it with any DuckDB client, such as `duckdb {export}`", soft_wrap=True)
        return
    if (sql is None) == (name is None):
        raise UserError(f"give one SELECT, or --name with one of: {', '.join(queries)}")
    if name is not None and name not in queries:
        descriptions = "\n  ".join(f"{n}: {text.splitlines()[0].removeprefix('-- ')}" for n, text in queries.items())
        raise UserError(f"unknown query {name}; named queries:\n  {descriptions}")
    show_table(run_query(existing_store(root), queries[name] if name else sql or "", run), format_, to)


def dataset(
    to: Annotated[
        Path, typer.Argument(metavar="OUT", help="A new .jsonl, .csv or .parquet file, or a new folder for a dataset.")
    ],
    kind: Annotated[
        str,
        typer.Option(help="Kind of dataset: rollouts, messages, sft, preference, or inspect (logs to view)."),
    ] = "rollouts",
    where: Annotated[
        str, typer.Option(help="SQL condition on rollouts, such as: round >= 3 AND n_tokens < 900")
    ] = "true",
    pairs: Annotated[int, typer.Option(help="Maximum number of pairs per group (only --kind preference).", min=1)] = 1,
    run: OneRun = None,
    root: Root = "data/runs",
) -> None:
    """Export rollouts, SFT examples or preference pairs as a Hugging Face dataset folder or JSON Lines."""
    from ogls.analysis.export import KINDS, select_rows, write_dataset, write_logs
    from ogls.store import existing_store

    row_kind = next((k for k in KINDS if k == kind), None)
    if row_kind is None:
        raise UserError(f"unknown kind {kind}; kinds: {', '.join(KINDS)}")
    store = existing_store(root)
    rows = select_rows(store, row_kind, where, run, pairs)
    if kind == "inspect":
        logs = write_logs(store, rows, to)
        out.print(f"{count_of(len(rows), 'rollout')} in {count_of(logs, 'log')}: inspect view --log-dir {to}")
        return
    if to.suffix in (".csv", ".parquet"):
        if to.exists():
            raise UserError(f"{to} already exists: choose another name or remove it")
        show_table(rows, to.suffix[1:], to)
    else:
        origin = f"Made by `ogls dataset` from {run or 'all runs'}: rollouts for which `{where}`."
        write_dataset(rows, to, row_kind, origin)
    out.print(f"{count_of(len(rows), 'row')} of {kind} in {to}", soft_wrap=True, highlight=False)


def export(
    run: Annotated[str, typer.Argument(help="Name of a run.")],
    to: Annotated[Path, typer.Argument(metavar="OUT", help="New folder for the model.")],
    round_: Annotated[int | None, typer.Option("--round", help="Round to export; default: the newest.")] = None,
    root: Root = "data/runs",
) -> None:
    """Export the policy of a round as a merged Hugging Face model folder with a model card."""
    from ogls.analysis.model_card import export_model
    from ogls.stages.run import open_run

    opened = open_run(root, run)
    newest = opened.records.newest_manifest("updates")
    number = round_ if round_ is not None else newest.round if newest else 0
    export_model(opened, number, to)
    out.print(f"round {number} of {run} in {to}", soft_wrap=True, highlight=False)


def tables() -> None:
    """List the tables and their columns."""
    from ogls.records import ALL_TABLES
    from ogls.store.query import STAGES_ABOUT, STAGES_COLUMNS

    for table in ALL_TABLES:
        out.print(f"[bold]{table.name}[/bold]  {table.about} Written by {table.stage}.", highlight=False)
        names = ", ".join(["run", "round", *table.schema.names])
        out.print(f"    {names}", highlight=False, style="dim")
    out.print(f"[bold]stages[/bold]  {STAGES_ABOUT}", highlight=False)
    out.print(f"    {', '.join(STAGES_COLUMNS)}", highlight=False, style="dim")


_SORTS = ("created", "run", "status", "rounds", "accuracy")


def runs(
    root: Root = "data/runs",
    format_: Format = "table",
    sort: Annotated[str, typer.Option(help=f"Column to sort by: {', '.join(_SORTS)}.")] = "created",
) -> None:
    """List the runs of a store: whether each is finished, running, stopped by a health check, or interrupted."""
    import pyarrow as pa

    from ogls.store import existing_store

    if sort not in _SORTS:
        raise UserError(f"unknown --sort {sort}; columns: {', '.join(_SORTS)}")
    rows = [_run_row(run) for run in existing_store(root).runs()]
    rows.sort(key=lambda row: (row[sort] is None, row[sort]))
    names = ("run", "status", "rounds", "accuracy", "method", "model", "created", "held_by")
    types = [pa.string(), pa.string(), pa.int64(), pa.float64(), *[pa.string()] * 4]
    if format_ == "table":
        types[3] = pa.string()
        for row in rows:
            row["accuracy"] = None if row["accuracy"] is None else f"{row['accuracy']:.3f}"
            row["created"] = row["created"][:16].replace("T", " ")
    show_table(pa.Table.from_pylist(rows, schema=pa.schema(list(zip(names, types, strict=True)))), format_, None)


def _run_row(run: Any) -> dict[str, Any]:
    """A run as a row of `ogls runs`."""
    from ogls.stages.status import run_status
    from ogls.stages.summaries import read_first_summary

    config = (info := run.read_info() or {})["config"]
    trained, evaluated = (run.newest_manifest(table) for table in ("updates", "scores"))
    objective = config["train"]["objective"]
    return {
        "run": run.name,
        "status": run_status(run),
        "rounds": trained.round if trained else 0,
        "accuracy": read_first_summary(run, evaluated.round)["accuracy"] if evaluated else None,
        "method": config["steer"]["recipe"] if objective == "distil" else objective,
        "model": config["model"]["path"],
        "created": info["created"],
        "held_by": run.describe_holder(),
    }


def show_config(config: Config, set_: Set = None) -> None:
    """Print the resolved configuration as TOML."""
    from ogls.config import load_config, to_toml

    typer.echo(to_toml(load_config(config, set_ or [])), nl=False)
