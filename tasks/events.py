"""Prefect events that automations can react to: a round finished, a new best round, a collapse, a stage redone.

    ogls.round.finished    a round was published: accuracy, its confidence interval, mean length
    ogls.round.best        the accuracy of the round is the highest so far
    ogls.run.collapsed     a health check stopped the run or rolled it back: the reason, and the best round
    ogls.stage.redone      a finished stage was redone: the stage, the round, and the reason

The resource is `ogls.run.<name>`; payloads are small and contain no rollout text.
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
    """Emit the events of a published round."""
    summary = row.summary or {}
    numbers = {k: summary.get(k) for k in ("accuracy", "accuracy_low", "accuracy_high", "mean_length")}
    emit(config, "ogls.round.finished", {"round": row.round, **numbers})
    if row.health.get("best") == row.round:
        emit(config, "ogls.round.best", {"round": row.round, **numbers})
    if row.health.get("state") in ("stop", "rollback"):
        payload = {k: row.health[k] for k in ("state", "why", "best", "notice")}
        emit(config, "ogls.run.collapsed", {"round": row.round, **payload})


def emit_redone(config: RunConfig, result: StageResult) -> None:
    """Emit `ogls.stage.redone` if the stage was redone."""
    if result.redone:
        emit(config, "ogls.stage.redone", {"stage": result.stage, "round": result.round, "why": result.redone})
