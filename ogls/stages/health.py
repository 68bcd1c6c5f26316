"""The stage `health`: compare an evaluation with the base model's and the best one; decide how to continue."""

from __future__ import annotations

from typing import Any

from ogls.errors import HealthStop, StoreError
from ogls.evaluation import health as checks
from ogls.progress import Progress, no_progress
from ogls.records import HEALTH, StageResult
from ogls.records.schema import to_arrow
from ogls.stages.resume import is_stopped
from ogls.stages.run import POLICY, Run
from ogls.stages.summaries import read_deciding_summary
from ogls.store.writer import StageWriter


def health(run: Run, round_: int, progress: Progress = no_progress) -> StageResult:
    """Compare the evaluation of a round with the base model's and the best one; decide whether and how to continue."""
    config = run.config.health
    before = run.health_before(round_)
    if run.is_closed(round_) and not run.may_redo_closed and run.records.manifest("health", round_) is None:
        raise StoreError(
            f"run {run.config.name} round {round_} has no health decision, and round {round_ + 1} has begun: a "
            "decision now would change rounds that are done; `ogls stage evaluate` evaluates the round"
        )
    # A decision compares with the base model and with the best round that was decided before. [health] is not an input:
    # a decision stays when the settings change.
    compared = sorted({0, int(before.metrics["best"]) if before else 0, round_})
    start = run.start_point(round_) if round_ else None
    inputs = {
        "scores": {str(r): run.digest("scores", r) for r in compared},
        "rate": start.rate if start else 1.0,
    }

    def work(writer: StageWriter) -> dict[str, Any]:
        history = {r: read_deciding_summary(run.records, r) for r in compared}
        findings = checks.run_checks(config, history)
        best = checks.best_round(history)
        rollbacks = int(before.metrics["rollbacks"]) if before else 0
        decision = checks.decide(config, findings, best, round_, rollbacks, start.rate if start else 1.0)
        names = ("check", "value", "limit", "failed", "action")
        writer.write_shard(0, to_arrow(HEALTH, [{n: getattr(f, n) for n in names} for f in findings]))
        return {
            "state": decision.state,
            "why": decision.why,
            "best": decision.best,
            "restart": decision.restart,
            "rate": decision.rate,
            "rollbacks": rollbacks + (decision.restart is not None),
            "settings": config.model_dump(mode="json"),
            "notice": checks.describe_decision(decision, round_, lambda r: describe_adapter(run, r)),
        }

    result = run.carry_out("health", round_, inputs, work)
    progress(1, 1)
    return result


def raise_if_stopped(run: Run, round_: int) -> None:
    """Raise HealthStop if the health stage of this round decided to stop the run."""
    if is_stopped(run, round_):
        manifest = run.records.manifest("health", round_)
        notice = manifest.metrics["notice"] if manifest else ""
        raise HealthStop(f"{notice}. To continue anyway, change [health] and run it again")


def describe_adapter(run: Run, round_: int) -> str:
    """The location of the adapter of a round, as text."""
    return f"its adapter: {run.records.url(run.records.folder(POLICY, round_))}" if round_ else "the base model"
