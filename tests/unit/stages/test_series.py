"""Continual training: new problems only, from the last good adapter, an unfinished run first, else nothing."""

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
from ogls.stages.run import Run, is_finished

ROWS = [json.loads(line) for line in (REPO / "data/tiny/train.jsonl").read_text().splitlines()[:24]]


def grow(folder: Path, name: str, rows: list[dict]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    grow(tmp_path / "in", "monday.jsonl", ROWS[:8])
    source = f"problems.source={tmp_path / 'in'}"
    return small_config(tmp_path / "runs", "name=nightly", "rounds=1", "health.accuracy=off", source)


def test_a_series_takes_what_is_new_and_goes_on_from_the_last_adapter(config: RunConfig, tmp_path: Path) -> None:
    first = series.next_run(config)
    assert first
    assert (first.name, first.adapter.start, first.problems.after) == ("nightly-0001", "", ())
    done = carry_out(first)
    assert series.next_run(config) is None  # nothing new

    grow(tmp_path / "in", "tuesday.jsonl", ROWS[4:16])  # four of them are known
    second = series.next_run(config)
    assert second
    assert (second.name, second.problems.after) == ("nightly-0002", ("nightly-0001",))
    again = carry_out(second)
    assert {p.problem_id for p in again.problems("train")} == {r["id"] for r in ROWS[8:16]}
    assert again.policy_hash(0) == done.policy_hash(1) != BASE
    trajectories = again.records.manifest("trajectories", 1)
    assert trajectories
    assert trajectories.metrics["policy"] == done.policy_hash(1)
    assert again.records.read("summaries", 0) == done.records.read("summaries", 1)  # round 0 is where the last ended
    assert series.next_run(config) is None
    found = series.newest_config(config)
    assert found
    assert found.name == "nightly-0002"


def test_an_unfinished_run_goes_on_first(config: RunConfig, tmp_path: Path) -> None:
    first = series.next_run(config)
    assert first
    run = Run(first)
    run.records.open(first)
    STAGES["prepare"](run, 0)
    grow(tmp_path / "in", "tuesday.jsonl", ROWS[8:16])
    assert series.next_run(config) == first
    assert not is_finished(first)


def test_a_stopped_run_hands_on_its_best_adapter(config: RunConfig, tmp_path: Path) -> None:
    first = series.next_run(config)
    assert first
    run = carry_out(first.model_copy(update={"rounds": 2}), 2)
    manifest = Path(run.records.url("health/round=002/manifest.json"))
    told = json.loads(manifest.read_text())
    told["metrics"] |= {"state": "stop", "best": 1}
    manifest.write_text(json.dumps(told))
    assert is_finished(run.config.model_copy(update={"rounds": 9}))  # it will not go on
    assert series.handed_on_adapter(run.records).endswith("nightly-0001/policy/round=001")
    told["metrics"]["best"] = 0
    manifest.write_text(json.dumps(told))
    assert series.handed_on_adapter(run.records) == ""  # the base model it had started from


def test_an_adapter_that_is_not_there_is_said(tmp_path: Path) -> None:
    run = Run(small_config(tmp_path, f"adapter.start={tmp_path}/none"))
    with pytest.raises(ModelError, match=r"adapter\.start: .*/none holds no adapter_model\.safetensors"):
        run.policy_hash(0)


def test_an_adapter_of_another_base_or_scale_is_refused(tmp_path: Path, policy: Policy) -> None:
    """Of equal shapes, so that only its adapter_config.json tells."""
    same = (f"adapter.start={tmp_path}", "adapter.rank=4", "adapter.alpha=8")
    config = small_config(tmp_path, *same)
    for name, content in adapter_files(policy.copy_adapter(), config.model, config.adapter).items():
        (tmp_path / name).write_bytes(content)
    assert Run(config).policy_hash(0) == policy.copy_adapter().hash
    other = Run(small_config(tmp_path, *same, "adapter.alpha=3"))
    with pytest.raises(ModelError, match=r"has lora_alpha = 8: set adapter\.alpha to it"):
        other.policy_hash(0)
    about = json.loads((tmp_path / "adapter_config.json").read_text())
    for base, fine in (("some/where/model", True), (None, True), ("Qwen/Qwen3-1.7B", False)):
        (tmp_path / "adapter_config.json").write_text(json.dumps(about | {"base_model_name_or_path": base}))
        run = Run(small_config(tmp_path, *same))
        if fine:
            assert run.policy_hash(0)
        else:
            with pytest.raises(ModelError, match=r"was trained on Qwen/Qwen3-1\.7B, and model\.path is"):
                STAGES["prepare"](run, 0)
