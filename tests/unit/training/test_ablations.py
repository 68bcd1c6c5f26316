"""Each setting of the target and the loss changes what its description says, and nothing else.

test_teacher and test_stages test exemplar limits, the token limit, anchors and teacher weights; test_losses tests
divergences and supports.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import carry_out, small_config

from ogls.config import SteerConfig, TrainConfig
from ogls.distillation.steering import steer_tokens
from ogls.stages import columns
from ogls.stages.registry import STAGES
from ogls.stages.run import Run
from ogls.training.choose import find_loss
from ogls.training.contract import LossInputs
from ogls.training.items import distillation_items
from ogls.training.trainer import Trainer


def random_inputs(k: int = 4) -> tuple[LossInputs, torch.Tensor, torch.Tensor]:
    """Stored targets on a support of k tokens, and the full teacher and student logits that they come from."""
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(8, 12, generator=generator).mul(2) for _ in range(2))
    top = teacher.log_softmax(-1).topk(k)
    tail = 1 - top.values.exp().sum(-1)
    token_ids = torch.zeros(8, dtype=torch.long)
    return LossInputs(student, torch.eye(12), token_ids, top.indices, top.values, tail), teacher, student


def distillation(inputs: LossInputs, kind: str, **settings: Any) -> torch.Tensor:
    """The divergence of every token with these settings."""
    config = TrainConfig(divergence=kind, **settings)
    return find_loss(config)(replace(inputs, settings=config)).loss


def test_target_temperature_divides_the_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    states = {p: torch.randn(5, 8, generator=generator) for p in ("base", "correct", "incorrect")}
    head = torch.randn(20, 8, generator=generator)
    recipe, ids = SteerConfig().to_recipe(), torch.zeros(5, dtype=torch.long)
    plain, sharp = (steer_tokens(states, ids, recipe, head, 20, temperature=t) for t in (1.0, 0.5))

    def dense(target) -> torch.Tensor:
        return torch.zeros(5, 20).scatter(1, target.ids, target.target_logprobs)

    torch.testing.assert_close(dense(sharp), (dense(plain) / 0.5).log_softmax(-1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(sharp.token_base_logprob, plain.token_base_logprob)


def test_without_the_tail_bucket_only_the_support_is_compared() -> None:
    inputs, teacher, student = random_inputs()
    p = teacher.gather(1, inputs.target_ids).log_softmax(-1)
    q = student.gather(1, inputs.target_ids).log_softmax(-1)
    expected = (p.exp() * (p - q)).sum(-1)
    got = distillation(inputs, "forward_kl", tail_bucket=False)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(got, distillation(inputs, "forward_kl"), atol=1e-2)


def test_the_token_clip_limits_a_token_after_the_sum() -> None:
    inputs, _, _ = random_inputs()
    whole = distillation(inputs, "reverse_kl")
    limit = whole.median().item()
    got = distillation(inputs, "reverse_kl", token_clip=limit)
    assert torch.equal(got, whole.clamp(max=limit))
    assert 0 < (got < whole).sum() < len(whole)


def test_the_pointwise_clip_limits_every_term_and_reverses_gradients() -> None:
    """The clip of OPSD by its definition. The clipped term of a token that the target prefers has no gradient, while
    raising that token raises the other terms: the gradient lowers the preferred token."""
    target = torch.tensor([[0.9, 0.1]]).log()
    logits = torch.tensor([[-2.0, 2.0]], requires_grad=True)
    inputs = LossInputs(logits, torch.eye(2), torch.zeros(1, dtype=torch.long), target_logprobs=target)
    got = distillation(inputs, "forward_kl", pointwise_clip=0.05)
    q = logits.log_softmax(-1)[0]
    terms = [0.9 * (target[0, 0] - q[0]), 0.1 * (target[0, 1] - q[1])]
    assert got.item() == pytest.approx(min(terms[0].item(), 0.05) + min(terms[1].item(), 0.05))
    (clipped_gradient,) = torch.autograd.grad(got.sum(), logits)
    (exact_gradient,) = torch.autograd.grad(distillation(inputs, "forward_kl").sum(), logits)
    assert exact_gradient[0, 0] < 0 < clipped_gradient[0, 0]


def test_the_pointwise_clip_logs_a_warning(finished: Run, tmp_path) -> None:
    config = small_config(tmp_path, "train.pointwise_clip=0.05", "train.divergence=forward_kl")
    run = Run(config)
    run.records.open(config)
    STAGES["prepare"](run, 0)
    notices = [STAGES[name](run, 1).notice for name in ("sample", "verify", "teach", "steer", "train")]
    assert "removes the gradient of clipped terms; use it for reproduction only" in notices[-1]


@pytest.mark.parametrize(("weights", "column"), [("kl", "kl"), ("direction", "direction_norm"), ("uniform", None)])
def test_the_loss_is_a_mean_with_token_weights(finished: Run, weights: str, column: str | None) -> None:
    """The token loss of a step is sum(w l) / sum(w), with w from the table targets."""
    config = small_config("x", f"train.token_weights={weights}")
    groups = columns.to_rollouts(finished.records.read("trajectories", 1), finished.records.read("verdicts", 1))
    targets = finished.records.read("targets", 1)
    items = distillation_items(groups, targets, None, config.train)
    policy = finished.load_policy(0)
    trainer = Trainer(policy, config.train)
    by_key = {i.key: i for i in items}
    table = targets.to_pandas()
    total = weight = 0.0
    from ogls.training.batching import collate

    for (problem, sample), rows in table.groupby(["problem_id", "sample"], sort=False):
        batch = collate([by_key[problem, int(sample)]])
        with torch.no_grad():
            states = policy.run_body(batch.ids, batch.mask).last_hidden_state[batch.row, batch.position]
            losses = trainer.token_losses(batch, slice(0, len(states)), states).loss
        w = torch.tensor(rows[column].to_numpy()) if column else torch.ones(len(rows))
        total, weight = total + float((losses * w).sum()), weight + float(w.sum())
    assert trainer.optimizer_step(items)["token_loss"] == pytest.approx(total / weight, rel=1e-4)


@pytest.mark.nightly
def test_settings_of_target_and_loss_change_the_adapter(tmp_path) -> None:
    """Each of these settings trains a different adapter."""
    plain = carry_out(small_config(tmp_path), rounds=1).policy_hash(1)
    overrides = ["steer.temperature=0.5", "train.token_weights=kl", "train.token_clip=0.01", "steer.support=2"]
    hashes = {
        carry_out(small_config(tmp_path, f"name=a{i}", o), rounds=1).policy_hash(1) for i, o in enumerate(overrides)
    }
    assert len(hashes | {plain}) == len(overrides) + 1
