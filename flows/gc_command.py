"""The command gc: delete old teacher states and optimizer states."""

from __future__ import annotations

from collections import Counter
from typing import Annotated

import typer

from flows.console import Root, err, out, show_table
from ogls.errors import RunLocked, UserError

OneRun = Annotated[str | None, typer.Option("--run", help="Only this run; default: all runs.")]
_KINDS = {"states": "teacher states", "optimizers": "optimizer states"}


def gc(
    keep: Annotated[
        int, typer.Option(help="Number of newest trained rounds that keep their teacher states.", min=1)
    ] = 1,
    optimizers: Annotated[
        int,
        typer.Option(help="Also delete the optimizer states of all but so many newest rounds; 0 deletes none.", min=0),
    ] = 0,
    run: OneRun = None,
    root: Root = "data/runs",
    yes: Annotated[bool, typer.Option("--yes", help="Delete without asking for confirmation.")] = False,
) -> None:
    """Delete old teacher states, and old optimizer states on request, after listing them.

    Trajectories, targets and adapters are always kept, and every optimizer state that a training may start from.
    """
    import pyarrow as pa

    from ogls.stages.resume import needed_optimizers
    from ogls.stages.run import open_run
    from ogls.store import existing_store
    from ogls.store.retention import drop_files, list_droppable

    opened = [r for r in existing_store(root).runs() if run in (None, r.name)]
    if run and not opened:
        raise UserError(f"no run {run} in {root}; `ogls runs --root {root}` lists the runs")
    droppable = [(r, d) for r in opened for d in list_droppable(r, keep)]
    for r in opened if optimizers else []:
        needed = needed_optimizers(open_run(root, r.name))
        droppable += [(r, d) for d in list_droppable(r, optimizers, "optimizers", needed)]
    if not droppable:
        also = f", or optimizer states of more than {optimizers} that nothing needs" if optimizers else ""
        out.print(f"nothing to delete: no run has teacher states of more than {keep} trained rounds{also}")
        return
    rows = [
        {"run": d.run, "round": d.round, "what": d.kind, "files": d.files, "mebibytes": d.bytes / 2**20}
        for _, d in droppable
    ]
    show_table(pa.Table.from_pylist(rows), "table", None)
    total = sum(d.bytes for _, d in droppable)
    counts = Counter(d.kind for _, d in droppable)
    listed = " and ".join(f"the {_KINDS[kind]} of {count} rounds" for kind, count in counts.items())
    if not (yes or typer.confirm(f"Delete {listed}, {total / 2**20:.1f} MiB?")):
        raise typer.Exit(1)
    freed = 0
    for records in opened:
        rounds = [d for r, d in droppable if r is records]
        try:
            with records.lock("gc"):
                for d in rounds:
                    drop_files(records, d.round, d.kind)
                    freed += d.bytes
        except RunLocked as error:
            err.print(f"skipped: {error}", style="yellow", markup=False, soft_wrap=True)
    out.print(f"deleted {freed / 2**20:.1f} MiB", highlight=False)
