"""How far a run is, and where it continues. The cost does not grow with the number of finished rounds."""

from __future__ import annotations

from ogls.config import RunConfig
from ogls.stages.run import POLICY, Run
from ogls.store.manifest import Manifest


def resume_round(run: Run) -> int:
    """The round at which training continues: the newest trained round if the next one has not begun, else the next one.

    Raises StoreError if the policy that this round starts from is damaged.
    """
    newest = run.records.newest_manifest("updates")
    trained = newest.round if newest else 0
    if not run.is_closed(trained):
        return trained
    start = run.start_point(trained + 1).round
    manifest = run.records.manifest("updates", start)
    for entry in manifest.files_of(POLICY) if manifest else []:
        run.read_attachment(start, entry.path.rsplit("/", 1)[1])
    return trained + 1


def needed_optimizers(run: Run) -> set[int]:
    """The rounds whose optimizer states a training may still load.

    They are the starts of the newest trained round, which may be redone, and of the next one, and the best rounds of
    the last two health decisions: a rollback returns to one of them (the last decision may be redone too).
    """
    newest, health = run.records.newest_manifest("updates"), run.records.newest_manifest("health")
    if newest is None:
        return set()
    starts = {newest.round, run.start_point(newest.round).round, run.start_point(newest.round + 1).round}
    decided = [health, run.health_before(health.round)] if health else []
    return starts | {int(m.metrics["best"]) for m in decided if m}


def is_trained(run: Run, round_: int) -> bool:
    """Whether the policy of a round is stored and undamaged. Round 0 is not trained: its policy is the start."""
    return round_ == 0 or run.records.is_intact("updates", round_)


def is_stopped(run: Run, round_: int) -> bool:
    """Whether the health stage of this round decided to stop the run. Another [health] section lifts the stop."""
    manifest = run.records.manifest("health", round_)
    if manifest is None or manifest.metrics["state"] != "stop":
        return False
    decided_with = manifest.metrics.get("settings")  # releases before 0.3.0 did not record it
    return decided_with is None or decided_with == run.config.health.model_dump(mode="json")


def is_last_round(run: Run, round_: int) -> bool:
    """Whether this is the last round of the run: all rounds are done, or the health stage decided to stop."""
    return round_ >= run.config.rounds or is_stopped(run, round_)


def is_complete(config: RunConfig) -> bool:
    """Whether this run has trained and evaluated all its rounds. Fast, because it verifies no checksum."""
    newest = _newest_health(config)
    return newest is not None and newest.round >= config.rounds


def is_finished(config: RunConfig) -> bool:
    """Whether nothing is left to do: the run is complete, or a health check has stopped it."""
    newest = _newest_health(config)
    return newest is not None and is_last_round(Run(config), newest.round)


def _newest_health(config: RunConfig) -> Manifest | None:
    """The newest health manifest of the run; None if there is none, or if the run has another configuration."""
    run = Run(config)
    return None if run.records.changes(config, run.identity) else run.records.newest_manifest("health")
