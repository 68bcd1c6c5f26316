"""Stages: finished work is reused, damaged files are found and redone, and a round without mixed groups is reported."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROUND, again, carry_out, content, small_config

from ogls.config import TrainConfig
from ogls.errors import ConfigError, DataError, ModelError, StoreError
from ogls.models.adapter import Adapter
from ogls.models.policy import Policy
from ogls.records import Problem, Rollout
from ogls.stages import columns
from ogls.stages.check import find_damage
from ogls.stages.prepare import _cut_solutions
from ogls.stages.registry import STAGES
from ogls.stages.run import Run
from ogls.training.items import correct_rollout_items, reference_items


@pytest.fixture
def copy(finished: Run, tmp_path: Path) -> Run:
    """A copy of the finished run that a test may damage."""
    shutil.copytree(Path(finished.records.storage.path) / "tiny", tmp_path / "tiny")
    return Run(small_config(tmp_path))


def test_finished_stages_are_reused(copy: Run) -> None:
    assert {reused for reused, _ in again(copy).values()} == {True}


def test_a_run_is_deterministic(finished: Run, tmp_path: Path) -> None:
    assert content(carry_out(small_config(tmp_path))) == content(finished)


@pytest.mark.parametrize(
    ("stage", "file"),
    [
        ("sample 2", "trajectories/round=002/part-0001.parquet"),
        ("verify 2", "verdicts/round=002/part-0000.parquet"),
        ("teach 2", "contexts/round=002/part-0000.parquet"),
        ("steer 2", "targets/round=002/part-0000.parquet"),
        ("train 2", "policy/round=002/adapter_model.safetensors"),
        ("train 2", "policy/round=002/optimizer.safetensors"),
        ("evaluate 2", "scores/round=002/part-0001.parquet"),
        ("evaluate 2", "summaries/round=002/part-0000.parquet"),
    ],
)
@pytest.mark.parametrize("damage", ["missing", "bit flipped"])
def test_only_the_damaged_stage_is_redone_with_a_notice(
    copy: Run, finished: Run, tmp_path: Path, stage: str, file: str, damage: str
) -> None:
    path = tmp_path / "tiny" / file
    original = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(original[:60] + bytes([original[60] ^ 4]) + original[61:])
    results = again(copy)
    redone = {name for name, (reused, _) in results.items() if not reused}
    assert redone == {stage}
    assert "is redone" in results[stage][1]
    assert file.split("/")[-1] in results[stage][1]
    assert path.read_bytes() == original
    assert content(copy) == content(finished)


@pytest.mark.parametrize("damage", ["missing", "bit flipped"])
def test_states_are_compared_with_their_checksum_as_long_as_a_stage_reads_them(copy: Run, damage: str) -> None:
    """Later, only their sizes are: they are most of the bytes of a round. `ogls check` compares their checksums."""
    path = Path(copy.records.url("teacher_states/round=002/part-0001.parquet"))
    original = path.read_bytes()
    path.write_bytes(original[:60] + bytes([original[60] ^ 4]) + original[61:])
    if damage == "missing":
        path.unlink()
    assert STAGES["teach"](copy, 2).reused is (damage == "bit flipped")
    if damage == "bit flipped":
        assert [d.path for d in find_damage(copy)] == ["teacher_states/round=002/part-0001.parquet"]
        Path(copy.records.url("targets/round=002/part-0000.parquet")).unlink()  # now `steer` has to read them
        assert "part-0001.parquet has another checksum" in STAGES["teach"](copy, 2).redone
    assert path.read_bytes() == original


def test_a_stage_with_a_truncated_manifest_is_redone(copy: Run, tmp_path: Path) -> None:
    manifest = tmp_path / "tiny/targets/round=002/manifest.json"
    manifest.write_text(manifest.read_text()[:99])
    results = again(copy)
    assert results["steer 2"] == (False, "steer r002 is redone: its manifest cannot be read")
    assert sum(not reused for reused, _ in results.values()) == 1


def test_a_changed_setting_redoes_only_the_stages_that_depend_on_it(copy: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stages are called directly, without the check that a run keeps its configuration."""
    monkeypatch.setattr(Run, "check_identity", lambda _: None)
    config = small_config(copy.config.root, "steer.strength=0.9")
    run = Run(config)
    reused = {n: STAGES[n](run, 2).reused for n in ROUND}
    assert {name for name in ROUND if reused[name]} == {"sample", "verify", "teach"}


def test_a_damaged_adapter_is_an_error(copy: Run, tmp_path: Path) -> None:
    path = tmp_path / "tiny/policy/round=001/adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(
        StoreError, match=r"adapter_model\.safetensors has \d+ bytes instead of \d+; `ogls check tiny --repair`"
    ):
        copy.load_adapter(1)


