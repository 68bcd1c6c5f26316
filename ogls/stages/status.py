"""What became of a run: running, finished, stopped by a health check, or interrupted. Read from the store alone."""

from __future__ import annotations

from typing import Literal

from ogls.store.run_store import RunStore

Status = Literal["running", "finished", "stopped by health", "interrupted"]


def run_status(records: RunStore) -> Status:
    """The status of a run that has been opened at least once. `running`: a process holds it now, here or elsewhere."""
    if records.describe_holder():
        return "running"
    trained, health = records.newest_manifest("updates"), records.newest_manifest("health")
    if health and health.metrics["state"] == "stop" and (not trained or health.round == trained.round):
        return "stopped by health"
    rounds = (records.read_info() or {})["config"]["rounds"]
    return "finished" if health and health.round >= rounds else "interrupted"
