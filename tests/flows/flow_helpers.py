"""Helpers of the flow tests: a configuration, and queries to Prefect and MLflow."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from conftest import small_config

from ogls.config import RunConfig


def tracked(root: Path, *overrides: str) -> RunConfig:
    """The small configuration, tracked in an MLflow database under `root`."""
    return small_config(
        root,
        "tracking.enabled=true",
        f"tracking.uri=sqlite:///{root}/ml/mlflow.db",
        f"tracking.artifacts={root}/ml/artifacts",
        "execution.retry_seconds=0",
        *overrides,
    )


def from_server(method: str, **arguments: Any) -> list[Any]:
    """The result of a method of the Prefect client."""

    async def call() -> list[Any]:
        from prefect import get_client

        async with get_client() as client:
            return await getattr(client, method)(**arguments)

    return asyncio.run(call())


def task_runs(flow_run: Any) -> list[Any]:
    """The task runs of a flow run."""
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    by_id = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run.id]))
    return from_server("read_task_runs", flow_run_filter=by_id, limit=200)


def newest_flow_run(name: str) -> Any:
    """The flow run of this name that started last."""
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName
    from prefect.client.schemas.sorting import FlowRunSort

    by_name = FlowRunFilter(name=FlowRunFilterName(any_=[name]))
    return from_server("read_flow_runs", flow_run_filter=by_name, sort=FlowRunSort.START_TIME_DESC, limit=1)[0]


def metrics_of(config: RunConfig, name: str) -> list[tuple[int, float]]:
    """(step, value) of every logged value of a metric of the only MLflow run."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=config.tracking.uri)
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    (run,) = client.search_runs([experiment.experiment_id])
    return [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]


def only_run(config: RunConfig) -> tuple[Any, Any]:
    """(client, MLflow run) of a configuration whose experiment has one run."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=config.tracking.uri)
    (run,) = client.search_runs([client.get_experiment_by_name("ogls-sd").experiment_id])
    return client, run