def test_an_adapter_of_another_round_is_an_error(copy: Run, tmp_path: Path) -> None:
    """The checksum in the manifest fits the exchanged file, but the hash of the adapter is not the recorded one."""
    exchanged = tmp_path / "tiny/policy/round=001/adapter_model.safetensors"
    shutil.copy(tmp_path / "tiny/policy/round=002/adapter_model.safetensors", exchanged)
    path = tmp_path / "tiny/updates/round=001/manifest.json"
    manifest = json.loads(path.read_text())
    (entry,) = [f for f in manifest["files"] if f["path"].endswith("adapter_model.safetensors")]
    entry["sha256"] = hashlib.sha256(exchanged.read_bytes()).hexdigest()
    path.write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match=r"the adapter's hash is \w+, but \w+ was trained"):
        copy.load_adapter(1)


def test_gradient_checkpointing_does_not_change_a_run(finished: Run, tmp_path: Path) -> None:
    """Checkpointing must be off for the probe after training, and for the teacher pass of a newly trained policy.

    Checkpointed layers drop the key-value cache with their activations.
    """
    config = finished.config.model_copy(update={"root": str(tmp_path), "train": with_checkpointing(finished)})
    checkpointed = carry_out(config)
    for round_ in (1, 2):
        probes = [run.records.manifest("updates", round_).metrics["probe"] for run in (finished, checkpointed)]
        for before, after in zip(*probes, strict=True):
            assert before["token_ids"] == after["token_ids"]
            assert before["logprobs"] == pytest.approx(after["logprobs"], abs=1e-4)


def with_checkpointing(run: Run) -> TrainConfig:
    return run.config.train.model_copy(update={"gradient_checkpointing": True})


def test_a_stage_without_its_input_names_the_stage_to_run_first(tmp_path: Path) -> None:
    run = Run(small_config(tmp_path))
    with pytest.raises(StoreError, match="run the stage prepare first"):
        STAGES["sample"](run, 1)
    STAGES["prepare"](run, 0)
    with pytest.raises(StoreError, match="run the stage sample first"):
        STAGES["verify"](run, 1)
    with pytest.raises(StoreError, match="has not trained round 1"):
        STAGES["sample"](run, 2)


def unsolvable_problems(tmp_path: Path) -> list[str]:
    """Overrides for a source in which every expected answer is wrong, so that no rollout is correct."""
    rows = [json.loads(line) for line in Path("data/tiny/train.jsonl").read_text().splitlines()][:40]
    path = tmp_path / "wrong.jsonl"
    path.write_text("".join(json.dumps({**row, "answer": "77"}) + "\n" for row in rows))
    return [f"problems.source={path}", "root=" + str(tmp_path / "store")]


def test_rounds_without_a_correct_rollout_are_reported_and_train_nothing(tmp_path: Path) -> None:
    """No group is mixed in any round: the notices say so, the adapter does not change, and the next round runs."""
    config = small_config(tmp_path, *unsolvable_problems(tmp_path))
    run = Run(config)
    run.records.open(config)
    for name in ("prepare", "evaluate", "health"):
        STAGES[name](run, 0)
    for round_ in (1, 2):
        results = {name: STAGES[name](run, round_) for name in ROUND}
        notice = results["verify"].notice
        assert f"round {round_}: 0 of 8 groups are mixed (0 of 32 rollouts are correct)" in notice
        assert "use easier problems" in notice
        assert results["verify"].metrics["mixed_groups"] == 0
        assert results["teach"].metrics["left_out"] == {"group_not_mixed": 32}
        assert "nothing to train on" in results["train"].notice
        assert results["steer"].rows == results["train"].rows == 0
    assert run.policy_hash(1) == run.policy_hash(2)


def test_a_run_goes_on_with_its_own_copy_of_problems_that_have_changed(tmp_path: Path) -> None:
    config = small_config(tmp_path, *unsolvable_problems(tmp_path))
    assert Run(config).open() == ""
    STAGES["prepare"](Run(config), 0)
    source = Path(config.problems.source)
    source.write_text(source.read_text().replace("77", "78"))
    assert Run(config).open() == "problems.source: changed since the run began, which goes on with its own copy"
    assert STAGES["prepare"](Run(config), 0).reused
    other = tmp_path / "other.jsonl"
    source.rename(other)
    with pytest.raises(StoreError, match=r"problems.source: 'content:\w+' -> 'content:\w+'"):
        Run(small_config(config.root, f"problems.source={other}")).open()
    other.write_text(other.read_text().replace("78", "77"))  # the content that the run began with, in another place
    assert Run(small_config(config.root, f"problems.source={other}")).open() == ""


