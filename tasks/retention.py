"""Delete old teacher states at the end of a round, if `storage.keep_states` is set."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from ogls.config import RunConfig
from ogls.stages.run import Run
from ogls.store.retention import drop_states, list_droppable


@task(task_run_name="drop old states r{round_:03d}", cache_policy=NO_CACHE, persist_result=False)
def drop_old_states(config: RunConfig, round_: int) -> None:
    """Delete teacher states, except those of the last `storage.keep_states` trained rounds."""
    records = Run(config).records
    droppable = list_droppable(records, config.storage.keep_states)
    for states in droppable:
        drop_states(records, states.round)
    if droppable:
        rounds = ", ".join(str(states.round) for states in droppable)
        get_run_logger().info(
            f"deleted the teacher states of round {rounds}: {sum(states.bytes for states in droppable):,} bytes"
        )
