"""Carrying out the import of a round: the stages `import`, `prepare`, `sample` and `verify`, and what undoes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from ogls.config import RunConfig
from ogls.errors import DataError, RunLocked, StoreError, StoreUnavailable, UserError
from ogls.problems.load import Exclusions
from ogls.progress import Progress
from ogls.records import IMPORTED, StageResult
from ogls.records.schema import to_arrow
from ogls.stages.imported import ROUND, left_out_of_training, rollouts_digest, store_imported
from ogls.stages.prepare import prepare
from ogls.stages.run import Run
from ogls.stages.sample import sample
from ogls.stages.verify import verify
from ogls.store.removal import remove_run

ShowProgress = Callable[[str, int], AbstractContextManager[Progress]]


def import_round(
    config: RunConfig, rows: list[dict[str, Any]], report: Exclusions, source: str, show: ShowProgress
) -> Iterator[StageResult]:
    """Make round 1 of a run from rows of the table imported; yield the result of each stage.

    An interrupted import continues where it ended. After an error that the user has to fix, a run that did not exist
    before is removed. Raises StoreError if the run has other rollouts, and DataError if no group can be trained on.
    """
    table = to_arrow(IMPORTED, rows)
    digest = rollouts_digest(table)
    run = Run(config.model_copy(update={"rollout": config.rollout.model_copy(update={"imported": digest})}))
    is_new = run.records.read_info() is None
    try:
        with run.records.lock("import"):
            _require_no_other_rollouts(run, digest)
            run.open()
            yield store_imported(run, table, report, source)
            for stage, round_ in ((prepare, 0), (sample, ROUND), (verify, ROUND)):
                with show(stage.__name__, round_) as progress:
                    result = stage(run, round_, progress)
                if stage is verify and (reason := left_out_of_training(run)):
                    undone = "; the new run is removed again" if is_new else ""
                    raise DataError(f"no usable group in {source}: {reason}{undone}")
                yield result
    except (RunLocked, StoreUnavailable):
        raise
    except UserError:
        if is_new:
            remove_run(run.records, "import")
        raise


def _require_no_other_rollouts(run: Run, digest: str) -> None:
    """Raise StoreError if the run is prepared, and not for these rollouts."""
    info = run.records.read_info()
    if info is None or run.records.manifest("problems", 0) is None:
        return
    if (of_run := info["config"].get("rollout", {}).get("imported")) != digest:
        has = "other imported rollouts" if of_run else "rounds that it samples"
        raise StoreError(f"run {run.config.name} has {has}; import into a new run: choose another --run name")
