"""Health checks: each check fails alone, the most severe action is taken, and a run stops or rolls back."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import ROUND, carry_out, small_config

from ogls.config import HealthConfig
from ogls.errors import HealthStop
from ogls.evaluation.health import Decision, best_round, decide, describe_decision, run_checks
from ogls.evaluation.metrics import ends_in_loop
from ogls.stages.health import raise_if_stopped
from ogls.stages.registry import STAGES
from ogls.stages.run import Run, StartPoint
from ogls.stages.summaries import read_deciding_summary, read_first_summary

WELL = {
    "accuracy": 0.5,
    "accuracy_low": 0.45,
    "accuracy_high": 0.55,
    "length_p50": 100.0,
    "length_p95": 200.0,
    "repeated": 0.01,
    "entropy": 0.4,
    "truncated": 0.02,
    "stop_mass": 0.9,
    "kl_base": 0.05,
}


@pytest.mark.parametrize(
    ("check", "change"),
    [
        ("accuracy", {"accuracy": 0.3, "accuracy_low": 0.25, "accuracy_high": 0.35}),
        ("short", {"length_p50": 60.0}),
        ("long", {"length_p95": 500.0}),
        ("repeats", {"repeated": 0.2}),
        ("low_entropy", {"entropy": 0.001}),
        ("high_entropy", {"entropy": 2.0}),
        ("truncated", {"truncated": 0.3}),
        ("stop_mass", {"stop_mass": 0.1}),
        ("kl_base", {"kl_base": 3.0}),
    ],
)
def test_each_check_fails_alone(check: str, change: dict[str, float]) -> None:
    findings = run_checks(HealthConfig(), {0: WELL, 1: WELL, 2: {**WELL, **change}})
    assert [f.check for f in findings if f.failed] == [check]
    assert not [f for f in run_checks(HealthConfig(), {0: WELL, 1: WELL}) if f.failed]


def test_overlapping_intervals_do_not_fail() -> None:
    lower = {**WELL, "accuracy": 0.42, "accuracy_low": 0.37, "accuracy_high": 0.47}
    assert not [f for f in run_checks(HealthConfig(), {0: WELL, 1: lower}) if f.failed]


def test_an_unknown_value_does_not_fail() -> None:
    unknown = {**WELL, "kl_base": None}
    findings = {f.check: f for f in run_checks(HealthConfig(), {0: unknown, 1: unknown})}
    assert findings["kl_base"].failed is None


def test_the_best_round_is_the_earliest_of_equals() -> None:
    assert best_round({0: WELL, 1: {**WELL, "accuracy": 0.7}, 2: {**WELL, "accuracy": 0.7}}) == 1


def decision(actions: dict[str, str], rollbacks: int = 0, rate: float = 1.0, best: int = 1) -> Decision:
    """The decision after round 2, in which accuracy and median length fell."""
    config = HealthConfig.model_validate(actions)
    bad = {**WELL, "accuracy": 0.2, "accuracy_low": 0.15, "accuracy_high": 0.25, "length_p50": 20.0}
    history = {0: WELL, best: {**WELL, "accuracy": 0.6}, 2: bad}
    return decide(config, run_checks(config, history), best_round(history), 2, rollbacks, rate)


def test_the_most_severe_action_is_taken() -> None:
    assert decision({"accuracy": "off", "short": "off"}).state == "well"
    assert decision({"accuracy": "warn", "short": "off"}).state == "warn"
    assert decision({"accuracy": "warn", "short": "stop"}).state == "stop"
    assert decision({"accuracy": "rollback", "short": "stop"}).state == "stop"
    rollback = decision({"accuracy": "rollback", "short": "warn"}, rate=0.5)
    assert (rollback.state, rollback.restart, rollback.rate) == ("rollback", 1, 0.25)
    assert "below the lower end of round 1's (0.25, limit 0.45)" in rollback.why
    assert "the median length fell (20, limit 70)" in rollback.why


def test_the_number_of_rollbacks_is_limited() -> None:
    stopped = decision({"accuracy": "rollback"}, rollbacks=2)
    assert (stopped.state, stopped.restart) == ("stop", None)
    assert "rolled back 2 times already" in stopped.why


def test_a_rollback_from_the_best_round_is_a_stop() -> None:
    config = HealthConfig(short="rollback")
    history = {0: WELL, 1: {**WELL, "accuracy": 0.9, "length_p50": 10.0}}
    assert decide(config, run_checks(config, history), 1, 1, 0, 1.0).state == "stop"


def test_the_description_names_the_best_adapter() -> None:
    text = describe_decision(Decision("stop", "it fell (1, limit 2)", 3, None, 1.0), 5, lambda r: f"adapter {r}")
    assert text == "health r005: it fell (1, limit 2): the run is stopped. Best so far: round 3, adapter 3"
    assert describe_decision(Decision("well", "", 3, None, 1.0), 5, str) == ""


@pytest.mark.parametrize(
    ("ids", "loop"),
    [
        ([1, 2, 3, 4] * 4, True),
        ([9, 8, *[1, 2, 3, 4] * 4], True),
        ([5] * 16, True),
        ([5] * 15, False),
        (list(range(40)), False),
        ([*range(40), *[1, 2] * 8], True),
        ([*[1, 2] * 8, 7], False),
    ],
)
def test_loops_at_the_end_are_detected(ids: list[int], loop: bool) -> None:
    assert ends_in_loop(ids) is loop


def collapsing(root: Path, *overrides: str) -> Run:
    """OPSD at a high learning rate, which makes completions in the tiny world very short within one round."""
    settings = ("steer.recipe=opsd", "train.rollouts=all", "train.divergence=forward_kl", "train.learning_rate=5e-3")
    return Run(small_config(root, *settings, *overrides))


def test_a_collapse_stops_the_run_and_names_the_best_adapter(tmp_path: Path) -> None:
    run = carry_out(collapsing(tmp_path, "health.short=stop").config, rounds=1)
    with pytest.raises(HealthStop, match=r"the median length fell \(4.*stopped\. Best so far: round 0, the base"):
        raise_if_stopped(run, 1)


def test_a_collapse_is_rolled_back_at_half_the_learning_rate(tmp_path: Path) -> None:
    run = carry_out(collapsing(tmp_path, "health.short=rollback").config, rounds=2)
    raise_if_stopped(run, 1)
    assert run.start_point(1) == StartPoint(0, 1.0)
    assert run.start_point(2) == StartPoint(0, 0.5)
    second = run.records.manifest("trajectories", 2)
    assert second
    assert second.metrics["policy"] == "base"
    rows = run.records.read("updates", 2).to_pylist()
    assert rows[0]["step"] == 1  # round 0 has no optimizer state, so the optimizer starts at step 0
    assert rows[0]["learning_rate"] == pytest.approx(2.5e-3)
    assert [STAGES[n](run, r).reused for r in (1, 2) for n in ROUND] == [True] * 16


def test_rounds_are_chosen_by_the_holdout_if_there_is_one(tmp_path: Path) -> None:
    """The benchmark is reported, so it chooses nothing."""
    run = carry_out(small_config(tmp_path, "problems.holdout=8"), rounds=1)
    rows = run.records.read("summaries", 1).to_pylist()
    assert [(row["benchmark"], row["place"]) for row in rows] == [("tiny", 0), ("holdout", 1)]
    accuracies = {}
    for round_ in (0, 1):
        tiny, holdout = run.records.read("summaries", round_).to_pylist()
        accuracies[round_] = holdout["accuracy"]
        assert read_deciding_summary(run.records, round_) == holdout
        assert read_first_summary(run.records, round_) == tiny
    decided = run.records.manifest("health", 1)
    assert decided
    assert decided.metrics["best"] == max((0, 1), key=lambda r: (accuracies[r], -r))
    findings = {row["check"]: row for row in run.records.read("health", 1).to_pylist()}
    assert findings["stop_mass"]["value"] == rows[1]["stop_mass"] != rows[0]["stop_mass"]


def test_evaluating_another_round_later_does_not_change_a_decision(tmp_path: Path) -> None:
    run = Run(small_config(tmp_path))
    run.records.open(run.config)
    for name, round_ in (("prepare", 0), ("evaluate", 0), ("health", 0)):
        STAGES[name](run, round_)
    for round_ in (1, 2):
        for name in ROUND[:6]:
            STAGES[name](run, round_)
    STAGES["evaluate"](run, 2)
    STAGES["health"](run, 2)
    STAGES["evaluate"](run, 1)
    assert STAGES["health"](run, 2).reused
