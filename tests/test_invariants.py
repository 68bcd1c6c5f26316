"""The invariants of the method (DESIGN section 5), one or more tests for each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import random_items, small_config

import ogls.stages.train as train_stage
from ogls.config import AdapterConfig, ModelConfig, Recipe, SteerConfig, TrainConfig
from ogls.distillation import exemplars, teacher
from ogls.distillation.steering import steer_tokens
from ogls.errors import NonFiniteLoss
from ogls.models.continuation import run_continuations
from ogls.models.head import binned_logprobs
from ogls.models.policy import Policy
from ogls.problems.prompts import Prompter
from ogls.records import Problem, Rollout
from ogls.stages.registry import STAGES
from ogls.stages.run import Run
from ogls.training.batching import TrainItem, collate
from ogls.training.losses import divergence, target_bins
from ogls.training.trainer import Trainer

POOLS = ("base", "reference", "correct", "incorrect", "own")
# One pool of every kind, in words of its own, with every choice of exemplars.
DECLARED = """teacher.pools=[
    {name = "careful", template = "Be careful. {problem}", weights = "frozen"},
    {name = "solved", reads = "reference"},
    {name = "short", reads = "correct", choose = "shortest", max_exemplars = 1},
    {name = "near", reads = "correct", choose = "nearest", max_exemplars = 2},
    {name = "long", reads = "incorrect", choose = "longest", max_exemplars = 1},
    {name = "told", reads = "feedback"},
    {name = "hinted", reads = "hint", template = "{problem} {exemplar}"},
]"""
both_declarations = pytest.mark.parametrize(
    "declared", ['teacher.pools=["reference"]', DECLARED], ids=["default", "own"]
)


def random_states(tokens: int = 6, dim: int = 16, seed: int = 0) -> dict:
    """Random states [tokens, dim] of all pools."""
    generator = torch.Generator().manual_seed(seed)
    return {pool: torch.randn(tokens, dim, generator=generator) for pool in POOLS}


@pytest.fixture
def head() -> torch.Tensor:
    return torch.randn(50, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def group(policy: Policy, prompter: Prompter) -> tuple[Problem, list[Rollout]]:
    """A problem with three correct and three failed rollouts of different lengths."""
    text, solution = r"Modulo 10, left to right: $3+4\times2$", "3+4=7\n7\\times2=4\n\\boxed{4}"
    problem = Problem("p", text, "4", solution, columns={"hint": "Add first."})
    texts = {
        "correct": ["3+4=7\n7\\times2=4\n\\boxed{4}", "\\boxed{4}", "7\\times2=4\n\\boxed{4}"],
        "failed": ["3+4=8\n8\\times2=6\n\\boxed{6}", "3+4=7\n\\boxed{7}", "\\boxed{1}"],
    }
    prompt, rollouts = tuple(prompter.student(problem.problem)), []
    for outcome, completions in texts.items():
        for text in completions:
            ids = (*prompter.tokenizer(text)["input_ids"], policy.stop_ids[0])
            feedback = "Its last digit is wrong." if outcome == "failed" else ""
            rollouts.append(Rollout("p", len(rollouts), prompt, ids, text, outcome, feedback=feedback))
    return problem, rollouts


def plan_and_score(policy: Policy, prompter: Prompter, group: tuple, config, batch_tokens: int = 4096):
    """The plan of the teacher pass for a group, and its averaged states by key and pool."""
    planner = exemplars.ContextPlanner(config, prompter, policy.context)
    plan = planner.group(*group)
    return plan, teacher.score_rollouts(policy, plan.scored, batch_tokens)


def test_with_lambda_zero_the_target_is_the_base(head: torch.Tensor) -> None:
    recipe = SteerConfig(recipe="ogls-sd", strength=0.0).to_recipe()
    target = steer_tokens(random_states(), torch.zeros(6, dtype=torch.long), recipe, head, 50)
    assert torch.equal(target.target_logprobs, target.base_logprobs)
    assert target.kl.abs().max() == 0


def test_with_equal_pools_the_target_is_the_base(head: torch.Tensor) -> None:
    states = random_states()
    states["incorrect"] = states["correct"]
    recipe = SteerConfig(recipe="ogls-sd", strength=2.0).to_recipe()
    target = steer_tokens(states, torch.zeros(6, dtype=torch.long), recipe, head, 50)
    torch.testing.assert_close(target.target_logprobs, target.base_logprobs, atol=1e-5, rtol=0)
    assert target.direction_norm.max() == 0


@pytest.mark.parametrize(
    ("kind", "dtype", "bound"),
    [
        ("forward_kl", "float32", 1e-6),
        ("reverse_kl", "float32", 1e-6),
        ("jsd", "float32", 1e-6),
        ("reverse_kl", "bfloat16", 3e-6),  # the states of teacher and student are rounded differently
    ],
)
def test_a_teacher_equal_to_the_student_has_no_loss(tmp_path: Path, kind: str, dtype: str, bound: float) -> None:
    """The recipe `none` through the real stages: the loss of the first step is below 1e-6."""
    settings = ("steer.recipe=none", "teacher.state_dtype=float32", "train.support=full", f"model.dtype={dtype}")
    config = small_config(tmp_path, *settings, f"train.divergence={kind}")
    run = Run(config)
    run.records.open(config)
    STAGES["prepare"](run, 0)
    for name in ("sample", "verify", "teach", "steer", "train"):
        STAGES[name](run, 1)
    first = run.records.read("updates", 1).to_pylist()[0]
    assert first["tokens"] > 100
    assert abs(first["token_loss"]) < bound


@pytest.mark.parametrize("pool", POOLS)
def test_a_constant_added_to_the_logits_of_a_pool_does_not_change_the_target(head: torch.Tensor, pool: str) -> None:
    """The last column of the head is constant, so the last element of a state adds a constant to all logits."""
    head = torch.cat([head, torch.ones(50, 1)], dim=1)
    states = {p: torch.cat([s, torch.zeros(6, 1)], dim=1) for p, s in random_states().items()}
    recipe = Recipe.model_validate({"base": 0.5, "reference": 0.3, "correct": 0.7, "incorrect": -0.7, "own": 0.2})
    ids = torch.zeros(6, dtype=torch.long)
    before = steer_tokens(states, ids, recipe, head, 10)
    states[pool] = states[pool] + torch.cat([torch.zeros(16), torch.tensor([3.0])])
    after = steer_tokens(states, ids, recipe, head, 10)
    assert torch.equal(before.ids, after.ids)
    for name in ("target_logprobs", "base_logprobs", "tail_mass", "direction_norm", "kl"):
        torch.testing.assert_close(getattr(before, name), getattr(after, name), atol=1e-5, rtol=1e-5)


@both_declarations
def test_permuting_a_group_does_not_change_the_states(
    policy: Policy, prompter: Prompter, group: tuple, tmp_path: Path, declared: str
) -> None:
    """The number of exemplars is limited, so the selection of exemplars must not depend on the order either."""
    config = small_config(tmp_path, "teacher.max_exemplars=2", declared)
    problem, rollouts = group
    _, before = plan_and_score(policy, prompter, group, config)
    order = [4, 2, 0, 5, 1, 3]
    shuffled = [replace(rollouts[old], sample=new) for new, old in enumerate(order)]
    _, after = plan_and_score(policy, prompter, (problem, shuffled), config)
    for new, old in enumerate(order):
        for pool in config.pools():
            if pool == "told" and old < 3:  # a correct rollout has no feedback
                continue
            torch.testing.assert_close(before[("p", old), pool], after[("p", new), pool], atol=1e-5, rtol=1e-5)


@both_declarations
def test_the_head_of_mean_states_equals_the_mean_of_logits(
    policy: Policy, prompter: Prompter, group: tuple, tmp_path: Path, declared: str
) -> None:
    """head(mean of states) equals the mean of the logits of full sequences, to 1e-5 in fp32."""
    config = small_config(tmp_path, declared)
    plan, states = plan_and_score(policy, prompter, group, config)
    assert {item.pool for item in plan.scored} == set(config.pools())
    for item in plan.scored:
        weighted_logits = []
        for context, share in item.shares:
            ids = torch.tensor([[*context.prompt_ids, *item.token_ids]])
            with torch.no_grad():
                logits = policy.model(input_ids=ids).logits[0, len(context.prompt_ids) - 1 : -1]
            weighted_logits.append(share * logits)
        got = policy.logits(states[item.key, item.pool])
        torch.testing.assert_close(got, torch.stack(weighted_logits).sum(0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 100, 4096])
def test_continuations_of_a_shared_prefix_equal_full_sequences(policy: Policy, batch_tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    prefixes = [torch.randint(3, 320, (n,), generator=generator).tolist() for n in (5, 9, 12)]
    pairs = [
        (i, torch.randint(3, 320, (n,), generator=generator).tolist()) for i, n in ((0, 4), (0, 7), (2, 6), (2, 1))
    ]
    with torch.no_grad():
        for (i, tokens), states in zip(pairs, run_continuations(policy, prefixes, pairs, batch_tokens), strict=True):
            full = policy.run_body(torch.tensor([prefixes[i] + tokens])).last_hidden_state[0]
            torch.testing.assert_close(states, full[len(prefixes[i]) - 1 : -1], atol=1e-4, rtol=0)


def test_the_loss_does_not_depend_on_micro_batches(policy: Policy) -> None:
    """One step with one, several and one-item micro-batches: equal loss (to 1e-6) and gradient norm (to 1e-5)."""
    start, results = policy.copy_adapter(), []
    for tokens in (10_000, 40, 1):
        policy.use_adapter(start)
        trainer = Trainer(policy, TrainConfig(micro_batch_tokens=tokens, tail_weight=0.5))
        row = trainer.optimizer_step(random_items())
        results.append((row["loss"], row["grad_norm"]))
    policy.use_adapter(None)
    for loss, norm in results[1:]:
        assert loss == pytest.approx(results[0][0], abs=1e-6)
        assert norm == pytest.approx(results[0][1], abs=1e-5)


def test_a_rollout_is_never_its_own_exemplar(policy: Policy, prompter: Prompter, group: tuple, tmp_path: Path) -> None:
    planner = exemplars.ContextPlanner(small_config(tmp_path), prompter, policy.context)
    plan = planner.group(*group)
    assert len(plan.scored) == 6 * 4
    for item in plan.scored:
        assert item.key[1] not in item.exemplars
        expected = {"base": 0, "reference": 1, "correct": 3 - (item.key[1] < 3), "incorrect": 3 - (item.key[1] >= 3)}
        assert len(item.exemplars) == expected[item.pool]


def test_no_rollout_of_a_finished_run_is_its_own_exemplar(finished: Run) -> None:
    rows = finished.records.read("teacher_states", 1, ["sample", "exemplars"]).to_pylist()
    assert len(rows) >= 12
    assert all(row["sample"] not in row["exemplars"] for row in rows)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_top_k_with_tail_approaches_the_full_vocabulary(kind: str) -> None:
    generator = torch.Generator().manual_seed(5)
    target = torch.randn(9, 40, generator=generator).mul(3).log_softmax(-1)
    student = torch.randn(9, 40, generator=generator).mul(3)
    full = divergence(kind, target, student.log_softmax(-1))
    errors = []
    for k in (2, 5, 10, 20, 40):
        top = target.topk(k)
        bins = binned_logprobs(student, torch.eye(40), top.indices)
        tail = (1 - top.values.exp().sum(-1)).clamp(min=0)
        errors.append(
            (divergence(kind, target_bins(top.values, tail, bins.shape[-1]), bins) - full).abs().mean().item()
        )
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.01
    assert errors[-1] < 1e-5


def test_stop_tokens_have_a_loss_even_if_pad_is_eos(policy: Policy) -> None:
    """The padding id and the stop id are both 0; every token must keep its position."""
    stop = 0
    short = TrainItem(("a", 0), (5, 6), (7, stop), tail=2)
    long = TrainItem(("b", 0), (5, 6, 8), (9, 9, 9, stop), tail=1)
    batch = collate([short, long])
    assert batch.tail_ids.tolist() == [7, stop, stop]
    assert list(zip(batch.tail_row.tolist(), batch.tail_position.tolist(), strict=True)) == [(0, 1), (0, 2), (1, 5)]
    assert batch.mask.sum(1).tolist() == [4, 7]


def test_the_stop_token_of_a_finished_run_is_distilled(finished: Run) -> None:
    stop = finished.load_policy().stop_ids[0]
    targets = finished.records.read("targets", 1, ["token_id"])["token_id"].to_pylist()
    assert targets.count(stop) >= 4


def test_a_round_samples_from_the_adapter_that_the_previous_round_trained(finished: Run) -> None:
    trained = finished.policy_hash(1)
    assert trained != "base"
    assert finished.load_adapter(1).hash == trained
    assert set(finished.records.read("trajectories", 2, ["policy"])["policy"].to_pylist()) == {trained}
    assert set(finished.records.read("scores", 1, ["policy"])["policy"].to_pylist()) == {trained}
    assert set(finished.records.read("trajectories", 1, ["policy"])["policy"].to_pylist()) == {"base"}


def test_recorded_logprobs_are_those_of_the_adapter(finished: Run) -> None:
    """A newly loaded model with the adapter of round 1 reproduces the log-probs of round 2; without it, it does not."""
    rows = finished.records.read("trajectories", 2).to_pylist()[:4]
    errors = {}
    for round_ in (0, 1):
        policy = finished.load_policy(round_)
        max_error = 0.0
        for row in rows:
            ids = torch.tensor([row["prompt_ids"] + row["token_ids"]])
            with torch.no_grad():
                hidden = policy.run_body(ids).last_hidden_state[0, len(row["prompt_ids"]) - 1 : -1]
            logprobs = policy.logits(hidden).log_softmax(-1).gather(1, torch.tensor(row["token_ids"])[:, None])[:, 0]
            max_error = max(max_error, (logprobs - torch.tensor(row["logprobs"])).abs().max().item())
        errors[round_] = max_error
    assert errors[1] < 1e-4 < errors[0]


def test_a_non_finite_loss_stops_the_stage_with_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(tmp_path)
    run = Run(config)
    run.records.open(config)
    STAGES["prepare"](run, 0)
    for name in ("sample", "verify", "teach", "steer"):
        STAGES[name](run, 1)
    distillation_items = train_stage.distillation_items

    def items_with_nan(*args):
        items = distillation_items(*args)
        items[3].logprobs[1, 0] = float("nan")
        items_with_nan.key = items[3].key
        return items

    monkeypatch.setattr(train_stage, "distillation_items", items_with_nan)
    with pytest.raises(NonFiniteLoss) as error:
        STAGES["train"](run, 1)
    problem, sample = items_with_nan.key
    assert f"({problem}, {sample})" in str(error.value)
    assert run.records.manifest("updates", 1) is None
    assert not list(tmp_path.glob("tiny/policy/**/*.safetensors"))


def test_the_head_and_the_embeddings_are_never_trained() -> None:
    for kind in ("lora", "full"):
        model = Policy(ModelConfig(path="data/tiny/model"), AdapterConfig(kind=kind, rank=4))
        assert not [n for n in model.parameters if "embed" in n or "lm_head" in n]
        assert model.parameters


def test_the_kl_to_the_base_model_is_zero_at_round_0_only(finished: Run) -> None:
    """KL(policy || base) on the sampled completions is 0 before training and not 0 after two rounds."""
    kls = [finished.records.read("summaries", r).to_pylist()[0]["kl_base"] for r in (0, 2)]
    assert abs(kls[0]) < 1e-5 < abs(kls[1])
    rows = finished.records.read("scores", 0).to_pylist()
    assert all(abs(r["logprob"] - r["base_logprob"]) < 1e-3 for r in rows)
