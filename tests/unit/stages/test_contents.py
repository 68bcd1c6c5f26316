"""A run is identified by what its paths hold: the model, the adapter it starts from, its problems and its checker."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conftest import carry_out, small_config

from ogls.config import DataSource, ModelConfig
from ogls.config.fingerprint import canonical_json
from ogls.digests import file_digest, known_files, path_digest, remember_files
from ogls.errors import StoreError
from ogls.stages.contents import model_content, source_content
from ogls.stages.registry import STAGES
from ogls.stages.run import Run


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the seed model that a test may change."""
    return Path(shutil.copytree("data/tiny/model", tmp_path / "model"))


def test_a_model_folder_that_changes_during_a_run_is_an_error(model: Path, tmp_path: Path) -> None:
    config = small_config(tmp_path, f"model.path={model}")
    carry_out(config, rounds=0)
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    changed = r"model\.path: 'content:\w+' -> 'content:\w+'"
    with pytest.raises(StoreError, match=changed):
        STAGES["sample"](Run(config), 1)
    with pytest.raises(StoreError, match=changed):
        Run(config).open()


def test_a_model_folder_may_be_moved(model: Path, tmp_path: Path) -> None:
    carry_out(small_config(tmp_path, f"model.path={model}"), rounds=0)
    model.rename(tmp_path / "moved")
    run = Run(small_config(tmp_path, f"model.path={tmp_path}/moved"))
    assert run.open() == ""
    assert STAGES["prepare"](run, 0).reused
    assert STAGES["evaluate"](run, 0).reused


def test_another_checker_under_the_same_name_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checker = tmp_path / "mychecker.py"
    checker.write_text("def equal(answer, expected):\n    return answer == expected\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = small_config(tmp_path / "runs", "verify.checker=mychecker:equal")
    Run(config).open()
    STAGES["prepare"](Run(config), 0)
    checker.write_text("def equal(answer, expected):\n    return True\n")
    with pytest.raises(StoreError, match=r"verify\.checker: 'mychecker:equal@\w+' -> 'mychecker:equal@\w+'"):
        Run(config).open()


def test_a_run_has_a_copy_of_the_adapter_that_it_starts_from(finished: Run, tmp_path: Path) -> None:
    start = tmp_path / "start"
    shutil.copytree(finished.records.url("policy/round=002"), start)
    config = small_config(tmp_path, f"adapter.start={start}")
    carry_out(config, rounds=0)
    shutil.rmtree(start)
    run = carry_out(config, rounds=1)
    assert run.policy_hash(0) == finished.policy_hash(2)
    first = run.records.manifest("trajectories", 1)
    assert first
    assert first.metrics["policy"] == finished.policy_hash(2)


def test_a_hub_model_and_a_hub_data_set_are_identified_by_their_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    import huggingface_hub
    import transformers

    loaded = SimpleNamespace(_commit_hash="abc123")
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda *a, **k: loaded)
    assert model_content(ModelConfig(path="owner/model")) == "owner/model@abc123"
    monkeypatch.setattr(
        huggingface_hub.HfApi, "dataset_info", lambda *a, revision, **k: SimpleNamespace(sha=f"sha-of-{revision}")
    )
    assert source_content(DataSource(source="owner/data", revision="v2")) == "owner/data@sha-of-v2"


def test_what_the_hub_cannot_answer_now_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    assert source_content(DataSource(source="owner/data")) == ""  # tests run offline
    assert model_content(ModelConfig(path="owner/model")) == ""


def test_the_engine_auto_is_identified_by_what_it_became(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that was half done with one engine is not continued with another."""
    run = carry_out(small_config(tmp_path, "rollout.engine=auto"), rounds=0)
    with monkeypatch.context() as patch:
        patch.setattr("ogls.stages.sample.resolve_engine", lambda _: "vllm")
        STAGES["sample"](run, 1)  # another name in the fingerprint; on the CPU the engine stays transformers
    result = STAGES["sample"](run, 1)
    assert (result.reused, result.redone) == (False, "its configuration or input has changed")


def test_a_digest_is_remembered_by_size_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "folder" / "weights"
    path.parent.mkdir()
    path.write_bytes(b"one")
    before = path_digest(path.parent)
    reads: list[object] = []
    monkeypatch.setattr("ogls.digests.hashlib.file_digest", lambda *a: reads.append(a))
    assert path_digest(path.parent) == before
    facts = known_files([path.parent])
    monkeypatch.setattr("ogls.digests._known", {})
    remember_files(facts)  # as another process does
    assert path_digest(path.parent) == before
    assert reads == []
    monkeypatch.undo()
    path.write_bytes(b"two")
    assert path_digest(path.parent) != before
    assert file_digest(path) != facts[str(path)][2]


def test_paths_are_in_no_fingerprint(tmp_path: Path) -> None:
    config = small_config(tmp_path, f"adapter.start={tmp_path}")
    assert "data/tiny" not in canonical_json(Run(config).identity)
