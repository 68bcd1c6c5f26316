"""Continual training on a schedule: each run of a series trains on the problems added since the previous run."""

from __future__ import annotations

from prefect import flow
from prefect.states import Completed

from flows.train import train_flow
from ogls.config import RunConfig
from ogls.stages import series
from tasks.progress import print_line


@flow(name="continual", flow_run_name="continual {config.name}", log_prints=False)
def continual_flow(config: RunConfig) -> object:
    """Train the next run of the series `config.name` on new problems, starting from the last good adapter.

    An unfinished run is finished first. Without new problems the flow returns the state `Nothing new`.
    """
    next_config = series.next_run(config)
    if next_config is None:
        message = (
            f"no new problems in {config.problems.source} after {len(series.series_runs(config))} runs of {config.name}"
        )
        print_line(f"  {message}")
        return Completed(name="Nothing new", message=message)
    train_flow(next_config)
    return next_config.name
