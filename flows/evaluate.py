"""Evaluate rounds of a run, without training."""

from __future__ import annotations

from prefect import flow

from ogls.config import RunConfig
from ogls.errors import StoreError
from ogls.stages import series
from tasks.publish import publish
from tasks.session import session
from tasks.stages import evaluate, prepare


@flow(name="evaluate", flow_run_name="evaluate {config.name}", log_prints=False)
def evaluate_flow(config: RunConfig, rounds: list[int] | None = None) -> list[int]:
    """Evaluate the policies of `rounds` (0: the base model; None: the newest round). Returns the evaluated rounds."""
    with session(config, "evaluate") as run:
        prepare(config, 0)
        evaluated = rounds if rounds is not None else [max([0, *run.records.rounds("updates")])]
        for r in evaluated:
            evaluate(config, r)
            publish(config, r)
    return evaluated


@flow(name="evaluate newest", flow_run_name="evaluate newest {config.name}", log_prints=False)
def evaluate_newest_flow(config: RunConfig) -> list[int]:
    """Evaluate the newest adapter of the series `config.name` (flows/continual.py). Returns the evaluated rounds.

    Raises StoreError if no run of the series exists.
    """
    newest = series.newest_config(config)
    if newest is None:
        raise StoreError(f"no run of the series {config.name} in {config.root}; the continual flow creates it")
    return evaluate_flow(newest.model_copy(update={"execution": config.execution}))
