"""The stage `health`: compare an evaluation with the base model's and the best one; decide how to continue."""

from __future__ import annotations

from typing import Any

from ogls.errors import HealthStop
from ogls.evaluation import health as checks
from ogls.progress import Progress, no_progress
from ogls.records import HEALTH, StageResult
from ogls.records.schema import to_arrow
from ogls.stages.run import POLICY, Run
from ogls.stages.summaries import read_first_summary
from ogls.store.writer import StageWriter


def health(run: Run, round_: int, progress: Progress = no_progress) -> StageResult:
    """Compare the evaluation of a round with the base model's and the best one; decide whether and how to continue."""
    config = run.config.health
    # Only rounds with a health decision, so that evaluating another round later changes no decision.
    evaluated = [*(r for r in run.records.rounds("health") if r < round_), round_]
    start = run.start_point(round_) if round_ else None
    inputs = {
        "health": config.model_dump(mode="json"),
        "scores": {str(r): run.digest("scores", r) for r in evaluated},
        "rate": start.rate if start else 1.0,
    }

    def work(writer: StageWriter) -> dict[str, Any]:
        history = {r: read_first_summary(run.records, r) for r in evaluated}
        findings = checks.run_checks(config, history)
        best = checks.best_round(history)
        before = run.health_before(round_)
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
            "notice": checks.describe_decision(decision, round_, lambda r: describe_adapter(run, r)),
        }

    result = run.carry_out("health", round_, inputs, work)
    progress(1, 1)
    return result


def raise_if_stopped(run: Run, round_: int) -> None:
    """Raise HealthStop if the health stage of this round decided to stop the run."""
    manifest = run.records.manifest("health", round_)
    if manifest and manifest.metrics["state"] == "stop":
        raise HealthStop(f"{manifest.metrics['notice']}. To continue anyway, change [health] and run it again")


def is_last_round(run: Run, round_: int) -> bool:
    """Whether this is the last round of the run: all rounds are done, or the health stage decided to stop."""
    manifest = run.records.manifest("health", round_)
    return round_ >= run.config.rounds or bool(manifest and manifest.metrics["state"] == "stop")


def describe_adapter(run: Run, round_: int) -> str:
    """The location of the adapter of a round, as text."""
    return f"its adapter: {run.records.url(run.records.folder(POLICY, round_))}" if round_ else "the base model"
