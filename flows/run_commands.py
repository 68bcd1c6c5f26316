"""Commands on one run: watch (in a file of its own), sweep, stage, check, rm."""

from __future__ import annotations

import math
from typing import Annotated, Any

import typer

from flows.console import DEVELOP, LOOK, OPERATE, Config, Root, Set, count_of, err, out, show_table
from flows.watch import watch
from ogls.errors import UserError
from ogls.store import run_query

OneRun = Annotated[str, typer.Argument(help="Name of a run.")]


def register(app: Any) -> None:
    """Add the commands to the command line."""
    for command, group in ((watch, LOOK), (sweep, LOOK), (stage, DEVELOP), (check, OPERATE), (rm, OPERATE)):
        app.command(rich_help_panel=group)(command)


def sweep(
    run: Annotated[str, typer.Argument(help="Name of a run.")],
    round_: Annotated[
        int | None, typer.Option("--round", help="Round to measure; default: the newest one with teacher states.")
    ] = None,
    recipes: Annotated[list[str] | None, typer.Option("--recipe", help="Only this recipe. Repeatable.")] = None,
    strengths: Annotated[list[float] | None, typer.Option("--strength", help="Only this strength. Repeatable.")] = None,
    root: Root = "data/runs",
) -> None:
    """Compare steering recipes and strengths on the cached teacher states of a round, without training."""
    from ogls.analysis.sweep import FIGURE, FIGURES
    from ogls.analysis.sweep import sweep as measure
    from ogls.distillation.sweep import RECIPES, STRENGTHS
    from ogls.stages.run import open_run
    from tasks.progress import show_progress_on, terminal_progress

    chosen = tuple(recipes or RECIPES)
    if unknown := sorted(set(chosen) - set(RECIPES)):
        raise UserError(f"unknown recipe {', '.join(unknown)}; known recipes: {', '.join(RECIPES)}")
    if not all(map(math.isfinite, strengths or ())):
        raise UserError("--strength must be a finite number")
    opened = open_run(root, run)
    rounds = opened.records.rounds("teacher_states")
    if not rounds:
        raise UserError(
            f"run {run} has no cached teacher states: its method has no teacher, or no round has run `teach`"
        )
    number = rounds[-1] if round_ is None else round_
    show_progress_on(err)
    with opened.records.lock("sweep"), terminal_progress("sweep", number) as progress:
        measure(opened, number, progress, chosen, tuple(strengths or STRENGTHS))
    columns = (
        "recipe, strength, kl, projected_kl, auc, projected_auc, group_auc, token_auc, until_share, until_kl, tokens"
    )
    swept = run_query(opened.store, f"SELECT {columns} FROM sweeps WHERE round = {number}", run)
    show_table(swept, "table", None)
    if swept.column("auc").null_count == len(swept):
        out.print("no AUC: the round has teacher states of correct or of failed rollouts alone (train.rollouts)")
    folder = opened.records.folder(FIGURES, number)
    out.print(f"figure: {opened.records.url(f'{folder}/{FIGURE}')}", soft_wrap=True, highlight=False)
    out.print(
        "by position, class of tokens and pair of recipes: query sweep_positions, sweep_classes, sweep_agreement",
        highlight=False,
    )


def stage(
    name: Annotated[
        str, typer.Argument(help="Stage: prepare, sample, verify, teach, steer, style, train, evaluate or health.")
    ],
    config: Config,
    round_: Annotated[int, typer.Option("--round", help="Number of the round; `prepare` ignores it.", min=0)] = 1,
    set_: Set = None,
) -> None:
    """Run one stage of one round in this process, without Prefect, for debugging."""
    from ogls.config import load_config

    loaded = load_config(config, set_ or [])
    from ogls.stages.registry import STAGES
    from ogls.stages.run import Run
    from tasks.progress import show_progress_on, terminal_progress

    if name not in STAGES:
        raise UserError(f"unknown stage {name}; stages: {', '.join(STAGES)}")
    if not round_ and name not in ("prepare", "evaluate", "health"):
        raise UserError(f"--round 0: {name} runs in rounds 1 and later; round 0 is the evaluation before training")
    show_progress_on(err)
    run = Run(loaded)
    with run.records.lock(f"stage {name}"):
        if notice := run.open():
            err.print(notice, style="yellow", markup=False, highlight=False, soft_wrap=True)
        with terminal_progress(name, round_) as progress:
            result = STAGES[name](run, 0 if name == "prepare" else round_, progress)
    state = "already done" if result.reused else "done"
    out.print(f"{name} r{result.round:03d}: {count_of(result.rows, 'row')}, {state}")
    out.print_json(data={"notice": result.notice, **result.metrics})


def check(
    run: OneRun,
    repair: Annotated[
        bool, typer.Option("--repair", help="Restore files that can be computed again to the same bytes.")
    ] = False,
    root: Root = "data/runs",
) -> None:
    """Verify the checksum of every file of a run, and restore damaged files. Exits with 1 if damage remains."""
    from ogls.stages import check as checks
    from ogls.stages.run import open_run
    from tasks.progress import show_progress_on, terminal_progress

    opened = open_run(root, run)
    show_progress_on(err)
    with terminal_progress("check", 0) as progress:
        damaged = checks.find_damage(opened, progress)
    for d in damaged:
        line = f"{d.stage} r{d.round:03d}: {d.path} {d.problem}: {d.consequence}"
        out.print(line, markup=False, highlight=False, soft_wrap=True)
    if damaged and repair:
        damaged = _repair(opened, damaged)
    if damaged:
        hint = "" if repair else f"; `ogls check {run} --repair` restores what can be restored"
        err.print(f"{count_of(len(damaged), 'damaged file')}{hint}", style="red", highlight=False, soft_wrap=True)
        raise typer.Exit(1)
    out.print(f"{run}: every file is as its manifest lists it", highlight=False)


def _repair(opened: Any, damaged: list[Any]) -> list[Any]:
    """Restore damaged files; return those that remain damaged."""
    from ogls.stages import check as checks
    from tasks.progress import terminal_progress

    remaining = []
    with opened.records.lock("check"), terminal_progress("repair", 0) as progress:
        for damage, reason in checks.repair(opened, damaged, progress):
            text = f"{damage.path}: {f'not restored: {reason}' if reason else 'restored'}"
            out.print(text, markup=False, highlight=False, soft_wrap=True)
            remaining += [damage] if reason else []
    return remaining


def rm(
    run: OneRun,
    root: Root = "data/runs",
    yes: Annotated[bool, typer.Option("--yes", help="Remove without asking for confirmation.")] = False,
) -> None:
    """Remove a run with all its rounds, adapters and reports. MLflow and Prefect keep what they have of it."""
    from ogls.errors import RunLocked
    from ogls.stages.run import open_run
    from ogls.store.removal import remove_run, run_bytes

    records = open_run(root, run).records
    if holder := records.describe_holder():
        raise RunLocked(f"run {run} is held by {holder}; wait for it or stop it")
    newest = records.newest_manifest("updates")
    size = run_bytes(records) / 2**20
    out.print(
        f"{records.url('')}: {count_of(newest.round if newest else 0, 'trained round')}, {size:,.1f} MiB",
        soft_wrap=True,
    )
    if not (yes or typer.confirm(f"Remove the run {run}? This cannot be undone.")):
        raise typer.Exit(1)
    remove_run(records)
    out.print(f"removed {run}", highlight=False)
