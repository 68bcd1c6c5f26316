"""The training round: a pinned loss curve, optimizer state that survives, learning-rate warm-up."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from conftest import REPO, random_items
from measured import peak_bytes
from safetensors.torch import load, save

from ogls.config import AdapterConfig, ModelConfig, TrainConfig
from ogls.distillation.exemplars import Context, ScoredRollout
from ogls.distillation.teacher import score_rollouts
from ogls.errors import NonFiniteLoss
from ogls.models.policy import Policy
from ogls.training.trainer import Trainer

GOLDEN = REPO / "tests" / "golden" / "loss_curve.json"
CONFIG = TrainConfig(learning_rate=1e-3, batch_rollouts=4, epochs=2, tail_weight=0.1)


@pytest.fixture
def fresh(policy: Policy):
    policy.use_adapter(None)
    yield policy
    policy.use_adapter(None)


def test_the_loss_curve_is_golden(fresh: Policy) -> None:
    """Pinned numbers of a short training: a change here is a change of what every run computes."""
    rows = Trainer(fresh, CONFIG).train_round(random_items(), seed=1)
    wanted = json.loads(GOLDEN.read_text())
    assert [r["loss"] for r in rows] == pytest.approx(wanted["loss"], rel=1e-3)
    assert [r["grad_norm"] for r in rows] == pytest.approx(wanted["grad_norm"], rel=1e-2)
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_optimizer_state_survives_being_saved(fresh: Policy) -> None:
    """Two steps in one trainer equal one step, save, load, one step: bit for bit."""
    items = random_items()
    start = fresh.copy_adapter()
    whole = Trainer(fresh, CONFIG)
    whole.optimizer_step(items[:6])
    middle, state = fresh.copy_adapter(), load(save(whole.state()))
    whole.optimizer_step(items[6:])
    wanted = fresh.copy_adapter()
    fresh.use_adapter(middle)
    resumed = Trainer(fresh, CONFIG, state)
    assert resumed.step == 1
    row = resumed.optimizer_step(items[6:])
    assert row["step"] == 2
    assert fresh.copy_adapter().hash == wanted.hash != middle.hash != start.hash
    forgetful = Trainer(fresh, CONFIG)
    fresh.use_adapter(middle)
    forgetful.optimizer_step(items[6:])
    assert fresh.copy_adapter().hash != wanted.hash


def test_warm_up_is_linear_and_goes_on_across_rounds(fresh: Policy) -> None:
    config = CONFIG.model_copy(update={"warmup_steps": 5, "epochs": 1})
    first = Trainer(fresh, config)
    rates = [r["learning_rate"] for r in first.train_round(random_items(), seed=1)]
    rates += [r["learning_rate"] for r in Trainer(fresh, config, first.state()).train_round(random_items(), seed=2)]
    assert rates == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4, 1e-3, 1e-3])


def test_the_order_is_seeded(fresh: Policy) -> None:
    hashes = []
    for seed in (1, 1, 2):
        fresh.use_adapter(None)
        Trainer(fresh, CONFIG).train_round(random_items(), seed=seed)
        hashes.append(fresh.copy_adapter().hash)
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_non_finite_tail_names_its_rollout_and_changes_no_weight(fresh: Policy) -> None:
    items = random_items()
    items[2] = replace(items[2], logprobs=torch.full_like(items[2].logprobs, float("nan")))
    before = fresh.copy_adapter().hash
    with pytest.raises(NonFiniteLoss, match=r"\(p, 2\); nothing of this stage is saved"):
        Trainer(fresh, CONFIG).optimizer_step(items)
    assert fresh.copy_adapter().hash == before


@pytest.mark.parametrize("rollouts", [1, 5, 12, 100])
def test_every_item_is_seen_once_an_epoch(fresh: Policy, rollouts: int) -> None:
    items = random_items()
    seen: list[tuple[int, int]] = []
    trainer = Trainer(fresh, CONFIG.model_copy(update={"batch_rollouts": rollouts}))
    rows = trainer.train_round(items, 1, lambda done, total: seen.append((done, total)))
    for epoch in (0, 1):
        part = [r for r in rows if r["epoch"] == epoch]
        assert sum(r["rollouts"] for r in part) == 12
        assert sum(r["tokens"] for r in part) == sum(i.trained for i in items)
    assert seen[-1] == (len(rows), len(rows))


@pytest.mark.parametrize("objective", ["distil", "full"])
def test_chunks_of_the_head_and_checkpoints_change_nothing(policy: Policy, objective: str) -> None:
    """The gradient is that of all logits at once, however few are alive; and of layers that are run again."""
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
        kept: list[torch.Tensor] = []
        trainer.optimizer.zero_grad = lambda **_: kept.extend(policy.parameters[n].grad.clone() for n in trainer.names)
        loss = trainer.optimizer_step(items)["loss"]
        for n in trainer.names:
            policy.parameters[n].grad = None
        return loss, kept

    whole = gradient(head_tokens=100_000)
    for settings in ({"head_tokens": 5}, {"head_tokens": 1}, {"gradient_checkpointing": True}):
        loss, grads = gradient(**settings)
        assert loss == pytest.approx(whole[0], abs=1e-6)
        for got, wanted in zip(grads, whole[1], strict=True):
            torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-4)
    layers = [m for m in policy.body.modules() if hasattr(m, "gradient_checkpointing")]
    assert layers
    assert not any(m.training or m.gradient_checkpointing for m in layers)


def test_a_checkpointed_policy_teaches_as_before(fresh: Policy) -> None:
    """Right after its training, and within the same process."""
    scored = [ScoredRollout(("p", 0), "correct", (7, 8, 9), ((Context("teacher", (4, 5, 6)), 1.0),), (1,))]
    before = score_rollouts(fresh, scored, 64)
    Trainer(fresh, CONFIG.model_copy(update={"gradient_checkpointing": True})).optimizer_step(random_items())
    fresh.use_adapter(None)
    after = score_rollouts(fresh, scored, 64)
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_small_updates_of_a_bfloat16_model_count(kind: str) -> None:
    """AdamW's first step moves a weight by the rate, which bfloat16 would round away."""
    policy = Policy(ModelConfig(path=str(REPO / "data/tiny/model"), dtype="bfloat16"), AdapterConfig(kind=kind))
    before = policy.copy_adapter()
    Trainer(policy, CONFIG.model_copy(update={"learning_rate": 1e-6})).optimizer_step(random_items())
    after = policy.copy_adapter()
    moved = {n: ((w - before.weights[n]).abs() > 5e-7).float().mean() for n, w in after.weights.items()}
    trained = [share for name, share in moved.items() if "lora_A" not in name]  # A has no gradient while B is zero
    assert min(trained) > 0.6
    policy.use_adapter(None)
    assert policy.copy_adapter().hash == before.hash


def test_a_bfloat16_model_trains_fp32_adapters_and_keeps_no_fp32_copies() -> None:
    """LoRA's small updates count in fp32; its products run, and are kept for the backward pass, in the model's type."""
    found, peaks = {}, {}
    for dtype in ("float32", "bfloat16"):
        policy = Policy(ModelConfig(path=str(REPO / "data/tiny/model"), dtype=dtype), AdapterConfig())
        assert {p.dtype for p in policy.parameters.values()} == {torch.float32}
        trainer = Trainer(policy, CONFIG)
        found[dtype] = trainer.optimizer_step(random_items())
        peaks[dtype] = peak_bytes(lambda trainer=trainer: trainer.optimizer_step(random_items()))
        with torch.inference_mode():
            assert policy.run_body(torch.tensor([[4, 5]])).last_hidden_state.dtype == getattr(torch, dtype)
    exact, half = found["float32"], found["bfloat16"]
    assert half["loss"] == pytest.approx(exact["loss"], rel=0.02)
    assert half["grad_norm"] == pytest.approx(exact["grad_norm"], rel=0.05)
    assert peaks["bfloat16"] < 0.75 * peaks["float32"]
