"""Adapters in MLflow: the files of a round, and the registered model with a version for each round."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from ogls.stages.rounds import RoundRow
from ogls.stages.run import POLICY, Run
from ogls.stages.summaries import read_deciding_summary
from ogls.store.manifest import OPTIMIZER

NAME_TAG, _ROUND_TAG, _ACCURACY_TAG = "ogls.run", "ogls.round", "ogls.accuracy"


def log_adapter(client: Any, run_id: str, run: Run, round_: int) -> None:
    """Log the files of the adapter of a round, without the optimizer state and the averaged teacher."""
    manifest = run.records.manifest("updates", round_)
    with tempfile.TemporaryDirectory() as folder:
        for entry in manifest.files_of(POLICY) if manifest else []:
            name = Path(entry.path).name
            if name not in (OPTIMIZER, "ema.safetensors"):
                Path(folder, name).write_bytes(run.read_attachment(round_, name))
        client.log_artifacts(run_id, folder, f"adapters/round={round_:03d}")


def register_adapter(client: Any, run_id: str, run: Run, row: RoundRow) -> None:
    """Register the adapter of a round as a model version, once, and set the alias `best` to the best round."""
    from mlflow.exceptions import MlflowException

    name = run.config.tracking.registered_model.replace("{run}", run.config.name)
    if not name:
        return
    try:
        client.create_registered_model(name, tags={NAME_TAG: run.config.name, "ogls.model": run.config.model.path})
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    versions = {
        int(v.tags[_ROUND_TAG]): v.version
        for v in client.search_model_versions(f"name='{name}'")
        if v.run_id == run_id and _ROUND_TAG in v.tags
    }
    tags = {_ROUND_TAG: str(row.round), NAME_TAG: run.config.name}
    if row.summary:
        tags[_ACCURACY_TAG] = str(read_deciding_summary(run.records, row.round)["accuracy"])
        if row.round in versions:
            client.set_model_version_tag(name, versions[row.round], _ACCURACY_TAG, tags[_ACCURACY_TAG])
    if row.round not in versions:
        source = f"runs:/{run_id}/adapters/round={row.round:03d}"
        created = client.create_model_version(name, source, run_id, tags=tags, await_creation_for=0)
        versions[row.round] = created.version
    best = row.health.get("best")
    if best in versions and _gets_best_alias(
        client, name, run_id, read_deciding_summary(run.records, best)["accuracy"]
    ):
        client.set_registered_model_alias(name, "best", versions[best])


def _gets_best_alias(client: Any, name: str, run_id: str, accuracy: float) -> bool:
    """Whether this run's best round gets the alias; another run of the same registered model may be better."""
    from mlflow.exceptions import MlflowException

    try:
        holder = client.get_model_version_by_alias(name, "best")
    except MlflowException:
        return True  # the alias is not set
    return bool(holder.run_id == run_id or float(holder.tags.get(_ACCURACY_TAG, 0)) < accuracy)
