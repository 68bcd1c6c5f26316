"""Old teacher states go when a round ends, if the configuration says so."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from ogls.config import RunConfig
from ogls.stages.run import Run
from ogls.store.retention import drop_states, list_droppable


@task(task_run_name="drop old states r{round_:03d}", cache_policy=NO_CACHE, persist_result=False)
def drop_old_states(config: RunConfig, round_: int) -> None:
    """Keep the teacher states of `storage.keep_states` trained rounds."""
    records = Run(config).records
    old = list_droppable(records, config.storage.keep_states)
    for found in old:
        drop_states(records, found.round)
    if old:
        rounds = ", ".join(str(f.round) for f in old)
        get_run_logger().info(f"dropped teacher states of round {rounds}: {sum(f.bytes for f in old):,} bytes")
