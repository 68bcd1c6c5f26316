"""Delete files of old rounds at the end of a round: as many as the section [storage] says."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from ogls.config import RunConfig
from ogls.stages.resume import is_last_round, needed_optimizers
from ogls.stages.run import Run
from ogls.stages.sample import discard_ahead
from ogls.store.retention import Droppable, drop_old_files


@task(task_run_name="drop old files r{round_:03d}", cache_policy=NO_CACHE, persist_result=False)
def drop_old(config: RunConfig, round_: int) -> None:
    """Delete teacher states and optimizer states, except those of the newest rounds and those that may be needed.

    After the last round, also rollouts that were sampled for a round that does not come.
    """
    run, storage = Run(config), config.storage
    dropped: list[Droppable] = []
    if storage.keep_states:
        dropped += drop_old_files(run.records, storage.keep_states, "states")
    if storage.keep_optimizers:
        dropped += drop_old_files(run.records, storage.keep_optimizers, "optimizers", needed_optimizers(run))
    if is_last_round(run, round_):
        discard_ahead(run, round_ + 1)
    for files in dropped:
        get_run_logger().info(f"deleted the {files.kind} of round {files.round}: {files.bytes:,} bytes")
