"""Continual training, started by a schedule: each run trains on the problems that are new since the last one."""

from __future__ import annotations

from prefect import flow
from prefect.states import Completed

from flows.train import train_flow
from ogls.config import RunConfig
from ogls.stages import series
from tasks.progress import print_line


@flow(name="continual", flow_run_name="continual {config.name}", log_prints=False)
def continual_flow(config: RunConfig) -> object:
    """Train the next run of the series `config.name` on new problems, from the last good adapter.

    An unfinished run is finished first. Without new problems the flow completes at once with the state `Nothing new`.
    """
    chosen = series.next_run(config)
    if chosen is None:
        message = (
            f"nothing new in {config.problems.source} since {len(series.series_runs(config))} runs of {config.name}"
        )
        print_line(f"  {message}")
        return Completed(name="Nothing new", message=message)
    train_flow(chosen)
    return chosen.name
