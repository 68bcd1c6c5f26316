"""The session of a flow on one run: lock and open the run, mark dead flow runs as Crashed, end workers and tracking."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterName,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Crashed
from rich.markup import escape

from ogls.config import RunConfig
from ogls.revision import code_version
from ogls.stages.kept_models import drop_models
from ogls.stages.resume import is_complete
from ogls.stages.run import Run
from ogls.stages.workers import end_workers
from tasks.devices import take_gpu
from tasks.progress import print_line
from tasks.tracking import end_tracking

_GRACE = timedelta(seconds=5)  # a flow run takes less time from its start to the lock
_CRASHED_MESSAGE = "The process of this flow run has ended. Another process holds the run now and continues it."


@contextmanager
def session(config: RunConfig, purpose: str) -> Iterator[Run]:
    """Lock and open a run for the flow `purpose`, and yield it; end its workers and tracking afterwards.

    Only one process can hold a run, so every other flow run of it that Prefect shows as Running is dead and is marked
    as Crashed. Raises RunLocked if another process holds the run (`RunStore.lock`), and StoreError if the run cannot be
    opened with this configuration (`RunStore.open`).
    """
    if gpu := take_gpu(config):
        get_run_logger().info(f"GPU {gpu} of this machine")
    run = Run(config)
    code_version()  # calls git, which is slow; the result is cached before the lock is taken
    with run.records.lock(purpose):
        if notice := run.open():
            get_run_logger().warning(notice)
            print_line(f"  [yellow]{escape(notice)}[/yellow]")
        with get_client(sync_client=True) as client:
            _tag(client, config)
            _mark_dead_flow_runs(client, config, purpose)
        try:
            yield run
        except BaseException:
            end_tracking(config, "FAILED")
            raise
        finally:
            end_workers()
            drop_models()
        end_tracking(config, "FINISHED" if purpose == "train" or is_complete(config) else "KILLED")


def flow_tags(config: RunConfig) -> set[str]:
    """Tags to filter flow runs by: the method and the name of the model."""
    return {f"method: {config.method}", f"model: {'/'.join(config.model.path.rstrip('/').split('/')[-2:])}"}


def _tag(client: Any, config: RunConfig) -> None:
    if flow_run.id:
        client.update_flow_run(flow_run.id, tags=sorted({*flow_run.tags, *flow_tags(config)}))


def _mark_dead_flow_runs(client: Any, config: RunConfig, purpose: str) -> None:
    """Mark the other flow runs of this run and purpose that Prefect shows as Running as Crashed.

    One that has just started may be alive and about to be refused the lock; it is given time to end by itself.
    """
    begun, others = datetime.now(UTC), _running_flow_runs(client, config, purpose)
    while datetime.now(UTC) - begun < _GRACE and any(begun - (o.start_time or begun) < _GRACE for o in others):
        time.sleep(0.5)
        others = _running_flow_runs(client, config, purpose)
    for other in others:
        # Without force: a flow run that was refused a moment ago is Failed by now, and stays Failed.
        client.set_flow_run_state(other.id, Crashed(message=_CRASHED_MESSAGE))


def _running_flow_runs(client: Any, config: RunConfig, purpose: str) -> list[Any]:
    """The other flow runs of this run and purpose that Prefect shows as Running."""
    running = FlowRunFilter(
        name=FlowRunFilterName(any_=[f"{purpose} {config.name}"]),
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.RUNNING])),
    )
    return [
        other
        for other in client.read_flow_runs(flow_run_filter=running)
        if other.parameters.get("config", {}).get("root") == config.root and str(other.id) != flow_run.id
    ]
