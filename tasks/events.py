"""Prefect events that automations can react to: a round finished, a new best round, a collapse, a stage redone.

    ogls.round.finished    a round was published: accuracy, its confidence interval, mean length
    ogls.round.best        the accuracy of the round is the highest so far
    ogls.run.collapsed     a health check stopped the run or rolled it back: the reason, and the best round
    ogls.stage.redone      a finished stage was redone: the stage, the round, and the reason

The resource is `ogls.run.<name>`; payloads are small and contain no rollout text.
"""

from __future__ import annotations

import time
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from prefect.events import emit_event

from ogls.config import RunConfig
from ogls.records import StageResult
from ogls.stages.rounds import RoundRow


def emit(config: RunConfig, event: str, payload: dict[str, Any], occasion: str) -> None:
    """Emit one event of a run. Its id is derived from `occasion`, so that the server stores an event once."""
    resource = {"prefect.resource.id": f"ogls.run.{config.name}", "prefect.resource.name": config.name}
    event_id = uuid5(NAMESPACE_URL, f"{config.root}/{config.name}/{event}/{occasion}")
    emit_event(event=event, resource=resource, payload=payload, id=event_id)


def emit_round(config: RunConfig, row: RoundRow, occasion: str, new: bool) -> None:
    """Emit the events of a published round. `new` is false if the round was published before its evaluation."""
    summary = row.summary or {}
    numbers = {k: summary.get(k) for k in ("accuracy", "accuracy_low", "accuracy_high", "mean_length")}
    if new:
        emit(config, "ogls.round.finished", {"round": row.round, **numbers}, occasion)
    if row.health.get("best") == row.round:
        emit(config, "ogls.round.best", {"round": row.round, **numbers}, occasion)
    if row.health.get("state") in ("stop", "rollback"):
        payload = {k: row.health[k] for k in ("state", "why", "best", "notice")}
        emit(config, "ogls.run.collapsed", {"round": row.round, **payload}, occasion)


def emit_redone(config: RunConfig, result: StageResult) -> None:
    """Emit `ogls.stage.redone` if the stage was redone."""
    if result.redone:
        payload = {"stage": result.stage, "round": result.round, "why": result.redone}
        emit(config, "ogls.stage.redone", payload, f"{result.stage}/{result.round}/{time.time()}")