def test_unusable_answers_are_an_error_before_the_first_rollout(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"id": "x", "problem": "P?", "answer": "}{"}\n{"id": "y", "problem": "Q?", "answer": "2"}\n')
    with pytest.raises(DataError, match=r"1 of 2 problems are unusable \(1 unusable answer: x \('}\{'\)\)"):
        STAGES["prepare"](Run(small_config(tmp_path, f"problems.source={path}")), 0)


def test_problems_longer_than_the_context_are_an_error_before_the_first_rollout(tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"8 too long: .* completion of up to .*; .* takes 512.*lower max_tokens, or",
    ):
        STAGES["prepare"](Run(small_config(tmp_path, "evaluate.max_tokens=500")), 0)


def test_states_that_overflow_their_type_are_an_error(copy: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from ogls.distillation import teacher

    real = teacher.score_rollouts
    monkeypatch.setattr(teacher, "score_rollouts", lambda *a: {k: v * 1e6 for k, v in real(*a).items()})
    shutil.rmtree(copy.records.url("teacher_states/round=001"))
    with pytest.raises(ModelError, match=r"hidden states do not fit float16 .* set teacher.state_dtype to bfloat16"):
        STAGES["teach"](copy, 1)


@pytest.mark.parametrize(
    "overrides",
    [
        ["teacher.weights=ema", "teacher.ema_decay=0.5"],
        ["teacher.anchor=teacher"],
        ["steer.recipe=opsd", "train.rollouts=all", "train.divergence=forward_kl"],
        ["steer.recipe=sdpo", "train.divergence=jsd"],
        ["steer.recipe=contrastive", "train.support=full"],
        ["train.objective=grpo", "train.grpo.normalise_std=false", "train.tail_weight=0.1"],
        ["adapter.kind=full", "train.tail_weight=0.2", "train.epochs=2"],
        ["problems.holdout=10", "teacher.empty_pool=reference", "steer.support=1000"],
    ],
    ids=lambda o: o[0],
)
def test_related_methods_are_configurations(tmp_path: Path, overrides: list[str]) -> None:
    run = carry_out(small_config(tmp_path, *overrides))
    trained = [run.policy_hash(r) for r in (1, 2)]
    assert len({"base", *trained}) == 3
    losses = [r["loss"] for r in run.records.read("updates", 2).to_pylist()]
    grpo = objective_of(overrides) == "grpo"  # its loss may be negative, and is near 0 at the first step
    assert all(abs(x) < 1 if grpo else x > 0 for x in losses)


def objective_of(overrides: list[str]) -> str:
    return small_config("x", *overrides).train.objective


def test_methods_without_a_teacher_have_no_teacher_stages(tmp_path: Path) -> None:
    run = carry_out(small_config(tmp_path, "train.objective=grpo"))
    assert run.records.rounds("updates") == [1, 2]
    assert run.records.rounds("teacher_states") == run.records.rounds("targets") == []
    groups = columns.to_rollouts(run.records.read("trajectories", 1), run.records.read("verdicts", 1))
    mixed = [g for g in groups.values() if {"correct", "failed"} <= {r.outcome for r in g}]
    updates = run.records.read("updates", 1).to_pylist()
    assert sum(u["rollouts"] for u in updates) == sum(map(len, mixed))
    assert sum(u["tokens"] for u in updates) == sum(len(r.token_ids) for g in mixed for r in g)


def test_sft_trains_on_reference_solutions_and_rft_on_correct_rollouts(tmp_path: Path) -> None:
    last_tokens = {}
    for objective in ("sft", "rft"):
        run = carry_out(small_config(tmp_path / objective, f"train.objective={objective}"), rounds=1)
        problems_by_id = {p.problem_id: p for p in run.problems("train")}
        groups = columns.to_rollouts(run.records.read("trajectories", 1), run.records.read("verdicts", 1))
        tokenizer = run.load_policy().tokenizer
        if objective == "sft":
            items = reference_items(groups, problems_by_id, tokenizer, tokenizer.eos_token_id, 64)
            texts = {i.key[0]: tokenizer.decode(i.token_ids, skip_special_tokens=True) for i in items}
            assert texts == {name: problems_by_id[name].solution for name in groups}
        else:
            items = correct_rollout_items(groups)
            correct = [r for g in groups.values() for r in g if r.outcome == "correct"]
            assert [i.token_ids for i in items] == [r.token_ids for r in correct]
        updates = run.records.read("updates", 1).to_pylist()
        assert sum(u["tail_tokens"] for u in updates) == sum(len(i.token_ids) for i in items)
        last_tokens[objective] = {i.token_ids[-1] for i in items}
    assert last_tokens["sft"] == {tokenizer.eos_token_id}


def test_a_control_token_in_a_solution_is_no_stop_token_in_sft(policy: Policy) -> None:
    tokenizer, stop = policy.tokenizer, policy.tokenizer.eos_token_id
    text = f"1+1=2 {tokenizer.eos_token} so 2"
    problem, rollout = Problem("p", "1+1?", "2", text), Rollout("p", 0, (5, 6), (7,), "", "correct")
    (item,) = reference_items({"p": [rollout]}, {"p": problem}, tokenizer, stop, 64)
    assert item.token_ids.count(stop) == 1
    assert item.token_ids[-1] == stop


def test_a_cut_solution_has_no_stop_token_in_sft(policy: Policy) -> None:
    tokenizer, stop = policy.tokenizer, policy.tokenizer.eos_token_id
    problem, rollout = Problem("p", "1+1?", "2", "1+1=2"), Rollout("p", 0, (5, 6), (7,), "", "correct")
    (whole,) = reference_items({"p": [rollout]}, {"p": problem}, tokenizer, stop, 64)
    (cut,) = reference_items({"p": [rollout]}, {"p": problem}, tokenizer, stop, len(whole.token_ids) - 1)
    assert cut.token_ids == whole.token_ids[:-1]
    assert stop not in cut.token_ids
    (notice,) = _cut_solutions([problem], tokenizer, len(whole.token_ids) - 1)
    assert "1 of 1 reference solutions do not fit" in notice
    assert list(_cut_solutions([problem], tokenizer, len(whole.token_ids))) == []


def test_teacher_weights_change_the_targets(tmp_path: Path) -> None:
    """Frozen, live and averaged teachers agree in round 1, where all are the base model, and differ in round 2."""
    targets: dict[str, list[np.ndarray]] = {}
    for weights in ("frozen", "live", "ema"):
        run = carry_out(small_config(tmp_path / weights, f"teacher.weights={weights}", "train.learning_rate=5e-3"))
        tables = [run.records.read("targets", r) for r in (1, 2)]
        targets[weights] = [t["token_target_logprob"].to_numpy() for t in tables]
    (frozen, live, ema) = targets.values()
    assert np.abs(frozen[0] - live[0]).max() < 1e-2 > np.abs(frozen[0] - ema[0]).max()  # fp16 states
    means = [np.mean(t[1]) for t in (frozen, live, ema)]
    assert len({round(float(m), 4) for m in means}) == 3


def test_the_first_teacher_of_a_run_with_a_start_adapter(finished: Run, tmp_path: Path) -> None:
    """Live and averaged teachers begin with the start adapter; the frozen one is the base model."""
    start = f"adapter.start={finished.records.url('policy/round=002')}"
    targets, averages = {}, {}
    for weights in ("frozen", "live", "ema"):
        overrides = (start, f"teacher.weights={weights}", "teacher.ema_decay=0.5", "teacher.anchor=teacher")
        run = carry_out(small_config(tmp_path / weights, *overrides, "train.learning_rate=5e-3"), rounds=1)
        targets[weights] = run.records.read("targets", 1)["token_base_logprob"].to_numpy()
        averages[weights] = run
    sampled = averages["live"].records.read("trajectories", 1)
    keys = zip(sampled["problem_id"].to_pylist(), sampled["sample"].to_pylist(), strict=True)
    logprobs = dict(zip(keys, sampled["logprobs"].to_pylist(), strict=True))
    rows = averages["live"].records.read("targets", 1).to_pylist()
    drawn = [logprobs[r["problem_id"], r["sample"]][r["position"]] for r in rows]
    assert np.abs(targets["live"] - drawn).max() < 5e-2  # the policy that sampled; fp16 states
    assert np.array_equal(targets["live"], targets["ema"])
    assert np.abs(targets["frozen"] - drawn).max() > 0.1
    run = averages["ema"]
    ema = Adapter.from_bytes(run.read_attachment(1, "ema.safetensors")).weights
    first, last = run.load_adapter(0), run.load_adapter(1)
    assert first
    assert last
    for name, weight in ema.items():
        torch.testing.assert_close(weight, (first.weights[name] + last.weights[name]) / 2)


def test_an_unknown_source_is_an_error_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read problems"):
        STAGES["prepare"](Run(small_config(tmp_path, "problems.source=none.jsonl")), 0)
    with pytest.raises(ConfigError):
        small_config(tmp_path, "problems.sauce=none.jsonl")
    assert not list(tmp_path.rglob("*.parquet"))


def test_a_run_in_a_store_that_is_not_a_directory(finished: Run) -> None:
    """The store can be an object store; the records have the same bits as on a disk."""
    from uuid import uuid4

    run = carry_out(small_config(f"memory://{uuid4().hex}"))
    assert content(run) == content(finished)
    assert {reused for reused, _ in again(run).values()} == {True}
