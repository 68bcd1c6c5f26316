"""Training on two processes gives what one gives, for DDP and FSDP2; ranks that fail or die; checkpoints."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shutil import copytree, rmtree
from typing import Any, NamedTuple

import pytest
import torch
from conftest import REPO, random_items, small_config

from ogls.config import AdapterConfig, ModelConfig, TrainConfig
from ogls.errors import ConfigError, ModelError, NonFiniteLoss, RankDied
from ogls.models.adapter import Adapter
from ogls.models.policy import Policy
from ogls.stages.run import Run
from ogls.stages.train import train
from ogls.training.batching import TrainItem
from ogls.training.launch import run_ranks
from ogls.training.ranks import KINDS, Ranks, count_ranks
from ogls.training.trainer import Trainer


class Case(NamedTuple):
    adapter: str
    objective: str
    dtype: str = "float32"
    checkpointing: bool = False


CASES = (
    Case("lora", "distil"),
    Case("lora", "grpo"),
    Case("full", "distil"),
    Case("full", "grpo", checkpointing=True),
    Case("lora", "distil", "bfloat16", checkpointing=True),
)


def items_of(case: Case) -> list[TrainItem]:
    """Items with token weights and tails; for grpo, recorded log-probs that are replaced by those of the policy."""
    items, generator = [], torch.Generator().manual_seed(5)
    for i, item in enumerate(random_items()):
        weights = torch.rand(item.trained, generator=generator)
        if case.objective == "grpo":
            none = {"ids": None, "logprobs": None, "tail_mass": None}
            old = torch.full((item.trained,), -3.0)
            items.append(replace(item, **none, weights=weights, old_logprobs=old, advantage=1.0 - i % 3))
        else:
            items.append(replace(item, weights=weights))
    return items


def new_trainer(case: Case, ranks: Ranks) -> Trainer:
    model = ModelConfig(path=str(REPO / "data/tiny/model"), dtype=case.dtype)
    policy = Policy(ranks.model_config(model), AdapterConfig(kind=case.adapter, rank=4, alpha=8))
    ranks.place(policy)
    config = TrainConfig(
        objective=case.objective,
        batch_rollouts=5,  # three steps an epoch; ranks have unequal numbers of micro-batches
        epochs=2,
        micro_batch_tokens=40,
        head_tokens=7,
        tail_weight=0.3,
        gradient_checkpointing=case.checkpointing,
        learning_rate=1e-4
        if case.adapter == "lora"
        else 2e-5,  # no ratio of grpo may explode, which magnifies rounding
    )
    return Trainer(policy, config, temperature=0.8, ranks=ranks)


def train_case(case: Case, ranks: Ranks) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor], bool]:
    """Train two epochs: the rows, the weights, and whether training restored in the middle ends with the same bits."""
    trainer, saved = new_trainer(case, ranks), []
    items = trainer.with_own_logprobs(items_of(case)) if case.objective == "grpo" else items_of(case)

    def save(rows: list[dict[str, Any]]) -> None:
        if len(rows) == 3:
            saved.extend((list(rows), trainer.weights(), trainer.state()))

    rows, weights = trainer.train_round(items, 1, after_step=save), trainer.weights()
    again = new_trainer(case, ranks)
    again.restore(saved[1], saved[2])
    same_rows = again.train_round(items, 1, finished=saved[0]) == rows
    same = Adapter.from_weights(again.weights()).hash == Adapter.from_weights(weights).hash
    return rows, weights, same and same_rows


def carry_out_cases(rank: int, size: int, report: Callable[[Any], None]) -> None:
    """Train every case in both ways and report it; then train on a rollout with a loss that is not finite."""
    for parallel, kind in KINDS.items():
        ranks = kind(rank, size)
        for case in CASES:
            rows, weights, same = train_case(case, ranks)
            numbers = {name: weight.numpy() for name, weight in weights.items()}
            report((parallel, case, rank, rows, numbers, Adapter.from_weights(weights).hash, same))
    items = items_of(CASES[0])
    items[2] = replace(items[2], logprobs=torch.full_like(items[2].logprobs, float("nan")))
    new_trainer(CASES[0], ranks).optimizer_step(items)  # the last kind is fsdp: the other rank waits for a layer


@pytest.fixture(scope="module")
def reported() -> list[Any]:
    """What two ranks report of all cases; their last step has a rollout with a loss that is not finite."""
    values: list[Any] = []
    with pytest.raises(NonFiniteLoss, match=r"\(p, 2\); nothing of this stage is saved"):
        run_ranks(carry_out_cases, 2, "cpu", values.append)
    assert len(values) == 2 * len(KINDS) * len(CASES)
    return values


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_ranks_train_as_one_process(reported: list[Any], case: Case) -> None:
    """The losses are equal to 1e-6 and the weights to 1e-5; all ranks have the same bits, also after a restart."""
    rows, weights, same = train_case(case, Ranks())
    assert same
    half = case.dtype == "bfloat16"
    for parallel in KINDS:
        results = [value for value in reported if value[:2] == (parallel, case)]
        assert len({value[5] for value in results}) == 1, "the ranks have different weights"
        assert all(value[6] for value in results), "the same bits after a restart"
        assert results[0][3] == results[1][3]
        for got, expected in zip(results[0][3], rows, strict=True):
            assert got["loss"] == pytest.approx(expected["loss"], rel=2e-2 if half else 1e-6)
            assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.1 if half else 1e-4)
            assert {**dict(got["metrics"])} == pytest.approx(dict(expected["metrics"]), abs=0.1 if half else 1e-5)
        for name, weight in weights.items():
            got = torch.from_numpy(results[0][4][name])
            torch.testing.assert_close(got, weight, atol=1e-3 if half else 1e-5, rtol=0)


@pytest.mark.slow
def test_the_error_of_a_rank_names_it_and_has_its_traceback() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)rank [01] of 2 of the training failed; nothing .*TypeError: divmod"):
        run_ranks(divmod, 2, "cpu")  # which does not take three arguments


def redo(finished: Run, tmp_path: Path, *overrides: str) -> tuple[Run, Path]:
    """A copy of the finished run without the training of round 2, and the folder of its table updates."""
    copytree(finished.records.storage.path, tmp_path, dirs_exist_ok=True)
    run = Run(small_config(tmp_path, *overrides))
    rmtree(tmp_path / "tiny" / "updates" / "round=002")
    rmtree(tmp_path / "tiny" / "policy" / "round=002")
    return run, tmp_path / "tiny" / "updates" / "round=002"


@pytest.mark.slow
@pytest.mark.timeout(600)  # four processes import torch and transformers, two by two
def test_a_stage_on_two_processes_survives_the_death_of_one(finished: Run, tmp_path: Path) -> None:
    """The error names the rank, and only the checkpoint is saved; the same command goes on from there."""
    run, folder = redo(
        finished, tmp_path, "train.parallel=ddp", "train.processes=2", "train.checkpoint_steps=1", "model.device=cpu"
    )

    def kill_rank_1(done: int, total: int) -> None:
        (child,) = [p for p in multiprocessing.active_children() if p.name == "rank 1"]
        os.kill(child.pid, signal.SIGKILL)

    with pytest.raises(RankDied, match=r"rank 1 of 2 of the training was killed by SIGKILL.* run the same command"):
        train(run, 2, kill_rank_1)
    assert not [p for p in multiprocessing.active_children() if p.name.startswith("rank")]
    assert [p.name for p in folder.iterdir()] == ["partial.json"]
    step = json.loads((folder / "partial.json").read_text())["checkpoint"]["state"]["step"]
    progress: list[int] = []
    result = train(Run(run.config), 2, lambda done, total: progress.append(done))
    assert progress[0] == step + 1
    assert f"continued after its optimizer step {step}" in result.notice
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", "part-0000.parquet"]
    assert not list((tmp_path / "tiny" / "policy" / "round=002").glob("checkpoint*"))
    got, expected = (r.records.read("updates", 2).to_pylist() for r in (run, finished))
    assert [row["loss"] for row in got] == pytest.approx([row["loss"] for row in expected], abs=1e-6)
    trained, alone = run.load_adapter(2), finished.load_adapter(2)
    for name, weight in alone.weights.items():
        torch.testing.assert_close(trained.weights[name], weight, atol=1e-5, rtol=0)


class Stop(Exception):
    """An interruption."""


def test_an_interrupted_stage_goes_on_from_its_checkpoint(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bits and metrics are those of an uninterrupted training, and finished steps are not done again."""
    run, folder = redo(finished, tmp_path, "train.checkpoint_steps=1")

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise Stop

    with pytest.raises(Stop):
        train(run, 2, stop)
    assert len(list((tmp_path / "tiny" / "policy" / "round=002").glob("checkpoint-000002-*.safetensors"))) == 2
    steps, real_step = [], Trainer.optimizer_step
    monkeypatch.setattr(Trainer, "optimizer_step", lambda self, items: steps.append(1) or real_step(self, items))
    train(Run(run.config), 2)
    before, after = (r.records.manifest("updates", 2) for r in (finished, run))
    assert len(steps) == before.metrics["steps"] - 2
    assert [f.sha256 for f in after.files] == [f.sha256 for f in before.files]
    assert {**after.metrics, "seconds": 0, "notice": ""} == {**before.metrics, "seconds": 0, "notice": ""}
    assert 0 <= after.metrics["padding"] < 1
    assert not list(tmp_path.rglob("checkpoint*"))
    assert not (folder / "partial.json").exists()


