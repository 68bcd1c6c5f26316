"""Health checks: compare an evaluation with that of round 0 and with the best one, and decide how to continue.

Each check compares one column of the table `summaries` with a limit; `HealthConfig` sets the action of a failed check:
warn, stop, or roll back to the best round. The decision is the most severe action of all failed checks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ogls.config import Action, HealthConfig

Summary = Mapping[str, Any]  # a row of the table `summaries`
State = Literal["well", "warn", "stop", "rollback"]

_SEVERITY: tuple[State, ...] = ("well", "warn", "rollback", "stop")  # mildest first


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    check: str
    value: float | None  # None: not measured
    limit: float | None  # None: not measured at round 0
    failed: bool | None  # None: the value or the limit is None
    action: Action
    message: str  # what a failure means


@dataclass(frozen=True)
class Decision:
    """The decision after a round."""

    state: State
    why: str  # the messages, values and limits of failed checks
    best: int  # the best evaluated round
    restart: int | None  # the round that the next round starts from; None without a rollback
    rate: float  # factor on train.learning_rate


def best_round(history: Mapping[int, Summary]) -> int:
    """Return the evaluated round with the highest accuracy; of equal rounds, the earliest."""
    return max(history, key=lambda r: (history[r]["accuracy"], -r))


def run_checks(config: HealthConfig, history: Mapping[int, Summary]) -> list[Finding]:
    """Run all checks on the last round of `history`, which maps evaluated rounds to summaries and contains round 0."""
    last, base = history[max(history)], history[min(history)]
    best = best_round(history)
    return list(_findings(config, last, base, best, history[best]))


def _findings(
    config: HealthConfig, last: Summary, base: Summary, best: int, best_summary: Summary
) -> Iterator[Finding]:
    c = config

    def from_base(name: str, factor: float = 1.0, offset: float = 0.0) -> float | None:
        return None if base.get(name) is None else base[name] * factor + offset

    def below(check: str, name: str, limit: float | None, action: Action, message: str) -> Finding:
        value = last.get(name)
        failed = None if value is None or limit is None else value < limit
        return Finding(check, value, limit, failed, action, message)

    def above(check: str, name: str, limit: float | None, action: Action, message: str) -> Finding:
        finding = below(check, name, limit, action, message)
        failed = None if finding.value is None or limit is None else finding.value > limit
        return replace(finding, failed=failed)

    fell = f"the upper end of the accuracy's confidence interval is below the lower end of round {best}'s"
    yield below("accuracy", "accuracy_high", best_summary["accuracy_low"], c.accuracy, fell)
    yield below("short", "length_p50", from_base("length_p50", c.min_length), c.short, "the median length fell")
    long = from_base("length_p95", c.max_length)
    yield above("long", "length_p95", long, c.long, "the 95th percentile of the length rose")
    repeated = from_base("repeated", offset=c.max_repeats)
    yield above("repeats", "repeated", repeated, c.repeats, "more completions end in repetition loops")
    yield below("low_entropy", "entropy", from_base("entropy", c.min_entropy), c.low_entropy, "the entropy fell")
    yield above("high_entropy", "entropy", from_base("entropy", c.max_entropy), c.high_entropy, "the entropy rose")
    truncated = from_base("truncated", offset=c.max_truncated)
    yield above("truncated", "truncated", truncated, c.truncated, "more completions are truncated")
    stop_mass = from_base("stop_mass", c.min_stop_mass)
    yield below("stop_mass", "stop_mass", stop_mass, c.stop_mass, "the probability of the stop token fell")
    yield above("kl_base", "kl_base", c.max_kl_base, c.kl_base, "the KL to the base model is large")


def decide(
    config: HealthConfig, findings: Sequence[Finding], best: int, last: int, rollbacks: int, rate: float
) -> Decision:
    """Return the most severe action of the failed checks after round `last`.

    `rollbacks` is the number of earlier rollbacks, `rate` the current factor on the learning rate. A rollback becomes a
    stop if there were `config.rollbacks` rollbacks already, or if the best round is the last one.
    """
    failures = [f for f in findings if f.failed and f.action != "off"]
    why = "; ".join(f"{f.message} ({f.value:.3g}, limit {f.limit:.3g})" for f in failures)
    states: list[State] = [f.action for f in failures if f.action != "off"]
    state: State = max(states, key=_SEVERITY.index, default="well")
    if state == "rollback":
        if rollbacks >= config.rollbacks:
            return Decision("stop", f"{why}; rolled back {rollbacks} times already", best, None, rate)
        if best == last:
            reason = f"{why}; round {best} is the best, so there is no round to return to"
            return Decision("stop", reason, best, None, rate)
        return Decision("rollback", why, best, best, rate * config.rollback_rate)
    return Decision(state, why, best, None, rate)


def describe_decision(decision: Decision, round_: int, adapter: Callable[[int], str]) -> str:
    """Format a decision as one line with the best adapter; empty for a healthy run.

    `adapter` returns the location of the adapter of a round as text.
    """
    if decision.state == "well":
        return ""
    consequence = {
        "warn": "check the run",
        "stop": "the run is stopped",
        "rollback": f"the next round starts from round {decision.restart} at {decision.rate:g} of the learning rate",
    }[decision.state]
    best = f"Best so far: round {decision.best}, {adapter(decision.best)}"
    return f"health r{round_:03d}: {decision.why}: {consequence}. {best}"
