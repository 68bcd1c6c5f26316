"""Continual training: each run trains only new problems and starts from the last good adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import REPO, carry_out, small_config

from ogls.config import RunConfig
from ogls.errors import ModelError
from ogls.models.adapter import BASE, adapter_files
from ogls.models.policy import Policy
from ogls.stages import series
from ogls.stages.registry import STAGES
from ogls.stages.resume import is_finished
from ogls.stages.run import Run, open_run

ROWS = [json.loads(line) for line in (REPO / "data/tiny/train.jsonl").read_text().splitlines()[:24]]


def add_problems(folder: Path, name: str, rows: list[dict]) -> None:
    """Write a JSONL file of problems into the source folder."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    add_problems(tmp_path / "in", "monday.jsonl", ROWS[:8])
    source = f"problems.source={tmp_path / 'in'}"
    return small_config(tmp_path / "runs", "name=nightly", "rounds=1", "health.accuracy=off", source)


def test_the_next_run_trains_new_problems_from_the_last_adapter(config: RunConfig, tmp_path: Path) -> None:
    first = series.next_run(config)
    assert first
    assert (first.name, first.adapter.start, first.problems.after) == ("nightly-0001", "", ())
    first_run = carry_out(first)
    assert series.next_run(config) is None  # no new problems

    add_problems(tmp_path / "in", "tuesday.jsonl", ROWS[4:16])  # four of them are not new
    second = series.next_run(config)
    assert second
    assert (second.name, second.problems.after) == ("nightly-0002", ("nightly-0001",))
    second_run = carry_out(second)
    assert {p.problem_id for p in second_run.problems("train")} == {r["id"] for r in ROWS[8:16]}
    assert second_run.policy_hash(0) == first_run.policy_hash(1) != BASE
    trajectories = second_run.records.manifest("trajectories", 1)
    assert trajectories
    assert trajectories.metrics["policy"] == first_run.policy_hash(1)
    # Round 0 of a run evaluates the adapter that the previous run ended with.
    assert second_run.records.read("summaries", 0) == first_run.records.read("summaries", 1)
    assert series.next_run(config) is None
    newest = series.newest_config(config)
    assert newest
    assert newest.name == "nightly-0002"


def test_an_unfinished_run_is_continued_first(config: RunConfig, tmp_path: Path) -> None:
    first = series.next_run(config)
    assert first
    run = Run(first)
    run.records.open(first)
    STAGES["prepare"](run, 0)
    add_problems(tmp_path / "in", "tuesday.jsonl", ROWS[8:16])
    assert series.next_run(config) == first
    assert not is_finished(first)


def test_the_run_after_a_stopped_run_starts_from_the_best_adapter(config: RunConfig, tmp_path: Path) -> None:
    first = series.next_run(config)
    assert first
    run = carry_out(first.model_copy(update={"rounds": 2}), 2)
    path = Path(run.records.url("health/round=002/manifest.json"))
    manifest = json.loads(path.read_text())
    manifest["metrics"] |= {"state": "stop", "best": 1}
    path.write_text(json.dumps(manifest))
    assert is_finished(run.config.model_copy(update={"rounds": 9}))  # a stopped run is finished, whatever its rounds
    assert series.next_start_adapter(run.records).endswith("nightly-0001/policy/round=001")
    manifest["metrics"]["best"] = 0
    path.write_text(json.dumps(manifest))
    assert series.next_start_adapter(run.records) == ""  # it started from the base model


def test_the_run_after_a_rollback_in_the_last_round_starts_where_the_rollback_went(config: RunConfig) -> None:
    first = series.next_run(config)
    assert first
    run = carry_out(first.model_copy(update={"rounds": 2}), 2)
    path = Path(run.records.url("health/round=002/manifest.json"))
    manifest = json.loads(path.read_text())
    manifest["metrics"] |= {"state": "rollback", "best": 1, "restart": 1, "rate": 0.5}
    path.write_text(json.dumps(manifest))
    assert series.next_start_adapter(run.records).endswith("nightly-0001/policy/round=001")


@pytest.mark.nightly
def test_a_series_in_a_store_that_was_moved_goes_on(config: RunConfig, tmp_path: Path) -> None:
    """The second run is unfinished; its stored start adapter has the path of the old store."""
    first = series.next_run(config)
    assert first
    carry_out(first)
    add_problems(tmp_path / "in", "tuesday.jsonl", ROWS[8:16])
    second = series.next_run(config)
    assert second
    unfinished = carry_out(second, rounds=0)
    (tmp_path / "runs").rename(tmp_path / "moved")
    moved = config.model_copy(update={"root": str(tmp_path / "moved")})
    continued = series.next_run(moved)
    assert continued
    assert continued.adapter.start != second.adapter.start
    run = carry_out(continued)
    assert run.policy_hash(0) == unfinished.policy_hash(0)
    again = open_run(moved.root, continued.name)
    again.config = again.config.model_copy(update={"adapter": second.adapter})  # as the old store recorded it
    assert again.policy_hash(0) == run.policy_hash(0)  # its own copy


def test_a_missing_start_adapter_is_an_error(tmp_path: Path) -> None:
    run = Run(small_config(tmp_path, f"adapter.start={tmp_path}/none"))
    with pytest.raises(ModelError, match=r"adapter\.start: .*/none has no file adapter_model\.safetensors"):
        run.policy_hash(0)


def test_an_adapter_of_another_base_model_or_scale_is_an_error(tmp_path: Path, policy: Policy) -> None:
    """The weights have equal shapes, so only adapter_config.json shows the difference."""
    overrides = (f"adapter.start={tmp_path}", "adapter.rank=4", "adapter.alpha=8")
    config = small_config(tmp_path, *overrides)
    for name, content in adapter_files(policy.copy_adapter(), config.model, config.adapter).items():
        (tmp_path / name).write_bytes(content)
    assert Run(config).policy_hash(0) == policy.copy_adapter().hash
    other = Run(small_config(tmp_path, *overrides, "adapter.alpha=3"))
    with pytest.raises(ModelError, match=r"has lora_alpha = 8: set adapter\.alpha to it"):
        other.policy_hash(0)
    adapter_config = json.loads((tmp_path / "adapter_config.json").read_text())
    for base, allowed in (("some/where/model", True), (None, True), ("Qwen/Qwen3-1.7B", False)):
        (tmp_path / "adapter_config.json").write_text(json.dumps(adapter_config | {"base_model_name_or_path": base}))
        run = Run(small_config(tmp_path, *overrides))
        if allowed:
            assert run.policy_hash(0)
        else:
            with pytest.raises(ModelError, match=r"was trained on Qwen/Qwen3-1\.7B, and model\.path is"):
                STAGES["prepare"](run, 0)
