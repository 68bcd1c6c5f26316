"""The stages that watch: style (what a round's steering changes) and health (whether the run is still well)."""

from __future__ import annotations

from typing import Any

import numpy as np

from ogls import health as checks
from ogls import style as styling
from ogls.errors import Collapse
from ogls.policy import load_head, load_tokenizer
from ogls.records import HEALTH, STYLE, StageResult
from ogls.report import first_summary
from ogls.run import POLICY, Progress, Run, silent
from ogls.schema import to_arrow
from ogls.stages.common import cached_rollouts
from ogls.writer import StageWriter


def style(run: Run, round_: int, progress: Progress = silent) -> StageResult:
    """Split what the target, the direction and each privileged pool change into style and substance."""
    config = run.config
    inputs = {
        "style": config.style.model_dump(mode="json"),
        "recipe": config.steer.resolved(),
        "temperature": config.steer.temperature,
        "model": config.model,
        "states": run.digest("teacher_states", round_),
        "trajectories": run.digest("trajectories", round_),
    }

    def work(writer: StageWriter) -> dict[str, Any]:
        head, tokenizer = load_head(config.model), load_tokenizer(config.model)
        classes = styling.classify(tokenizer, len(head), config.style.classes).to(head.device)
        manifest = run.records.manifest("teacher_states", round_)
        every = max(1, int(manifest.metrics.get("rollouts", 0)) // config.style.rollouts) if manifest else 1
        parts: dict[str, list[styling.Shift]] = {}
        tokens, places = [], []
        for number, (_, ids, states) in enumerate(cached_rollouts(run, round_, head.device, progress)):
            if number % every:
                continue
            if parts and not set(parts) <= set(styling.signals(tuple(states), config.steer.resolved())):
                continue  # a rollout with fewer pools than the first has no say in the comparison
            wanted = styling.signals(tuple(states), config.steer.resolved())
            limits = config.steer.batch_tokens, config.steer.temperature
            for name, shift in styling.measure(states, wanted, classes, head, *limits).items():
                parts.setdefault(name, []).append(shift)
            tokens.append(classes[ids].cpu().numpy())
            places.append(np.arange(len(ids)))
        shifts = {name: styling.joined(some) for name, some in parts.items()}
        names = [c.name for c in config.style.classes]
        rows, metrics = [], {}
        if shifts:
            which = np.concatenate(tokens)
            rows = list(styling.style_rows(shifts, which, np.concatenate(places), names))
            metrics = styling.numbers(shifts, which, names)
        writer.shard(0, to_arrow(STYLE, rows))
        return {"numbers": metrics, "rollouts": len(tokens)}

    return run.stage("style", round_, inputs, work)


def health(run: Run, round_: int, progress: Progress = silent) -> StageResult:
    """Hold an evaluation against the base model's and the best one's; decide whether and how to go on."""
    config = run.config.health
    # Only rounds that were examined too: evaluating another one later changes no decision.
    evaluated = [*(r for r in run.records.rounds("health") if r < round_), round_]
    start = run.start(round_) if round_ else None
    inputs = {
        "health": config.model_dump(mode="json"),
        "scores": {str(r): run.digest("scores", r) for r in evaluated},
        "rate": start.rate if start else 1.0,
    }

    def work(writer: StageWriter) -> dict[str, Any]:
        history = {r: first_summary(run.records, r) for r in evaluated}
        findings = checks.examine(config, history)
        best = checks.best_round(history)
        before = run.examined(round_)
        past = int(before.metrics["rollbacks"]) if before else 0
        decision = checks.decide(config, findings, best, round_, past, start.rate if start else 1.0)
        names = ("check", "value", "limit", "failed", "action")
        writer.shard(0, to_arrow(HEALTH, [{n: getattr(f, n) for n in names} for f in findings]))
        return {
            "state": decision.state,
            "why": decision.why,
            "best": decision.best,
            "restart": decision.restart,
            "rate": decision.rate,
            "rollbacks": past + (decision.restart is not None),
            "notice": checks.said(decision, round_, lambda r: adapter_place(run, r)),
        }

    result = run.stage("health", round_, inputs, work)
    progress(1, 1)
    return result


def heed(run: Run, round_: int) -> None:
    """Raise Collapse if the health stage of this round has decided to stop the run."""
    manifest = run.records.manifest("health", round_)
    if manifest and manifest.metrics["state"] == "stop":
        raise Collapse(f"{manifest.metrics['notice']}. To go on all the same, change [health] and run it again")


def over(run: Run, round_: int) -> bool:
    """Whether this is the run's last round: no more are wanted, or its health has decided to stop."""
    manifest = run.records.manifest("health", round_)
    return round_ >= run.config.rounds or bool(manifest and manifest.metrics["state"] == "stop")


def adapter_place(run: Run, round_: int) -> str:
    """Where the adapter of a round lies, in words."""
    return f"its adapter: {run.records.url(run.records.folder(POLICY, round_))}" if round_ else "the base model"
