"""Adapters in MLflow: the files of a round, and the registered model with a version for each round."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from ogls.stages.rounds import RoundRow
from ogls.stages.run import POLICY, Run
from ogls.stages.summaries import read_deciding_summary
from ogls.store.manifest import OPTIMIZER, FileEntry

_NOT_LOGGED = (OPTIMIZER, "ema.safetensors")
NAME_TAG, _ROUND_TAG, _ACCURACY_TAG = "ogls.run", "ogls.round", "ogls.accuracy"


def log_adapter(client: Any, run_id: str, run: Run, round_: int) -> None:
    """Log what `adapter_source` refers to, if that is an artifact: a copy of the adapter, or a file that names it.

    The optimizer state and the averaged teacher are not copied.
    """
    entries, folder = _adapter_files(run, round_), _artifact(round_)
    if run.config.tracking.adapters == "copy":
        with tempfile.TemporaryDirectory() as local:
            for name in (Path(entry.path).name for entry in entries):
                Path(local, name).write_bytes(run.read_attachment(round_, name))
            client.log_artifacts(run_id, local, folder)
    elif not _takes_folders(run):
        stored = run.records.url(entries[0].path.rpartition("/")[0])
        digests = {Path(entry.path).name: entry.sha256 for entry in entries}
        client.log_dict(run_id, {"adapter": stored, "sha256": digests}, f"{folder}/stored.json")


def adapter_source(run_id: str, run: Run, round_: int) -> str:
    """What the model version of a round refers to: the adapter's folder in the store, or an artifact.

    A server refuses folders of a disk, which may not be its own.
    """
    if run.config.tracking.adapters == "copy" or not _takes_folders(run):
        return f"runs:/{run_id}/{_artifact(round_)}"
    stored = run.records.url(_adapter_files(run, round_)[0].path.rpartition("/")[0])
    return Path(stored).as_uri() if run.records.storage.local else stored


def _takes_folders(run: Run) -> bool:
    """Whether a model version can refer to the store: MLflow is a database of this machine, or the store has a URL."""
    return not run.records.storage.local or not run.config.tracking.address.startswith("http")


def _artifact(round_: int) -> str:
    return f"adapters/round={round_:03d}"


def _adapter_files(run: Run, round_: int) -> list[FileEntry]:
    manifest = run.records.manifest("updates", round_)
    return [f for f in (manifest.files_of(POLICY) if manifest else []) if Path(f.path).name not in _NOT_LOGGED]


def register_adapter(client: Any, run_id: str, run: Run, row: RoundRow) -> None:
    """Register the adapter of a round as a model version, once, and set the alias `best` to the best round.

    Asks for the versions of these two rounds, not for all.
    """
    from mlflow.exceptions import MlflowException

    name = run.config.tracking.registered_model.replace("{run}", run.config.name)
    if not name:
        return
    try:
        client.create_registered_model(name, tags={NAME_TAG: run.config.name, "ogls.model": run.config.model.path})
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    best = int(row.health.get("best", row.round))  # a round that is not evaluated has no decision
    versions = {n: v for n in {row.round, best} if (v := _find_version(client, name, run_id, n))}
    tags = {_ROUND_TAG: str(row.round), NAME_TAG: run.config.name}
    if row.summary:
        tags[_ACCURACY_TAG] = str(read_deciding_summary(run.records, row.round)["accuracy"])
        if row.round in versions:
            client.set_model_version_tag(name, versions[row.round], _ACCURACY_TAG, tags[_ACCURACY_TAG])
    if row.round not in versions:
        source = adapter_source(run_id, run, row.round)
        created = client.create_model_version(name, source, run_id, tags=tags, await_creation_for=0)
        versions[row.round] = created.version
    if row.health and best in versions:
        accuracy = read_deciding_summary(run.records, best)["accuracy"]
        if _gets_best_alias(client, name, run_id, accuracy):
            client.set_registered_model_alias(name, "best", versions[best])


def _find_version(client: Any, name: str, run_id: str, round_: int) -> str | None:
    """The model version of a round of a run; None if there is none."""
    found = client.search_model_versions(f"name='{name}' and run_id='{run_id}' and tag.`{_ROUND_TAG}`='{round_}'")
    return found[0].version if found else None


def _gets_best_alias(client: Any, name: str, run_id: str, accuracy: float) -> bool:
    """Whether this run's best round gets the alias; another run of the same registered model may be better."""
    from mlflow.exceptions import MlflowException

    try:
        holder = client.get_model_version_by_alias(name, "best")
    except MlflowException:
        return True  # the alias is not set
    return bool(holder.run_id == run_id or float(holder.tags.get(_ACCURACY_TAG, 0)) < accuracy)
