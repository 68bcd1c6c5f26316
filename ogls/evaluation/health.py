"""Health checks: compare an evaluation with the base model's and with the best one, and decide how to continue.

Each check compares one number of an evaluation (table `summaries`) with a limit; `HealthConfig` sets the action of a
failed check: warn, stop, or roll back to the best round. The most severe action of all failed checks is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ogls.config import Action, HealthConfig

Summary = Mapping[str, Any]


State = Literal["well", "warn", "stop", "rollback"]


_SEVERITY: tuple[State, ...] = ("well", "warn", "rollback", "stop")


@dataclass(frozen=True)
class Finding:
    """The result of one check; `failed` is None if the value or the limit is unknown."""

    check: str
    value: float | None
    limit: float | None
    failed: bool | None
    action: Action
    message: str


@dataclass(frozen=True)
class Decision:
    """The decision after a round: state, reason, best round, the round to restart from (or None), and the factor on the
    learning rate."""

    state: State
    why: str
    best: int
    restart: int | None
    rate: float


def best_round(history: Mapping[int, Summary]) -> int:
    """The evaluated round with the highest accuracy; the earliest of equals."""
    return max(history, key=lambda r: (history[r]["accuracy"], -r))


def run_checks(config: HealthConfig, history: Mapping[int, Summary]) -> list[Finding]:
    """The results of all checks on the last round of `history`, which contains round 0 (the base model) too."""
    now, base = history[max(history)], history[min(history)]
    best = best_round(history)
    return list(_findings(config, now, base, best, history[best]))


def _findings(config: HealthConfig, now: Summary, base: Summary, best: int, top: Summary) -> Iterator[Finding]:
    c = config

    def of_base(name: str, factor: float = 1.0, more: float = 0.0) -> float | None:
        return None if base.get(name) is None else base[name] * factor + more

    def below(check: str, name: str, limit: float | None, action: Action, message: str) -> Finding:
        value = now.get(name)
        failed = None if value is None or limit is None else value < limit
        return Finding(check, value, limit, failed, action, message)

    def above(check: str, name: str, limit: float | None, action: Action, message: str) -> Finding:
        found = below(check, name, limit, action, message)
        failed = None if found.value is None or limit is None else found.value > limit
        return replace(found, failed=failed)

    fell = f"the upper end of accuracy's interval is below the lower end of round {best}'s"
    yield below("accuracy", "accuracy_high", top["accuracy_low"], c.accuracy, fell)
    yield below("short", "length_p50", of_base("length_p50", c.min_length), c.short, "the median length fell")
    yield above("long", "length_p95", of_base("length_p95", c.max_length), c.long, "the length's p95 rose")
    loops = of_base("repeated", more=c.max_repeats)
    yield above("repeats", "repeated", loops, c.repeats, "completions end in loops")
    yield below("low_entropy", "entropy", of_base("entropy", c.min_entropy), c.low_entropy, "the entropy fell")
    yield above("high_entropy", "entropy", of_base("entropy", c.max_entropy), c.high_entropy, "the entropy rose")
    cut = of_base("truncated", more=c.max_truncated)
    yield above("truncated", "truncated", cut, c.truncated, "completions are cut off")
    stop = of_base("stop_mass", c.min_stop_mass)
    yield below("stop_mass", "stop_mass", stop, c.stop_mass, "stopping is forgotten")
    yield above("kl_base", "kl_base", c.max_kl_base, c.kl_base, "the KL to the base model is large")


def decide(
    config: HealthConfig, findings: Sequence[Finding], best: int, last: int, rollbacks: int, rate: float
) -> Decision:
    """Decide after round `last`, after `rollbacks` earlier rollbacks and with the learning rate scaled by `rate`.

    After `config.rollbacks` rollbacks, and if the best round is the last one, a rollback becomes a stop.
    """
    alarms = [f for f in findings if f.failed and f.action != "off"]
    why = "; ".join(f"{f.message} ({f.value:.3g}, limit {f.limit:.3g})" for f in alarms)
    states: list[State] = [f.action for f in alarms if f.action != "off"]
    state: State = max(states, key=_SEVERITY.index, default="well")
    if state == "rollback":
        if rollbacks >= config.rollbacks:
            return Decision("stop", f"{why}; rolled back {rollbacks} times already", best, None, rate)
        if best == last:
            return Decision(
                "stop",
                f"{why}; round {best} is the best, so there is no round to return to",
                best,
                None,
                rate,
            )
        return Decision("rollback", why, best, best, rate * config.rollback_rate)
    return Decision(state, why, best, None, rate)


def describe_decision(decision: Decision, round_: int, adapter: Callable[[int], str]) -> str:
    """The decision as one line for people, naming the best adapter; empty for a healthy run."""
    if decision.state == "well":
        return ""
    done = {
        "warn": "check the run",
        "stop": "the run is stopped",
        "rollback": f"the next round starts from round {decision.restart} at {decision.rate:g} of the learning rate",
    }[decision.state]
    return f"health r{round_:03d}: {decision.why}: {done}. Best so far: round {decision.best}, {adapter(decision.best)}"
