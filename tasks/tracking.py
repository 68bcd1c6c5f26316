"""MLflow: one run an OGLS-SD run, however often it is resumed. The only import of mlflow.

Training never waits for tracking and never fails with it: if the server is away there is one warning, and
rounds that were missed are logged as soon as it answers again.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from prefect.logging import get_run_logger
from rich.markup import escape

from ogls.config import RunConfig
from ogls.configfile import flatten, to_toml, without_secrets
from ogls.report import RoundRow, round_rows
from ogls.run import POLICY, Run
from tasks.progress import say

_MEMORY = "mlflow.json"  # in the run's folder: which MLflow run is its own
_NAME_TAG = "ogls.run"
_MOST_PARAM = 500

_warned: set[str] = set()
_lock = threading.Lock()


def track(config: RunConfig, round_: int) -> str | None:
    """Log every round up to `round_`, all of them finished, that MLflow does not have yet.

    Returns the address of the MLflow run's page, or None where tracking is off, away, or no server.
    """
    return _safely(config, round_, None)


def end_tracking(config: RunConfig, status: str) -> None:
    """End the MLflow run as FINISHED or FAILED; a resumed training opens it again."""
    _safely(config, -1, status)


def _safely(config: RunConfig, round_: int, status: str | None) -> str | None:
    if not config.tracking.enabled:
        return None
    try:
        with _lock:
            return _track(Run(config), round_, status)
    except Exception as error:  # a tracking server has many ways to be away; none of them is worth a run
        key = f"{config.root}/{config.name}"
        if key not in _warned:
            _warned.add(key)
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            said = f"MLflow at {config.tracking.uri} is away ({first[:200]}); training goes on"
            said = without_secrets(said)
            get_run_logger().warning(said)
            say(f"  [yellow]{escape(said)}[/yellow]")
        return None


def _track(run: Run, round_: int, status: str | None) -> str | None:
    for name, value in (("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1"), ("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")):
        os.environ.setdefault(name, value)
    from mlflow.tracking import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.WARNING)  # else it tells of every table it creates
    tracking = run.config.tracking
    if tracking.uri.startswith("sqlite:///"):
        Path(tracking.uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    client = MlflowClient(tracking_uri=tracking.uri)
    run_id = _find(client, run) or _create(client, run)
    logged = {m.step for m in client.get_metric_history(run_id, "rounds_logged")}
    for row in round_rows(run.records, round_):
        if row.round not in logged:
            _log_round(client, run_id, run, row)
    if status:
        client.set_terminated(run_id, status)
    if not tracking.uri.startswith("http"):
        return None
    experiment = client.get_run(run_id).info.experiment_id
    return f"{tracking.uri.rstrip('/')}/#/experiments/{experiment}/runs/{run_id}"


def _find(client: Any, run: Run) -> str | None:
    """The MLflow run that this run's folder remembers, if the server still has it."""
    from mlflow.exceptions import MlflowException

    memory = run.records.read_json(_MEMORY)
    if not memory or memory.get("uri") != without_secrets(run.config.tracking.uri):
        return None
    try:
        found = client.get_run(memory["run_id"])
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    if found.info.lifecycle_stage != "active":
        return None
    if found.info.status != "RUNNING":
        client.update_run(found.info.run_id, status="RUNNING")
    return str(found.info.run_id)


def _create(client: Any, run: Run) -> str:
    config, tracking = run.config, run.config.tracking
    experiment = client.get_experiment_by_name(tracking.experiment)
    if experiment is None:
        local = "://" not in tracking.uri or tracking.uri.startswith("sqlite:")
        location = Path(tracking.artifacts).absolute().as_uri() if local else None
        experiment_id = client.create_experiment(tracking.experiment, artifact_location=location)
    else:
        experiment_id = experiment.experiment_id
    tags = {_NAME_TAG: config.name, "ogls.method": config.steer.recipe, "ogls.model": config.model.path}
    run_id = str(client.create_run(experiment_id, run_name=config.name, tags=tags).info.run_id)
    run.records.write_json(_MEMORY, {"uri": without_secrets(tracking.uri), "run_id": run_id})
    for key, value in flatten(config.model_dump(mode="json", exclude={"tracking", "execution"})):
        client.log_param(run_id, key, without_secrets(str(value))[:_MOST_PARAM])
    client.log_text(run_id, without_secrets(to_toml(config)), "config.toml")
    return run_id


def _log_round(client: Any, run_id: str, run: Run, row: RoundRow) -> None:
    from mlflow.entities import Metric

    values: dict[str, float | None] = {
        "train/mixed_groups": row.mixed_groups,
        "train/loss": row.loss,
        "steer/kl": row.kl,
        **{f"style/{name}": value for name, value in row.style.items()},
        "train/rate": row.health.get("rate"),
        **{f"seconds/{stage}": seconds for stage, seconds in row.seconds.items()},
        **{f"evaluate/{n}": v for n, v in (row.summary or {}).items() if isinstance(v, float)},
    }
    if row.health:
        _tag_health(client, run_id, row)
    now = int(time.time() * 1000)
    metrics = [Metric(n, float(v), now, row.round) for n, v in values.items() if v is not None]
    if row.round and run.records.manifest("updates", row.round):
        _log_adapter(client, run_id, run, row.round)
    # The mark comes last: a round cut off half-way is logged again rather than left out.
    client.log_batch(run_id, metrics=[*metrics, Metric("rounds_logged", row.round, now, row.round)])


def _tag_health(client: Any, run_id: str, row: RoundRow) -> None:
    """The newest decision as tags: state, why, and the best round with its adapter."""
    client.set_tag(run_id, "ogls.health", row.health["state"])
    client.set_tag(run_id, "ogls.health.why", row.health["notice"])
    client.set_tag(run_id, "ogls.best_round", str(row.health["best"]))


def _log_adapter(client: Any, run_id: str, run: Run, round_: int) -> None:
    manifest = run.records.manifest("updates", round_)
    with tempfile.TemporaryDirectory() as folder:
        for entry in manifest.of(POLICY) if manifest else []:
            name = Path(entry.path).name
            if name not in ("optimizer.safetensors", "ema.safetensors"):
                Path(folder, name).write_bytes(run.attachment(round_, name))
        client.log_artifacts(run_id, folder, f"adapters/round={round_:03d}")
