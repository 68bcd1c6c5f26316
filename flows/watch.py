"""`ogls watch`: a live view of a run in the terminal."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from flows.console import Root, escape_control_characters, out

if TYPE_CHECKING:
    from ogls.analysis.watch import Snapshot, StageNow

_STYLES = {"running": "green", "finished": "green", "stopped by health": "red", "interrupted": "yellow"}
_VERDICTS = {"correct": "green", "failed": "red"}


def watch(
    run: Annotated[str, typer.Argument(help="Name of a run.")],
    once: Annotated[bool, typer.Option("--once", help="Print the present state and exit.")] = False,
    every: Annotated[float, typer.Option(help="Seconds between two looks at the store.", min=0.2)] = 2.0,
    rollouts: Annotated[int, typer.Option(help="Number of rollouts to show.", min=0)] = 3,
    root: Root = "data/runs",
) -> None:
    """Watch a run that goes on here or on another machine: stage, rate, curve, health, last rollouts.

    Everything is read from the store. Ends when no process holds the run; Ctrl-C ends it earlier, and the run goes on.
    """
    from rich.live import Live

    from ogls.analysis.watch import read_snapshot
    from ogls.stages.run import open_run

    opened = open_run(root, run)
    snapshot = read_snapshot(opened, count=rollouts)
    if once or snapshot.status != "running" or not out.is_terminal:
        out.print(render(snapshot))
        return
    with Live(render(snapshot), console=out, auto_refresh=False, vertical_overflow="crop") as live:
        while snapshot.status == "running":
            time.sleep(every)
            snapshot = read_snapshot(open_run(root, run), snapshot, rollouts)
            live.update(render(snapshot), refresh=True)


def render(snapshot: Snapshot) -> RenderableType:
    """A snapshot as lines for the terminal."""
    parts: list[RenderableType] = [_title(snapshot), _stage_table(snapshot)]
    if snapshot.accuracies:
        parts.append(_curve(snapshot))
    if snapshot.health:
        parts.append(Text(f"health    {snapshot.health}", style="yellow"))
    parts += [_rollout(row) for row in snapshot.rollouts]
    return Group(*parts)


def _title(snapshot: Snapshot) -> Text:
    text = Text(no_wrap=True, overflow="ellipsis").append(
        f"{snapshot.run}  round {snapshot.round} of {snapshot.rounds}  "
    )
    text.append(snapshot.status, style=_STYLES[snapshot.status])
    return text.append(f"\n{snapshot.holder}" if snapshot.holder else "", style="dim")


def _stage_table(snapshot: Snapshot) -> Table:
    """One line per stage of the round: a mark, its name, its time, and what is known of its rate."""
    table = Table.grid(padding=(0, 2))
    is_next = True
    for stage in snapshot.stages:
        if stage.done:
            rate = f"{stage.tokens:,.0f} tokens/s" if stage.tokens else ""
            table.add_row(Text("✓", style="green"), stage.name, f"{stage.seconds:.1f} s", Text(rate, style="dim"))
        elif is_next and snapshot.status == "running":
            seconds = "" if stage.seconds is None else f"{stage.seconds:.0f} s"
            table.add_row(Text("▶", style="cyan"), Text(stage.name, style="bold"), seconds, _progress(stage))
            is_next = False
        else:
            table.add_row(Text("·", style="dim"), Text(stage.name, style="dim"), "", "")
    return table


def _progress(stage: StageNow) -> Text:
    """The share of the rows that are stored, and how long the stage took before."""
    text = Text(no_wrap=True, overflow="ellipsis")
    if stage.expected:
        share = min(stage.rows / stage.expected, 1.0)
        filled = round(20 * share)
        text.append("━" * filled, style="cyan").append("━" * (20 - filled), style="dim")
        text.append(f" {stage.rows:,} of {stage.expected:,}")
    if stage.before is not None:
        text.append(f"{', ' if text else ''}{stage.before:.1f} s before", style="dim")
    return text


def _curve(snapshot: Snapshot) -> Text:
    from ogls.analysis.watch import sparkline

    recent = snapshot.accuracies[-max(out.width - 40, 10) :]
    (first, start), (last, end) = recent[0], recent[-1]
    best = max(recent, key=lambda point: point[1])
    text = Text("accuracy  ").append(sparkline([a for _, a in recent]), style="cyan")
    text.append(f"  r{first:03d} {start:.3f}")
    return text.append(f" to r{last:03d} {end:.3f}, best {best[1]:.3f} (r{best[0]:03d})" if len(recent) > 1 else "")


def _rollout(row: dict[str, Any]) -> Text:
    """A rollout in two lines: its verdict and problem, and the end of its text."""
    verdict = row["verdict"] or "not verified yet"
    text = Text(f"\n{verdict}", style=_VERDICTS.get(row["outcome"] or "", "yellow"))
    answer = f", answered {row['answer']}" if row["answer"] else ""
    head = f"  {row['problem_id']}, sample {row['sample']}: expected {row['expected']}{answer}"
    text.append(head[: out.width - len(verdict)] + "\n", style="default")
    line = " ".join(escape_control_characters(row["text"]).split())
    width = max(out.width - 4, 20)
    return text.append("  " + (line if len(line) <= width else "… " + line[-(width - 2) :]), style="dim")
