"""The files in a run's folder that tasks write. Imports neither prefect nor mlflow, so commands read them at once."""

from __future__ import annotations

from ogls.config import RunConfig
from ogls.stages.resume import is_complete
from ogls.stages.run import Run

PUBLISHED = "published.json"  # what was published of each round, by round
MLFLOW = "mlflow.json"  # the tracking URI, the id of the MLflow run, and the last round of a finished training


def is_nothing_left(config: RunConfig) -> bool:
    """Whether the run is trained, evaluated, published and tracked up to at least `config.rounds`.

    Where it was tracked does not matter: `ogls up` serves the database that a command without a server writes to.
    """
    if not is_complete(config):
        return False
    records = Run(config).records
    newest = records.newest_manifest("updates")
    last = newest.round if newest else 0
    if str(last) not in (records.read_json(PUBLISHED) or {}):
        return False
    tracked = records.read_json(MLFLOW) or {}
    return not config.tracking.enabled or tracked.get("finished") == last
