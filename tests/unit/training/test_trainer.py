"""The trainer: golden loss curve, saved optimizer state, learning-rate warm-up, order, chunks and dtypes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import REPO, random_items, small_config
from measured import peak_bytes
from safetensors.torch import load, save

from ogls.config import AdapterConfig, ModelConfig, TrainConfig
from ogls.distillation.exemplars import Context, ScoredRollout
from ogls.distillation.teacher import score_rollouts
from ogls.errors import ModelError, NonFiniteLoss
from ogls.models.policy import Policy
from ogls.stages.evaluate import _warning
from ogls.stages.registry import STAGES
from ogls.stages.run import Run
from ogls.stages.train import _warnings
from ogls.training.trainer import Trainer

GOLDEN = REPO / "tests" / "golden" / "loss_curve.json"
CONFIG = TrainConfig(learning_rate=1e-3, batch_rollouts=4, epochs=2, tail_weight=0.1)


@pytest.fixture
def fresh(policy: Policy):
    """The policy with its initial adapter."""
    policy.use_adapter(None)
    yield policy
    policy.use_adapter(None)


def test_the_loss_curve_is_golden(fresh: Policy) -> None:
    """Recorded losses and gradient norms of a short training. If they change, the results of every run change."""
    rows = Trainer(fresh, CONFIG).train_round(random_items(), seed=1)
    expected = json.loads(GOLDEN.read_text())
    assert [r["loss"] for r in rows] == pytest.approx(expected["loss"], rel=1e-3)
    assert [r["grad_norm"] for r in rows] == pytest.approx(expected["grad_norm"], rel=1e-2)
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_training_continues_exactly_from_a_saved_optimizer_state(fresh: Policy) -> None:
    """Two steps equal one step, save, load, and one more step, to the bit; without the state they differ."""
    items = random_items()
    start = fresh.copy_adapter()
    whole = Trainer(fresh, CONFIG)
    whole.optimizer_step(items[:6])
    middle, state = fresh.copy_adapter(), load(save(whole.state()))
    whole.optimizer_step(items[6:])
    expected = fresh.copy_adapter()
    fresh.use_adapter(middle)
    resumed = Trainer(fresh, CONFIG, state)
    assert resumed.step == 1
    row = resumed.optimizer_step(items[6:])
    assert row["step"] == 2
    assert fresh.copy_adapter().hash == expected.hash != middle.hash != start.hash
    without_state = Trainer(fresh, CONFIG)
    fresh.use_adapter(middle)
    without_state.optimizer_step(items[6:])
    assert fresh.copy_adapter().hash != expected.hash


def test_warm_up_is_linear_and_continues_across_rounds(fresh: Policy) -> None:
    config = CONFIG.model_copy(update={"warmup_steps": 5, "epochs": 1})
    first = Trainer(fresh, config)
    rates = [r["learning_rate"] for r in first.train_round(random_items(), seed=1)]
    rates += [r["learning_rate"] for r in Trainer(fresh, config, first.state()).train_round(random_items(), seed=2)]
    assert rates == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4, 1e-3, 1e-3])


def test_the_order_depends_on_the_seed(fresh: Policy) -> None:
    hashes = []
    for seed in (1, 1, 2):
        fresh.use_adapter(None)
        Trainer(fresh, CONFIG).train_round(random_items(), seed=seed)
        hashes.append(fresh.copy_adapter().hash)
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_non_finite_loss_names_its_rollout_and_changes_no_weight(fresh: Policy) -> None:
    items = random_items()
    items[2] = replace(items[2], logprobs=torch.full_like(items[2].logprobs, float("nan")))
    before = fresh.copy_adapter().hash
    with pytest.raises(NonFiniteLoss, match=r"\(p, 2\); nothing of this stage is saved"):
        Trainer(fresh, CONFIG).optimizer_step(items)
    assert fresh.copy_adapter().hash == before


def test_a_step_that_ends_in_an_error_leaves_no_gradient(fresh: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    items, config = random_items(), CONFIG.model_copy(update={"micro_batch_tokens": 64})
    Trainer(fresh, config).optimizer_step(items)
    expected = fresh.copy_adapter().hash
    fresh.use_adapter(None)
    run_body, calls = fresh.run_body, []

    def fail_at_the_second(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run_body(*arguments, **options)

    monkeypatch.setattr(fresh, "run_body", fail_at_the_second)
    with pytest.raises(torch.OutOfMemoryError):
        Trainer(fresh, config).optimizer_step(items)
    Trainer(fresh, config).optimizer_step(items)
    assert fresh.copy_adapter().hash == expected


@pytest.mark.parametrize("rollouts", [1, 5, 12, 100])
def test_every_item_is_trained_once_per_epoch(fresh: Policy, rollouts: int) -> None:
    items = random_items()
    reported: list[tuple[int, int]] = []
    trainer = Trainer(fresh, CONFIG.model_copy(update={"batch_rollouts": rollouts}))
    rows = trainer.train_round(items, 1, lambda done, total: reported.append((done, total)))
    for epoch in (0, 1):
        epoch_rows = [r for r in rows if r["epoch"] == epoch]
        assert sum(r["rollouts"] for r in epoch_rows) == 12
        assert sum(r["tokens"] for r in epoch_rows) == sum(i.trained for i in items)
    assert reported[-1] == (len(rows), len(rows))


@pytest.mark.parametrize("objective", ["distil", "full"])
def test_head_chunks_and_gradient_checkpointing_do_not_change_the_gradient(policy: Policy, objective: str) -> None:
    """The gradient equals that of all logits at once, with small chunks and with recomputed layers."""
    items = random_items()
    if objective == "full":
        generator = torch.Generator().manual_seed(1)
        size = policy.head.shape[1]
        items = [
            replace(i, ids=None, logprobs=None, tail_mass=None, state=torch.randn(i.trained, size, generator=generator))
            for i in items
        ]

    def gradient(**settings: object) -> tuple[float, list[torch.Tensor]]:
        policy.use_adapter(None)
        trainer = Trainer(policy, TrainConfig(tail_weight=0.1, max_grad_norm=1e9, **settings))
        trainer.optimizer.step = lambda: None
        gradients: list[torch.Tensor] = []
        trainer.optimizer.zero_grad = lambda **_: gradients.extend(
            policy.parameters[n].grad.clone() for n in trainer.names
        )
        loss = trainer.optimizer_step(items)["loss"]
        for n in trainer.names:
            policy.parameters[n].grad = None
        return loss, gradients

    whole = gradient(head_tokens=100_000)
    for settings in ({"head_tokens": 5}, {"head_tokens": 1}, {"gradient_checkpointing": True}):
        loss, grads = gradient(**settings)
        assert loss == pytest.approx(whole[0], abs=1e-6)
        for got, expected in zip(grads, whole[1], strict=True):
            torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-4)
    layers = [m for m in policy.body.modules() if hasattr(m, "gradient_checkpointing")]
    assert layers
    assert not any(m.training or m.gradient_checkpointing for m in layers)


def test_gradient_checkpointing_does_not_change_the_teacher_pass(fresh: Policy) -> None:
    """The same policy scores rollouts before and after a training with gradient checkpointing."""
    scored = [ScoredRollout(("p", 0), "correct", (7, 8, 9), ((Context("frozen", (4, 5, 6)), 1.0),), (1,))]
    before = score_rollouts(fresh, scored, 64)
    Trainer(fresh, CONFIG.model_copy(update={"gradient_checkpointing": True})).optimizer_step(random_items())
    fresh.use_adapter(None)
    after = score_rollouts(fresh, scored, 64)
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_small_updates_of_a_bfloat16_model_are_not_lost(kind: str) -> None:
    """The first step of AdamW changes a weight by the learning rate, which is lost if weights are bfloat16."""
    policy = Policy(ModelConfig(path=str(REPO / "data/tiny/model"), dtype="bfloat16"), AdapterConfig(kind=kind))
    before = policy.copy_adapter()
    Trainer(policy, CONFIG.model_copy(update={"learning_rate": 1e-6})).optimizer_step(random_items())
    after = policy.copy_adapter()
    moved = {n: ((w - before.weights[n]).abs() > 5e-7).float().mean() for n, w in after.weights.items()}
    trained = [share for name, share in moved.items() if "lora_A" not in name]  # A has no gradient while B is zero
    assert min(trained) > 0.6
    policy.use_adapter(None)
    assert policy.copy_adapter().hash == before.hash


def test_a_bfloat16_model_trains_fp32_adapters_without_fp32_activations() -> None:
    """LoRA weights are fp32, so small updates count; its products run and are saved for the backward pass in the dtype
    of the model."""
    updates, peaks = {}, {}
    for dtype in ("float32", "bfloat16"):
        policy = Policy(ModelConfig(path=str(REPO / "data/tiny/model"), dtype=dtype), AdapterConfig())
        assert {p.dtype for p in policy.parameters.values()} == {torch.float32}
        trainer = Trainer(policy, CONFIG)
        updates[dtype] = trainer.optimizer_step(random_items())
        peaks[dtype] = peak_bytes(lambda trainer=trainer: trainer.optimizer_step(random_items()))
        with torch.inference_mode():
            assert policy.run_body(torch.tensor([[4, 5]])).last_hidden_state.dtype == getattr(torch, dtype)
    exact, half = updates["float32"], updates["bfloat16"]
    assert half["loss"] == pytest.approx(exact["loss"], rel=0.02)
    assert half["grad_norm"] == pytest.approx(exact["grad_norm"], rel=0.05)
    assert peaks["bfloat16"] < 0.75 * peaks["float32"]


def test_rollouts_are_spread_evenly_over_the_steps(fresh: Policy) -> None:
    """AdamW takes a full step for any number of rollouts: 65 of them are 33 and 32, and not 64 and 1."""
    items = [replace(item, key=("p", i)) for i, item in enumerate(random_items(65))]
    rows = Trainer(fresh, TrainConfig(batch_rollouts=64, learning_rate=1e-6)).train_round(items, 0)
    assert [row["rollouts"] for row in rows] == [33, 32]
    assert Trainer(fresh, TrainConfig()).train_round([], 0) == []


def test_float16_cannot_be_trained(tmp_path: Path) -> None:
    half = Policy(ModelConfig(path=str(REPO / "data/tiny/model"), dtype="float16"), AdapterConfig(rank=4))
    with pytest.raises(ModelError, match=r"model\.dtype = float16 cannot be trained"):
        Trainer(half, CONFIG)
    with pytest.raises(ModelError, match=r"model\.dtype = float16 cannot be trained"):
        STAGES["prepare"](Run(small_config(tmp_path, "model.dtype=float16")), 0)


@pytest.mark.parametrize(("dtype", "temperature"), [("float32", 0.6), ("bfloat16", 1.0)])
def test_the_first_ratio_of_grpo_is_one_at_every_temperature(dtype: str, temperature: float) -> None:
    """The log-probs are of the distribution that was sampled from, and from the same code as those in the loss."""
    policy = Policy(ModelConfig(path=str(REPO / "data/tiny/model"), dtype=dtype), AdapterConfig(rank=4))
    items = []
    for item in random_items():
        recorded = torch.full((item.trained,), -2.0)  # as another engine would round them, only more
        fields = {"ids": None, "logprobs": None, "tail_mass": None, "weights": None, "tail": 0}
        items.append(replace(item, **fields, old_logprobs=recorded, advantage=1.0))
    trainer = Trainer(policy, TrainConfig(objective="grpo", learning_rate=1e-6), temperature=temperature)
    own = trainer.with_own_logprobs(items)
    assert trainer.optimizer_step(own)["loss"] == pytest.approx(-1.0, abs=2e-3 if dtype == "bfloat16" else 1e-5)
    item = own[0]
    ids = torch.tensor([[*item.prompt_ids, *item.token_ids]])
    policy.use_adapter(None)
    states = policy.run_body(ids).last_hidden_state[0, len(item.prompt_ids) - 1 : -1]
    logprobs = (policy.logits(states) / temperature).log_softmax(-1)
    expected = logprobs.gather(-1, torch.tensor(item.token_ids)[:, None])[:, 0]
    assert item.old_logprobs is not None
    torch.testing.assert_close(item.old_logprobs, expected, atol=5e-2 if dtype == "bfloat16" else 1e-4, rtol=0)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.objective=grpo", "rollout.top_p=0.9"], "its gradient is biased"),
        (["train.objective=grpo", "rollout.temperature=0.8"], ""),
        (["rollout.top_k=50"], ""),  # distillation needs no ratio
    ],
)
def test_settings_that_bias_the_policy_gradient_are_reported(overrides: list[str], expected: str) -> None:
    assert expected in " ".join(_warnings(small_config("x", *overrides)))
    assert bool(expected) == bool(list(_warnings(small_config("x", *overrides))))


def test_entropy_and_kl_at_another_temperature_are_reported_once() -> None:
    assert _warning(small_config("x").evaluate) == ""
    warning = _warning(small_config("x", "evaluate.temperature=0.6").evaluate)
    assert "no estimates of the policy's entropy and KL" in warning
