"""Prefect events that automations can wait for: a round finished, a new best, a collapse, a stage redone.

    ogls.round.finished    every published round: accuracy, its interval, length
    ogls.round.best        its accuracy is the highest so far
    ogls.run.collapsed     health has stopped the run or rolled it back: why, and the best round
    ogls.stage.redone      finished work was done again: which, and why

The resource is `ogls.run.<name>`; payloads are small and hold no text of a rollout.
"""

from __future__ import annotations

from typing import Any

from prefect.events import emit_event

from ogls.analysis.rounds import RoundRow
from ogls.config import RunConfig
from ogls.records import StageResult


def emit(config: RunConfig, event: str, payload: dict[str, Any]) -> None:
    """Emit one event of a run."""
    resource = {"prefect.resource.id": f"ogls.run.{config.name}", "prefect.resource.name": config.name}
    emit_event(event=event, resource=resource, payload=payload)


def emit_round(config: RunConfig, row: RoundRow) -> None:
    """What a published round amounts to."""
    summary = row.summary or {}
    numbers = {k: summary.get(k) for k in ("accuracy", "accuracy_low", "accuracy_high", "mean_length")}
    emit(config, "ogls.round.finished", {"round": row.round, **numbers})
    if row.health.get("best") == row.round:
        emit(config, "ogls.round.best", {"round": row.round, **numbers})
    if row.health.get("state") in ("stop", "rollback"):
        told = {k: row.health[k] for k in ("state", "why", "best", "notice")}
        emit(config, "ogls.run.collapsed", {"round": row.round, **told})


def emit_redone(config: RunConfig, result: StageResult) -> None:
    """That a stage was done again, if it was."""
    if result.redone:
        emit(config, "ogls.stage.redone", {"stage": result.stage, "round": result.round, "why": result.redone})
