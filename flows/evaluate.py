"""Evaluation of any rounds of a run, on its own."""

from __future__ import annotations

from prefect import flow

from ogls.config import RunConfig
from ogls.run import Run
from tasks.publish import publish
from tasks.stages import evaluate, prepare


@flow(name="evaluate", flow_run_name="evaluate {config.name}", log_prints=False)
def evaluate_flow(config: RunConfig, rounds: list[int] | None = None) -> list[int]:
    """Evaluate the policies that `rounds` ended with (0: the base model); the newest if none are named."""
    run = Run(config)
    with run.records.lock("evaluate"):
        run.records.open(config)
        prepare(config, 0)
        chosen = rounds if rounds is not None else [max([0, *run.records.rounds("updates")])]
        for r in chosen:
            evaluate(config, r)
            publish(config, r)
    return chosen
