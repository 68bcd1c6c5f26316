"""The contract of losses: the registry, what a loss returns, a user's own loss, and its metrics on their way."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from conftest import carry_out, random_items, small_config

from ogls.config import TrainConfig
from ogls.errors import ConfigError, StoreError
from ogls.models.policy import Policy
from ogls.stages.registry import STAGES
from ogls.stages.run import Run
from ogls.stages.train import _ITEMS
from ogls.store import run_query
from ogls.training.choose import find_loss, try_loss
from ogls.training.contract import LOSSES, Loss, LossInputs, LossOutput, Needs, register
from ogls.training.means import MetricMeans, round_means
from ogls.training.trainer import Trainer

HEAD = torch.eye(7)
MINE = """
import torch
from ogls.models.head import nll
from ogls.training.contract import LossInputs, LossOutput
from ogls.training.losses import target_and_student

def forward(inputs):
    target, student = target_and_student(inputs)
    loss = (target.exp() * (target - student)).sum(-1)
    return LossOutput(loss, {"mine": loss.detach(), "twos": torch.tensor(2.0)})

def likelihood(inputs):
    assert inputs.target_logprobs is inputs.old_logprobs is None
    return LossOutput(nll(inputs.states, inputs.head, inputs.token_ids), {"mine": torch.ones(len(inputs.states))})

def surrogate(inputs):
    logprobs = -nll(inputs.states, inputs.head, inputs.token_ids)
    return LossOutput(-(logprobs - inputs.old_logprobs).exp() * inputs.advantages)

