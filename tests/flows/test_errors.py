"""Errors in a flow: retries, time limits, locked runs, other versions and configurations."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from flow_helpers import newest_flow_run, task_runs, tracked

from flows.train import train_flow
from ogls.errors import DataError, RunLocked, StoreError
from ogls.stages import kept_models
from ogls.stages.run import Run
from tasks.stages import _concurrency_slot

pytestmark = pytest.mark.usefixtures("prefect_server")


def test_another_version_of_the_code_is_a_notice_or_an_error(
    tmp_path: Path, console_output: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tracked(tmp_path, "name=older", "rounds=0")
    train_flow(config)
    monkeypatch.setattr("ogls.store.run_store.code_version", lambda: {"version": "99.0", "revision": None})
    refusing = tracked(tmp_path, "name=older", "rounds=0", "execution.other_version=refuse")
    with pytest.raises(
        StoreError, match=r"last carried out by ogls-sd 0\.3\.0, and this is 99\.0; install that version"
    ):
        train_flow(refusing)
    train_flow(config)
    assert "this is 99.0: finished stages are kept" in console_output.readouterr().out
    console_output.readouterr()
    train_flow(refusing)  # 99.0 is now the version that carried it out last
    assert "last carried out" not in console_output.readouterr().out


def fail_evaluation(monkeypatch: pytest.MonkeyPatch, errors: list[Exception]) -> list[int]:
    """Make the sampler raise `errors` in order; returns a list with the number of its calls.

    Calls with at most eight requests succeed and are not counted: they are the probe.
    """
    from ogls.samplers.transformers import TransformersSampler

    real_sample, calls = TransformersSampler.sample, [0]

    def sample(self: Any, requests: Any, sampling: Any) -> Any:
        if len(requests) > 8:
            calls[0] += 1
            if errors:
                raise errors.pop(0)
        return real_sample(self, requests, sampling)

    monkeypatch.setattr(TransformersSampler, "sample", sample)
    return calls


def test_an_error_that_may_pass_is_retried_with_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, console_output: pytest.CaptureFixture[str]
) -> None:
    fail_evaluation(monkeypatch, [ConnectionError("gone"), RuntimeError("CUDA out of memory")])
    config = tracked(tmp_path, "name=heals", "rounds=0", "tracking.enabled=false")
    train_flow(config)
    output = console_output.readouterr().out
    assert "evaluate r000: ConnectionError: gone; retrying" in output
    assert "evaluate r000: RuntimeError: CUDA out of memory; retrying" in output
    runs = {r.name: r for r in task_runs(newest_flow_run("train heals"))}
    assert runs["evaluate r000"].run_count == 3
    assert Run(config).records.manifest("scores", 0)


def test_one_stage_at_a_time_occupies_the_slot_of_a_concurrency_limit() -> None:
    """Two runs on one machine: the second waits for the stage of the first, not for the whole run."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        client.upsert_global_concurrency_limit_by_name("one-device", 1)
    holders: list[int] = []

    def hold(number: int) -> None:
        with _concurrency_slot("one-device"):
            holders.append(number)
            assert len(holders) == 1
            time.sleep(1)
            holders.remove(number)

    with ThreadPoolExecutor(2) as pool:
        started = time.monotonic()
        for future in [pool.submit(hold, n) for n in range(2)]:
            future.result(timeout=60)
    assert time.monotonic() - started >= 2


def test_an_error_that_the_user_has_to_fix_is_not_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fail_evaluation(monkeypatch, [DataError("bad rows")] * 5)
    with pytest.raises(DataError, match="bad rows"):
        train_flow(tracked(tmp_path, "name=cannot-heal", "rounds=0"))
    assert calls == [1]
    flow_run = newest_flow_run("train cannot-heal")
    assert flow_run.state_name == "Failed"
    assert {r.name: r.run_count for r in task_runs(flow_run)}["evaluate r000"] == 1


def test_a_stage_is_stopped_at_its_time_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    from ogls.samplers.transformers import TransformersSampler

    monkeypatch.setattr(TransformersSampler, "sample", lambda *_: [time.sleep(0.1) for _ in range(600)])
    config = tracked(tmp_path, "name=slow", "rounds=0", "execution.timeout_seconds=8", "execution.retries=0")
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        train_flow(config)
    assert time.monotonic() - started < 50
    assert Run(config).records.manifest("scores", 0) is None


def test_a_second_process_gets_an_error_that_names_the_holder(tmp_path: Path) -> None:
    config = tracked(tmp_path, "name=held", "rounds=0")
    with Run(config).records.lock("train"), pytest.raises(RunLocked, match=r"run held is held by process \d+ on"):
        train_flow(config)


def test_a_run_name_with_another_configuration_is_an_error(trained: tuple) -> None:
    config, _, _ = trained
    other = config.model_copy(update={"seed": 5})
    with pytest.raises(StoreError, match="seed: 0 -> 5"):
        train_flow(other)


def test_a_diagnostic_that_fails_does_not_stop_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, console_output: pytest.CaptureFixture[str]
) -> None:
    dropped: list[str] = []
    drop = kept_models.drop_models
    monkeypatch.setattr("tasks.stages.drop_models", lambda: dropped.append("") or drop())
    monkeypatch.setattr("ogls.stages.style.styling.classify", lambda *_: 1 / 0)
    config = tracked(tmp_path, "name=diagnostic", "rounds=1", "tracking.enabled=false")
    train_flow(config)
    states = {run.name: run.state_name for run in task_runs(newest_flow_run("train diagnostic"))}
    assert (states["style r001"], states["train r001"]) == ("Skipped", "Completed")
    assert "style r001 was skipped (ZeroDivisionError" in console_output.readouterr().out
    assert Run(config).records.manifest("style", 1) is None
    assert len(dropped) == 1  # a model that an error may have left half changed is loaded anew
