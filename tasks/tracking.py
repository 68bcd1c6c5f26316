"""MLflow tracking: one MLflow run per run, however often it is resumed.

Training never fails because of tracking: if the server is unavailable, one warning is logged, and the missing
rounds are logged when it responds again.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

from prefect.logging import get_run_logger
from rich.markup import escape

from ogls.analysis.report import read_report
from ogls.config import RunConfig, to_toml
from ogls.config.fingerprint import flatten
from ogls.config.redact import redact_credentials
from ogls.revision import code_version
from ogls.stages.resume import is_last_round
from ogls.stages.rounds import RoundRow, read_rounds
from ogls.stages.run import Run
from tasks.files import MLFLOW
from tasks.model_registry import NAME_TAG, log_adapter, register_adapter
from tasks.progress import print_line

_DESCRIBED_TAG = "ogls.described"
_KIND_TAG = "mlflow.experimentKind"  # files the experiment as model training; else MLflow shows the GenAI views
TRAINING_VIEW = "?workflowType=machine_learning"  # of a page's URL: model training; MLflow's default is GenAI
REPORT_ARTIFACT = "report/report.html"
_LOGGED, _EVALUATED = "rounds_logged", "evaluate/accuracy"  # metrics whose steps are the rounds that MLflow has
_NEWEST_EVALUATED = "rounds_evaluated"  # its value is the newest step of `evaluate/accuracy`, without its history
_MAX_PARAM = 500  # characters of a parameter value

_warned: set[str] = set()
_lock = threading.Lock()
_monitors: dict[str, Any] = {}  # system metrics monitors, by MLflow run id


def track(config: RunConfig, round_: int) -> str | None:
    """Log every finished round up to `round_` that MLflow does not have.

    Returns the URL of the page of the MLflow run (add TRAINING_VIEW to it or to a page below it), or None if tracking
    is disabled, unavailable or without a server.
    """
    return _track_safely(config, round_, None)


def end_tracking(config: RunConfig, status: str) -> None:
    """End the MLflow run with an MLflow status such as FINISHED; a resumed training reopens it."""
    _track_safely(config, config.rounds if status == "FINISHED" else -1, status)


def _track_safely(config: RunConfig, round_: int, status: str | None) -> str | None:
    """Call `_track`; on any error, log one warning per run and return None. `status` ends the MLflow run."""
    if not config.tracking.enabled:
        return None
    try:
        with _lock:
            return _track(Run(config), round_, status)
    except Exception as error:  # a tracking server fails in many ways, and none may fail the training
        key = f"{config.root}/{config.name}"
        if key not in _warned:
            _warned.add(key)
            first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            address = config.tracking.address
            message = f"MLflow at {address} is unavailable ({first_line[:200]}); training continues"
            message = redact_credentials(message)
            get_run_logger().warning(message)
            print_line(f"  [yellow]{escape(message)}[/yellow]")
        return None


def _track(run: Run, round_: int, status: str | None) -> str | None:
    """Log missing rounds up to `round_`, then end the MLflow run with `status` if it is given."""
    for name, value in (("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1"), ("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")):
        os.environ.setdefault(name, value)
    from mlflow.tracking import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.WARNING)  # at INFO it logs every table that it creates
    tracking = run.config.tracking
    if tracking.address.startswith("sqlite:///"):
        Path(tracking.address.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    client = MlflowClient(tracking_uri=tracking.address)
    run_id = _find_run(client, run) or _create_run(client, run)
    _describe_run(client, run_id, run)
    _log_missing(client, run_id, run, round_, everything=status == "FINISHED")
    if status:
        _end_run(client, run_id, status)
        newest = run.records.newest_manifest("updates")
        finished = {"finished": newest.round if newest else 0} if status == "FINISHED" else {}
        run.records.write_json(MLFLOW, {"uri": redact_credentials(tracking.address), "run_id": run_id, **finished})
    else:
        _start_system_metrics(run_id, run.config)
        _log_report(client, run_id, run, round_)
    if not tracking.address.startswith("http"):
        return None
    experiment = client.get_run(run_id).info.experiment_id
    return f"{tracking.address.rstrip('/')}/#/experiments/{experiment}/runs/{run_id}"


def _log_missing(client: Any, run_id: str, run: Run, round_: int, everything: bool) -> None:
    """Log the rounds up to `round_` that MLflow lacks.

    Rounds are logged in order, so those after the newest logged one are missing, and `round_` if it was evaluated
    later. `everything` compares every round, once at the end of a training: an evaluation that was made later may have
    found no server.
    """
    if round_ < 0:
        return
    newest = _newest_steps(client, run_id)
    compare = everything or round_ < newest[_EVALUATED]
    steps = {name: {m.step for m in client.get_metric_history(run_id, name)} if compare else set() for name in newest}

    def lacks(name: str, number: int) -> bool:
        return number not in steps[name] if compare else number > newest[name]

    first = 0 if everything else min(min(newest.values()) + 1, round_)
    for row in read_rounds(run.records, round_, first):
        if lacks(_LOGGED, row.round):
            _log_round(client, run_id, run, row)
        if row.summary and lacks(_EVALUATED, row.round):  # also if it was evaluated after the round was logged
            _log_evaluation(client, run_id, run, row)


def _newest_steps(client: Any, run_id: str) -> dict[str, int]:
    """The newest round that was logged, and the newest whose evaluation was: -1 without one."""
    metrics = client.get_run(run_id).data.metrics
    evaluated = metrics.get(_NEWEST_EVALUATED)
    if evaluated is None:  # of an MLflow run that an older release began
        evaluated = max((m.step for m in client.get_metric_history(run_id, _EVALUATED)), default=-1)
    return {_LOGGED: int(metrics.get(_LOGGED, -1)), _EVALUATED: int(evaluated)}


def _find_run(client: Any, run: Run) -> str | None:
    """The MLflow run recorded in the run's folder, if the server still has it.

    Ids are unique, so the URI is not compared: a database and the server that serves it have the same runs.
    """
    from mlflow.exceptions import MlflowException

    recorded = run.records.read_json(MLFLOW)
    if not recorded:
        return None
    try:
        mlflow_run = client.get_run(recorded["run_id"])
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    if mlflow_run.info.lifecycle_stage != "active":
        return None
    if mlflow_run.info.status != "RUNNING":
        client.update_run(mlflow_run.info.run_id, status="RUNNING")
    return str(mlflow_run.info.run_id)


def _create_run(client: Any, run: Run) -> str:
    """Create the MLflow run; record and return its id."""
    config, tracking = run.config, run.config.tracking
    experiment = client.get_experiment_by_name(tracking.experiment)
    if experiment is None:
        local = "://" not in tracking.address or tracking.address.startswith("sqlite:")
        location = Path(tracking.artifacts).absolute().as_uri() if local else None
        experiment_id = client.create_experiment(tracking.experiment, artifact_location=location)
    else:
        experiment_id = experiment.experiment_id
    if experiment is None or _KIND_TAG not in experiment.tags:
        client.set_experiment_tag(experiment_id, _KIND_TAG, "custom_model_development")
    tags = {NAME_TAG: config.name, "ogls.method": config.method, "ogls.model": config.model.path}
    tags |= {"ogls.version": str(code_version()["version"]), "mlflow.source.name": "ogls train"}
    if revision := code_version()["revision"]:
        tags["mlflow.source.git.commit"] = revision
    run_id = str(client.create_run(experiment_id, run_name=config.name, tags=tags).info.run_id)
    run.records.write_json(MLFLOW, {"uri": redact_credentials(tracking.address), "run_id": run_id})
    return run_id


def _describe_run(client: Any, run_id: str, run: Run) -> None:
    """Log the parameters, the configuration and the datasets of the run, once."""
    config = run.config
    if _DESCRIBED_TAG in client.get_run(run_id).data.tags:
        return
    for key, value in flatten(config.model_dump(mode="json", exclude={"tracking", "execution"})):
        client.log_param(run_id, key, redact_credentials(str(value))[:_MAX_PARAM])
    client.log_text(run_id, redact_credentials(to_toml(config)), "config.toml")
    client.log_inputs(run_id, [_dataset(run, split, source) for split, source in _sources(config).items()])
    client.set_tag(run_id, _DESCRIBED_TAG, "true")  # last, so that an interrupted description is completed


def _sources(config: RunConfig) -> dict[str, str]:
    """The source of each split of the problems."""
    return {"train": config.problems.source} | {b.name: b.source for b in config.evaluate.benchmarks}


def _dataset(run: Run, split: str, source: str) -> Any:
    """One split of the problems as an MLflow dataset, with the digest of its content."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    problems = run.problems(split)
    columns = [{"name": name, "type": "string"} for name in ("problem_id", "problem", "solution", "answer")]
    dataset = Dataset(
        name=f"{Path(source).stem}-{split}",
        digest=run.split_digest(split),
        source_type="ogls-sd",
        source=json.dumps({"source": redact_credentials(source)}),
        schema=json.dumps({"mlflow_colspec": columns}),
        profile=json.dumps({"num_rows": len(problems)}),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", "training" if split == "train" else "evaluation")])


def _log_round(client: Any, run_id: str, run: Run, row: RoundRow) -> None:
    """Log the metrics of a round, and its adapter as a registered model version."""
    from mlflow.entities import Metric

    values: dict[str, float | None] = {
        **{f"train/{name}": value for name, value in row.loss_metrics.items()},
        "train/mixed_groups": row.mixed_groups,
        "train/loss": row.loss,
        "train/padding": row.padding,
        "steer/kl": row.kl,
        **{f"style/{name}": value for name, value in row.style.items()},
        "train/rate": row.health.get("rate"),
        "train/groups": row.groups,
        **{f"tokens/{stage}": tokens for stage, tokens in row.tokens.items()},
        **{f"seconds/{stage}": seconds for stage, seconds in row.seconds.items()},
    }
    now = int(time.time() * 1000)
    metrics = [Metric(n, float(v), now, row.round) for n, v in values.items() if v is not None]
    if row.round and run.records.manifest("updates", row.round):
        log_adapter(client, run_id, run, row.round)
        register_adapter(client, run_id, run, row)
    # One request, so that a round that was interrupted has none of its points and is logged again.
    client.log_batch(run_id, metrics=[*metrics, Metric(_LOGGED, row.round, now, row.round)])


def _log_evaluation(client: Any, run_id: str, run: Run, row: RoundRow) -> None:
    """Log the evaluation of a round, its health tags, and the accuracy of its model version."""
    from mlflow.entities import Metric

    if row.health:
        _tag_health(client, run_id, row)
    if row.round and run.records.manifest("updates", row.round):
        register_adapter(client, run_id, run, row)  # sets the tags that a version without an evaluation lacks
    now = int(time.time() * 1000)
    values = {n: v for n, v in (row.summary or {}).items() if isinstance(v, float)}
    metrics = [Metric(f"evaluate/{n}", v, now, row.round) for n, v in values.items()]
    client.log_batch(run_id, metrics=[*metrics, Metric(_NEWEST_EVALUATED, row.round, now, row.round)])


def _tag_health(client: Any, run_id: str, row: RoundRow) -> None:
    """Set the newest health decision as tags: state, reason, best round."""
    client.set_tag(run_id, "ogls.health", row.health["state"])
    client.set_tag(run_id, "ogls.health.why", row.health["notice"])
    client.set_tag(run_id, "ogls.best_round", str(row.health["best"]))


def _log_report(client: Any, run_id: str, run: Run, round_: int) -> None:
    """Log the report of the run after its last round."""
    if is_last_round(run, round_) and (page := read_report(run)):
        client.log_text(run_id, page, REPORT_ARTIFACT)


def _start_system_metrics(run_id: str, config: RunConfig) -> None:
    """Log system metrics of this machine until `_end_run`."""
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    if config.tracking.system_metrics and run_id not in _monitors:
        monitor = SystemMetricsMonitor(run_id, resume_logging=True, tracking_uri=config.tracking.address)
        _monitors[run_id] = monitor
        monitor.start()


def _end_run(client: Any, run_id: str, status: str) -> None:
    if monitor := _monitors.pop(run_id, None):
        monitor.finish()
    client.set_terminated(run_id, status)