def mean(inputs): return LossOutput(forward(inputs).loss.mean())
def number(inputs): return 1.0
def constant(inputs): return LossOutput(torch.ones(len(inputs.states)))
def infinite(inputs): return LossOutput(forward(inputs).loss * float("inf"))
def squeezed(inputs): return LossOutput(forward(inputs).loss.squeeze())
def misnamed(inputs): return LossOutput(forward(inputs).loss, {"loss": torch.tensor(1.0)})
nothing = None
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The name of a module of losses; each test has its own, because a module is imported once."""
    name = f"losses_{abs(hash(request.node.nodeid))}"
    (tmp_path / f"{name}.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_the_registry_has_the_losses_of_the_settings() -> None:
    fields = TrainConfig.model_fields
    named = {*get_args(fields["divergence"].annotation), *get_args(fields["objective"].annotation)} - {"distil"}
    assert set(LOSSES) == named
    divergences = {name for name, loss in LOSSES.items() if loss.needs == "targets"}
    assert divergences == set(get_args(fields["divergence"].annotation))
    for name in named:
        assert name in (fields["divergence"].description or "") + (fields["objective"].description or "")
    assert set(_ITEMS) == set(get_args(Needs)) == {loss.needs for loss in LOSSES.values()}
    with pytest.raises(ValueError, match="a loss jsd is registered already"):
        register("jsd", "targets")(lambda inputs: LossOutput(inputs.states[:, 0]))


@pytest.mark.parametrize(
    ("metrics", "error"),
    [
        ({"loss": torch.tensor(1.0)}, "metric 'loss': a name has .* and is none of groups, loss"),
        ({"a b": torch.tensor(1.0)}, "metric 'a b': a name has letters"),
        ({"a": torch.ones(3)}, r"metric a has the shape \[3\], and the loss \[2\]: give one value per token"),
    ],
)
def test_metrics_that_cannot_be_recorded_are_refused(metrics: dict[str, torch.Tensor], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        LossOutput(torch.ones(2), metrics)


def test_metrics_are_means_over_tokens_and_steps() -> None:
    means = MetricMeans()
    assert means.to_column() is None
    means.add(LossOutput(torch.ones(3), {"b": torch.tensor([1.0, 2.0, 3.0]), "a": torch.tensor(1.0)}))
    means.add(LossOutput(torch.ones(1), {"b": torch.tensor([6.0]), "a": torch.tensor(5.0)}))
    means.add(LossOutput(torch.ones(2), {"c": torch.tensor([float("nan"), 1.0])}))
    means.add(LossOutput(torch.ones(2)))
    assert means.to_column() == [("a", 2.0), ("b", 3.0), ("c", None)]
    rows: list[dict[str, Any]] = [{"metrics": means.to_column()}, {"metrics": None}, {"metrics": [("a", 4.0)]}]
    assert round_means(rows) == {"a": 3.0, "b": 3.0}


def test_metrics_and_loss_do_not_depend_on_the_split(policy: Policy) -> None:
    rows = []
    for settings in ({}, {"head_tokens": 3}, {"micro_batch_tokens": 30}):
        policy.use_adapter(None)
        config = TrainConfig(token_clip=4.0, pointwise_clip=0.3, learning_rate=1e-6, **settings)
        rows.append(Trainer(policy, config).optimizer_step(random_items()))
    whole = dict(rows[0]["metrics"])
    assert sorted(whole) == ["agreement", "clipped_terms", "clipped_tokens"]
    assert 0 < whole["clipped_terms"] < 1
    for row in rows[1:]:
        assert dict(row["metrics"]) == pytest.approx(whole)
        assert row["loss"] == pytest.approx(rows[0]["loss"], rel=1e-5)
    policy.use_adapter(None)


def test_a_loss_is_called_with_its_clip_and_checked() -> None:
    inputs = LossInputs(torch.ones(3, 7), HEAD, torch.zeros(3, dtype=torch.long), settings=TrainConfig(token_clip=2.0))
    values = torch.tensor([1.0, 2.0, 3.0])
    distilled = Loss("x", "targets", lambda _: LossOutput(values))(inputs)
    assert distilled.loss.tolist() == [1, 2, 2]
    assert distilled.metrics["clipped_tokens"].tolist() == [0, 0, 1]
    assert Loss("x", "advantages", lambda _: LossOutput(values))(inputs).loss is values
    with pytest.raises(ValueError, match=r"x returned a loss of shape \[\], expected one value per token, \[3\]"):
        Loss("x", "targets", lambda _: LossOutput(values.sum()))(inputs)


@pytest.mark.parametrize(
    ("function", "objective", "error"),
    [
        ("forward", "grpo", "of train.objective = grpo: ValueError: the inputs have no target"),
        ("surrogate", "distil", "of train.objective = distil: TypeError"),
        ("mean", "distil", r"ValueError: .*:mean returned a loss of shape \[\], expected one value per token, \[5\]"),
        ("squeezed", "distil", r"for 1 random tokens .* returned a loss of shape \[\]"),
        ("number", "sft", "TypeError: .*:number returned float, expected LossOutput"),
        ("misnamed", "distil", "metric 'loss'"),
        ("constant", "rft", "has no gradient"),
        ("infinite", "distil", "is not finite"),
        ("nothing", "distil", r"train\.loss: losses_\d+:nothing is None, not a function"),
        ("missing", "distil", r"train\.loss: cannot load losses_\d+:missing: module .* has no attribute 'missing'"),
    ],
)
def test_a_wrong_loss_is_refused_in_a_trial(mine: str, function: str, objective: str, error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        try_loss(TrainConfig(loss=f"{mine}:{function}", objective=objective), HEAD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("function", "settings"),
    [
        ("forward", {}),
        ("forward", {"support": "full"}),
        ("surrogate", {"objective": "grpo"}),
        ("likelihood", {"objective": "sft"}),
    ],
)
def test_a_right_loss_passes_the_trial(mine: str, function: str, settings: dict, dtype: torch.dtype) -> None:
    try_loss(TrainConfig(loss=f"{mine}:{function}", **settings), HEAD.to(dtype))


def test_the_pointwise_clip_needs_the_terms_of_a_divergence(mine: str) -> None:
    config = {"loss": f"{mine}:forward", "pointwise_clip": 0.05}
    with pytest.raises(ConfigError, match=r"pointwise_clip: .*:forward has one value per token, and none per bin"):
        find_loss(TrainConfig(**config))
    find_loss(TrainConfig(**config, objective="rft"))  # it has no divergence


def test_the_loss_of_a_user_trains_the_run_and_identifies_it(mine: str, tmp_path: Path) -> None:
    """The user's forward KL trains the same adapter as the registered one; another file under its name is refused."""
    plain = carry_out(small_config(tmp_path / "plain", "train.divergence=forward_kl"), rounds=1)
    config = small_config(tmp_path / "mine", f"train.loss={mine}:forward")
    run = carry_out(config, rounds=1)
    assert run.policy_hash(1) == plain.policy_hash(1)
    assert run.digest("updates", 1) != plain.digest("updates", 1)
    rows = run.records.read("updates", 1).to_pylist()
    for row in rows:
        assert dict(row["metrics"]) == pytest.approx({"mine": row["token_loss"], "twos": 2.0})
    manifest = run.records.manifest("updates", 1)
    assert manifest
    mean = sum(row["token_loss"] for row in rows) / len(rows)
    assert manifest.metrics["loss_metrics"] == pytest.approx({"mine": mean, "twos": 2.0})
    answer = run_query(run.store, "SELECT avg(metrics['mine']) AS mine FROM updates").to_pylist()
    assert math.isclose(answer[0]["mine"], mean, rel_tol=1e-6)
    assert STAGES["train"](Run(config), 1).reused
    (tmp_path / f"{mine}.py").write_text(MINE + "\n# changed\n")
    with pytest.raises(StoreError, match=rf"train\.loss: '{mine}:forward@\w+' -> '{mine}:forward@\w+'"):
        Run(config).open()
    (tmp_path / f"{mine}.py").unlink()
    assert STAGES["train"](Run(config), 1).reused  # what is finished needs no module


@pytest.mark.nightly
def test_the_loss_of_a_user_on_tokens_alone(mine: str, tmp_path: Path) -> None:
    plain = carry_out(small_config(tmp_path / "plain", "train.objective=rft"), rounds=1)
    run = carry_out(small_config(tmp_path / "mine", "train.objective=rft", f"train.loss={mine}:likelihood"), rounds=1)
    assert run.policy_hash(1) == plain.policy_hash(1)
    assert all(row["metrics"] == [("mine", 1.0)] for row in run.records.read("updates", 1).to_pylist())
