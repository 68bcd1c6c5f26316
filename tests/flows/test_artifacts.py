"""Live progress of a stage: its text, how often it is sent, and that an unavailable server does not fail the stage."""

from __future__ import annotations

from typing import Any

import pytest

from ogls.progress import seconds_left
from ogls.records import StageResult
from tasks import artifacts


class Clock:
    """Replaces the module `time`; a test sets `now`, in seconds."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(artifacts, "time", clock)
    return clock


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, str]]:
    """(percent, description) of every update that is sent to Prefect."""
    sent: list[tuple[float, str]] = []

    def create(progress: float, key: str, description: str) -> str:
        assert key == "my-run-sample"
        sent.append((progress, description))
        return "id"

    def update(artifact: Any, progress: float, description: str) -> None:
        assert artifact == "id"
        sent.append((progress, description))

    monkeypatch.setattr(artifacts, "create_progress_artifact", create)
    monkeypatch.setattr(artifacts, "update_progress_artifact", update)
    return sent


def test_updates_are_sent_at_most_every_two_seconds(clock: Clock, sent: list[tuple[float, str]]) -> None:
    artifact = artifacts.ArtifactProgress("my.run", "sample", 3)
    for done in range(1, 41):
        clock.now += 0.5
        artifact(done * 8, 640)
    assert len(sent) == 10
    assert sent[0] == (1.25, "my.run r003 sample: 8 of 640 rollouts, 16 per second")  # too early
    assert sent[-1] == (46.25, "my.run r003 sample: 296 of 640 rollouts, 16 per second, 22 s left")
    artifact.finish(StageResult("sample", 3, 640, 40.0, {}))
    assert sent[-1] == (100.0, "my.run r003 sample: done, 640 rows in 40.0 s")


def test_no_artifact_for_a_reused_stage_or_a_stage_without_unit(sent: list[tuple[float, str]]) -> None:
    artifacts.ArtifactProgress("my.run", "sample", 3).finish(StageResult("sample", 3, 640, 40.0, {}, reused=True))
    without_unit = artifacts.ArtifactProgress("my.run", "health", 3)
    without_unit(1, 1)
    without_unit.finish(StageResult("health", 3, 1, 0.0, {}))
    assert sent == []


def test_an_unavailable_server_gives_one_warning(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []

    class Logger:
        def warning(self, text: str) -> None:
            warnings.append(text)

    def refuse(**_: Any) -> None:
        raise ConnectionError("unavailable")

    monkeypatch.setattr(artifacts, "create_progress_artifact", refuse)
    monkeypatch.setattr(artifacts, "get_run_logger", Logger)
    artifact = artifacts.ArtifactProgress("my.run", "sample", 3)
    for done in range(1, 9):
        clock.now += 5
        artifact(done, 8)
    artifact.finish(StageResult("sample", 3, 8, 40.0, {}))
    assert warnings == ["my.run r003 sample: live progress is no longer updated (ConnectionError)"]


@pytest.mark.parametrize(
    ("done", "total", "elapsed", "expected"),
    [(50, 100, 4.9, None), (4, 100, 10, None), (0, 0, 10, None), (5, 100, 10, 190.0), (100, 100, 10, 0.0)],
)
def test_the_time_left_is_shown_once_it_is_worth_something(
    done: int, total: int, elapsed: float, expected: float | None
) -> None:
    assert seconds_left(done, total, elapsed) == expected