def test_a_damaged_checkpoint_is_not_used(finished: Run, tmp_path: Path) -> None:
    run, _ = redo(finished, tmp_path, "train.checkpoint_steps=1")

    def stop(done: int, total: int) -> None:
        raise Stop

    with pytest.raises(Stop):
        train(run, 2, stop)
    (file,) = (tmp_path / "tiny" / "policy" / "round=002").glob("checkpoint-*-weights.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    assert "continued" not in train(Run(run.config), 2).notice
    assert run.policy_hash(2) == finished.policy_hash(2)
    assert not list(tmp_path.rglob("checkpoint*"))


def test_fsdp_refuses_a_model_whose_layers_are_unknown(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy.body, "_no_split_modules", None)
    with pytest.raises(ModelError, match=r"does not say which modules are the layers .* set train.parallel = ddp"):
        KINDS["fsdp"](0, 1).place(policy)


@pytest.mark.parametrize(
    ("devices", "overrides", "expected"),
    [
        (0, ("train.parallel=ddp",), r"train.parallel = ddp on the CPU: set train.processes"),
        (4, ("train.parallel=fsdp", "train.processes=8"), r"processes = 8, but torch sees 4 CUDA devices: lower it"),
        (0, ("train.parallel=ddp", "train.processes=9"), r"9 processes .*batch_rollouts = 8.* 1 of them have no work"),
        (0, (), 1),
        (0, ("train.processes=2",), 1),
        (4, ("train.parallel=ddp",), 4),
        (4, ("train.parallel=ddp", "train.processes=8", "model.device=cpu"), 8),
    ],
)
def test_the_number_of_processes(
    monkeypatch: pytest.MonkeyPatch, devices: int, overrides: tuple[str, ...], expected: str | int
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    config = small_config("x", *overrides)
    if isinstance(expected, int):
        assert count_ranks(config) == expected
    else:
        with pytest.raises(ConfigError, match=expected):
            count_ranks(config)
