"""The health checks in words: every check has words, a sign and a unit."""

from __future__ import annotations

import pytest

from ogls.analysis.health_table import WORDS, health_in_words, with_unit
from ogls.config import HealthConfig
from ogls.evaluation.health import run_checks

SUMMARY = {"accuracy": 0.5, "accuracy_low": 0.4, "accuracy_high": 0.6, "length_p50": 20.0, "length_p95": 30.0} | {
    **{"repeated": 0.0, "entropy": 0.05, "truncated": 0.0, "stop_mass": 0.9, "kl_base": 0.1},
}


def row(check: str, newest: float | None, limit: float | None, failed: int = 0) -> dict:
    first = {"first_failed": 4 if failed else None, "action": "warn"}
    return {"check": check, "newest": newest, "newest_limit": limit, "failed_rounds": failed, **first}


@pytest.mark.parametrize("better", [True, False])
def test_every_check_has_words_and_the_sign_of_its_comparison(better: bool) -> None:
    """A value beyond its limit in the direction of the sign passes, and one beyond it in the other direction fails."""
    for finding in run_checks(HealthConfig(), {0: SUMMARY, 1: SUMMARY}):
        name, sign = finding.check, WORDS[finding.check][2]
        assert finding.limit is not None
        beyond = finding.limit + (1 if (sign == "at least") == better else -1)
        column = {"accuracy": "accuracy_high", "short": "length_p50", "long": "length_p95", "repeats": "repeated"}
        column |= {"low_entropy": "entropy", "high_entropy": "entropy"}
        last = SUMMARY | {column.get(name, name): beyond}
        (checked,) = [f for f in run_checks(HealthConfig(), {0: SUMMARY, 1: last}) if f.check == name]
        assert checked.failed is not better
        (in_words,) = health_in_words([row(name, beyond, checked.limit)], 2)["rows"]
        assert in_words["holds"] is better
        assert in_words["limit"].startswith(sign)


def test_a_healthy_run_is_one_sentence() -> None:
    rows = [row("short", 30.0, 19.6), row("kl_base", None, 1.0)]
    found = health_in_words(rows, 13)
    assert not found["failed"]
    assert found["sentence"] == (
        "\u2713 All 1 checks passed in all 13 checked rounds. Not measured: KL(policy || base)."
    )
    (shown,) = found["rows"]
    assert (shown["newest"], shown["limit"]) == ("30 tokens", "at least 20 tokens")


def test_a_failed_check_is_named_with_its_first_round() -> None:
    found = health_in_words([row("high_entropy", 0.2758, 0.143, failed=3), row("short", 30.0, 19.6)], 4)
    assert found["sentence"] == "\u2717 1 of 2 checks failed in some round: entropy."
    assert found["rows"][0]["history"] == "failed in 3 of 4 rounds, first in round 4"
    assert found["rows"][0]["newest"] == "0.276 nats per token"


def test_units() -> None:
    assert [with_unit(0.1013, "%"), with_unit(0.0, "%"), with_unit(0.89, "")] == ["10.1%", "0%", "0.89"]
