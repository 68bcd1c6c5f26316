"""Show runs of a store in a Prefect server that did not see their training: another server did, or another machine."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from typing import Any

from prefect import Flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import ArtifactCreate
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterName,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.states import Completed, Crashed, Failed
from pydantic import ValidationError

from ogls.stages.run import Run, open_run
from ogls.stages.status import run_status
from ogls.store import Store
from tasks.publish import round_key, round_markdown, shown_rounds
from tasks.session import flow_tags

_JUST_BEGUN = timedelta(seconds=60)
_STATES: dict[str, Any] = {"finished": Completed, "stopped by health": Failed, "interrupted": Crashed}


def register_runs(store: Store) -> int:
    """Create a flow run, with the table of rounds, for each run of a store that the server has no flow run of.

    A run that a process holds now is left out: its flow run appears at the server that the process uses. So is a run
    whose configuration this version does not read. Returns the number of flow runs that were created.
    """
    count = 0
    with get_client(sync_client=True) as client:
        for records in store.runs():
            status = run_status(records)
            if status == "running" or _is_known(client, store, records.name):
                continue
            try:
                run = open_run(store.root, records.name)
            except ValidationError:
                continue
            _register(client, run, status)
            count += 1
    return count


def mark_dead_flow_runs(store: Store) -> int:
    """Mark flow runs as Crashed that the server shows as Running and whose run no process holds. Returns their number.

    A server that was down while their process died has not seen it. Flow runs that began a moment ago are left alone:
    they may be about to take their run.
    """
    status = {records.name: run_status(records) for records in store.runs()}
    running = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.RUNNING])))
    count = 0
    with get_client(sync_client=True) as client:
        for flow_run in client.read_flow_runs(flow_run_filter=running):
            purpose, _, name = (flow_run.name or "").partition(" ")
            root = (flow_run.parameters.get("config") or {}).get("root")
            began = flow_run.start_time or datetime.now(UTC)
            if not root or not _is_here(store, root) or datetime.now(UTC) - began < _JUST_BEGUN:
                continue
            names = [n for n in status if n.startswith(f"{name}-")] if purpose == "continual" else [name]
            if names and all(status.get(n, "running") != "running" for n in names):
                client.set_flow_run_state(flow_run.id, Crashed(message="The process of this flow run has ended."))
                count += 1
    return count


def _is_here(store: Store, root: str) -> bool:
    return os.path.abspath(root) == os.path.abspath(store.root)


def _is_known(client: SyncPrefectClient, store: Store, name: str) -> bool:
    """Whether the server has a flow run that trained this run. A run of another store can have the same name."""
    names = FlowRunFilter(name=FlowRunFilterName(any_=[f"train {name}"]))
    roots = [(r.parameters.get("config") or {}).get("root") for r in client.read_flow_runs(flow_run_filter=names)]
    return any(root and _is_here(store, root) for root in roots)


def _register(client: SyncPrefectClient, run: Run, status: str) -> None:
    """Create the flow run of a run in its final state, and the artifact of its last trained round."""
    info, config = run.records.read_info() or {}, run.config
    trained, evaluated = (run.records.newest_manifest(table) for table in ("updates", "scores"))
    last = max((m.round for m in (trained, evaluated) if m), default=0)
    rows = shown_rounds(run, last)
    message = f"Registered from the store: created {info['created']}, {status}."
    flow_run = client.create_flow_run(
        Flow(lambda config: None, name="train"),
        name=f"train {config.name}",
        parameters={"config": config.model_dump(mode="json")},
        tags=flow_tags(config),
        state=_STATES[status](message=message),
    )
    if rows:
        last = rows[-1].round
        client.create_artifact(
            ArtifactCreate(
                key=round_key(config.name, last),
                type="markdown",
                description=f"{config.name}: rounds 0 to {last}",
                data=round_markdown(run, last, rows, None),
                flow_run_id=flow_run.id,
            )
        )
