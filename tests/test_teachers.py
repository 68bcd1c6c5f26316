"""Rounds with declared pools, feedback and rewards, and the two switches, against their naive forms."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPO, carry_out, small_config
from randommodel import random_model

from flows.doctor import examine
from ogls.analysis.sweep import sweep
from ogls.analysis.token_view import build_token_view
from ogls.config import RunConfig, SteerConfig, TeacherConfig, TrainConfig
from ogls.distillation.steering import project_substance
from ogls.distillation.style import classify, split_kl
from ogls.errors import DataError, ModelError
from ogls.models.load import load_causal, load_tokenizer
from ogls.models.shape import read_shape
from ogls.planning.gpus import GPUS
from ogls.planning.plan import estimate
from ogls.records import Rollout
from ogls.stages.groups import read_groups
from ogls.stages.registry import STAGES
from ogls.stages.run import Run
from ogls.stages.train import _combined_states, _target_logits
from ogls.training.items import distillation_items, policy_gradient_items

SMALL = ("rounds=1", "problems.per_round=4", "train.rollouts=all", "style.rollouts=4")


@pytest.fixture(scope="module")
def expert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model with the tokenizer of the tiny world: other width, other depth, and a padded vocabulary."""
    folder = tmp_path_factory.mktemp("expert") / "model"
    return random_model(folder, hidden_size=64, num_hidden_layers=2, vocab_size=352)


@pytest.fixture(scope="module")
def two_models(expert: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished round whose target is half the run's model and half another one, minus its failed rollouts."""
    pools = f'[{{name="expert", model="{expert}"}}, {{name="judge", model="{expert}", reads="incorrect"}}]'
    recipe = "{base=0.6, expert=0.6, judge=-0.2}"
    config = small_config(
        tmp_path_factory.mktemp("runs"),
        *SMALL,
        *(
            "name=two",
            "problems.per_round=12",
            "train.rollouts=mixed_groups",
            "steer.recipe=custom",
            "teacher.state_dtype=float32",
        ),
        *(f"teacher.pools={pools}", f"steer.weights={recipe}", "steer.support=320", "train.support=full"),
    )
    return carry_out(config)


def logits_after(model: Any, prompt: tuple[int, ...], tokens: tuple[int, ...]) -> torch.Tensor:
    """The logits [T, V] that predict the tokens, by the model as transformers runs it."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0]
    return logits[len(prompt) - 1 : -1].float()


def naive_targets(run: Run, expert: Path) -> dict[tuple[str, int], torch.Tensor]:
    """Log-probs [T, 320] of the target by rollout: full logits of both models, with a prompt for each exemplar."""
    own = load_causal(run.config.model)
    other = load_causal(run.config.model.model_copy(update={"path": str(expert)}))
    prompter = run.prompter(load_tokenizer(run.config.model))
    problems = {p.problem_id: p for p in run.problems("train")}
    targets = {}
    for name, group in read_groups(run, 1).items():
        text = problems[name].problem
        for rollout in group:
            failed = [r for r in group if r.outcome == "failed" and r.sample != rollout.sample]
            if {r.outcome for r in group} != {"correct", "failed"} or not failed:
                continue
            prompt = tuple(prompter.student(text))
            judged = [
                logits_after(other, tuple(prompter.teacher(text, r.text)), rollout.token_ids)[:, :320] for r in failed
            ]
            mixed = 0.6 * logits_after(own, prompt, rollout.token_ids)
            mixed = mixed + 0.6 * logits_after(other, prompt, rollout.token_ids)[:, :320]
            mixed = mixed - 0.2 * torch.stack(judged).mean(0)
            targets[rollout.key] = mixed.log_softmax(-1)
    return targets


def stored_targets(run: Run) -> dict[tuple[str, int], torch.Tensor]:
    """Log-probs [T, V] of the stored targets, which have the whole vocabulary as their support."""
    stored: dict[tuple[str, int], list[np.ndarray]] = {}
    for row in run.records.read("targets", 1).to_pylist():
        dense = np.empty(len(row["ids"]), np.float32)
        dense[row["ids"]] = row["target_logprobs"]
        stored.setdefault((row["problem_id"], row["sample"]), []).append(dense)
    return {key: torch.tensor(np.stack(rows)) for key, rows in stored.items()}


def test_the_target_of_two_models_equals_that_of_their_full_logits(two_models: Run, expert: Path) -> None:
    expected, stored = naive_targets(two_models, expert), stored_targets(two_models)
    assert expected.keys() == stored.keys()
    assert len(expected) > 0
    for key, logprobs in expected.items():
        torch.testing.assert_close(stored[key].exp(), logprobs.exp(), atol=1e-4, rtol=2e-3)  # stored in fp16


def test_a_full_vocabulary_loss_has_the_same_target(two_models: Run, expert: Path) -> None:
    policy = two_models.load_policy(0)
    to_logits = _target_logits(two_models.config, policy)
    assert to_logits
    for key, states in _combined_states(two_models, 1, policy.head):
        logprobs = to_logits(states).log_softmax(-1)
        torch.testing.assert_close(logprobs, naive_targets(two_models, expert)[key], atol=1e-4, rtol=1e-4)
        break
    manifest = two_models.records.manifest("updates", 1)
    assert manifest
    assert 0 < manifest.metrics["loss"] < 10


def test_everything_that_reads_pools_works_with_two_models(two_models: Run) -> None:
    numbers = two_models.records.manifest("style", 1).metrics["numbers"]  # type: ignore[union-attr]
    assert {"target_kl", "expert_kl", "judge_kl"} <= set(numbers)
    assert sweep(two_models, 1).metrics["points"] == 1  # no named recipe is possible with these pools
    (row,) = two_models.records.read("sweeps", 1).to_pylist()
    assert json.loads(row["weights"]) == {"base": 0.6, "expert": 0.6, "judge": -0.2}
    assert 0 < row["projected_kl"] < row["kl"]
    assert 0 < row["until_share"] <= 1
    view = build_token_view(two_models, max_rollouts=2, policy=False)
    shown = next(r for r in view["rollouts"] if r["numbers"])
    assert {"base", "expert", "judge"} <= set(shown["numbers"]["logprobs"])
    assert {e["pool"] for e in shown["exemplars"]} == {"judge"}


def test_the_content_of_another_model_identifies_the_run(two_models: Run, expert: Path, tmp_path: Path) -> None:
    assert "teacher.pools.expert" in (two_models.records.read_info() or {})["contents"]
    moved = tmp_path / "moved"
    moved.symlink_to(expert)
    pools = tuple(p.model_copy(update={"model": str(moved)}) for p in two_models.config.teacher.pools)  # type: ignore[union-attr]
    teacher = two_models.config.teacher.model_copy(update={"pools": pools})
    run = Run(two_models.config.model_copy(update={"teacher": teacher}))
    run.check_identity()
    assert STAGES["teach"](run, 1).reused


def test_a_model_with_another_tokenizer_is_refused(expert: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(expert, other)
    tokenizer = (other / "tokenizer.json").read_text()
    vocabulary = load_tokenizer(small_config(tmp_path).model).get_vocab()
    (other / "tokenizer.json").write_text(_swap(tokenizer, vocabulary))
    config = small_config(tmp_path, *SMALL, f'teacher.pools=[{{name="expert", model="{other}"}}]')
    with pytest.raises(ModelError, match=r"tokenizer of .* differs from that of the run's model in 2 tokens: '3' is"):
        carry_out(config)
    (finding,) = [f for f in examine(config) if f.name == "teachers"]
    assert finding.verdict == "wrong"
    assert "in 2 tokens" in finding.message
    missing = small_config(tmp_path, *SMALL, 'teacher.pools=[{name="expert", model="no/such"}]')
    with pytest.raises(ModelError, match="cannot load the model no/such"):
        carry_out(missing)


def _swap(tokenizer: str, vocabulary: dict[str, int]) -> str:
    """A tokenizer file with the ids of 3 and 4 exchanged."""
    data = json.loads(tokenizer)
    vocab = data["model"]["vocab"]
    vocab["3"], vocab["4"] = vocabulary["4"], vocabulary["3"]
    return json.dumps(data)


def test_a_teacher_that_cannot_be_loaded_is_named_by_its_pool(tmp_path: Path) -> None:
    pool = f'{{name="expert", model="{tmp_path / "nothing"}"}}'
    run = Run(small_config(tmp_path, *SMALL, "name=lost", f"teacher.pools=[{pool}]"))
    with pytest.raises(ModelError, match=r"the model of teacher\.pools expert: .*nothing"):
        STAGES["prepare"](run, 0)


def test_a_column_that_a_pool_reads_must_exist_and_is_kept(tmp_path: Path) -> None:
    rows = (REPO / "data/tiny/train.jsonl").read_text().splitlines()[:8]
    source = tmp_path / "hints.jsonl"
    source.write_text("\n".join(row[:-1] + ', "hint": "carry on", "source": "sums"}' for row in rows))
    pool = '{name="hinted", reads="hint", template="{problem}\\nSolution:\\n{exemplar}\\nNow you:"}'
    overrides = ("name=hinted", f"teacher.pools=[{pool}]", f"problems.source={source}", "steer.recipe=custom")
    recipes = ("steer.weights={base=0, hinted=1}", "steer.sources.sums={base=0.5, hinted=0.5}")
    run = carry_out(small_config(tmp_path, *SMALL, *overrides, *recipes))
    assert {tuple(p.columns.items()) for p in run.problems("train")} == {(("hint", "carry on"), ("source", "sums"))}
    assert {r.weights()["hinted"] for r in run.recipes().values()} == {0.5}
    assert {row["pool"] for row in run.records.read("contexts", 1).to_pylist()} == {"base", "hinted"}
    bad = small_config(tmp_path, *SMALL, "name=bad", f"teacher.pools=[{pool}]", "steer.recipe=custom", recipes[0])
    with pytest.raises(DataError, match=r"has no column hint, which a pool of teacher.pools reads"):
        carry_out(bad)


@pytest.fixture
def checker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "graded.py").write_text(
        "from ogls.verifiers.score import Score\n\n\n"
        "def grade(answer, expected):\n"
        "    distance = abs(int(answer) - int(expected)) if answer.isdigit() else 10\n"
        "    return Score(reward=1 - distance / 10, feedback=f'off by {distance}' if distance else '')\n"
    )
    monkeypatch.chdir(tmp_path)
    for name in ("data",):
        (tmp_path / name).symlink_to(REPO / name)
    return "graded:grade"


def test_rewards_and_feedback_of_a_checker(checker: str, tmp_path: Path) -> None:
    pools = 'teacher.pools=[{name="told", reads="feedback"}]'
    recipe = ("steer.recipe=custom", "steer.weights={base=0, told=1}", "train.rollouts=incorrect")
    verify = (f"verify.checker={checker}", "verify.threshold=1.0")
    run = carry_out(small_config(tmp_path / "runs", *SMALL, "name=told", pools, *recipe, *verify), rounds=1)
    rows = run.records.read("verdicts", 1).to_pylist()
    judged = [row for row in rows if row["reward"] is not None]
    assert {row["outcome"] for row in judged if row["reward"] == 1.0} == {"correct"}
    assert {row["outcome"] for row in judged if row["reward"] < 1.0} == {"failed"}
    assert all(row["feedback"].startswith("off by ") for row in judged if row["reward"] < 1.0)
    contexts = [r for r in run.records.read("contexts", 1).to_pylist() if r["pool"] == "told"]
    assert {(r["problem_id"], r["sample"]) for r in contexts} == {
        (r["problem_id"], r["sample"]) for r in rows if r["outcome"] == "failed"
    }
    assert run.records.manifest("updates", 1).metrics["steps"] > 0  # type: ignore[union-attr]


def test_built_in_feedback_names_the_right_answer_only_if_asked() -> None:
    from ogls.verifiers.score import Score, describe_failure

    assert describe_failure("incorrect", "8", "7", reveal=False) == "Its final answer 8 is not correct."
    assert describe_failure("incorrect", "8", "7", reveal=True).endswith("The correct answer is 7.")
    assert "cut off" in describe_failure("truncated", None, "7", reveal=False)
    assert r"\boxed{}" in describe_failure("no_answer", None, "7", reveal=False)
    assert describe_failure("correct", "7", "7", reveal=True) == describe_failure("timeout", "7", "7", True) == ""
    with pytest.raises(ValueError, match="needs correct or reward"):
        Score()


def random_logprobs(rows: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, 12, generator=torch.Generator().manual_seed(seed)).log_softmax(-1)


def test_projection_keeps_the_substance_of_the_chain_rule_exactly() -> None:
    target, base = random_logprobs(9, 0), random_logprobs(9, 1)
    classes = torch.tensor([0, 0, 1, 1, 1, 2, 2, 0, 0, 2, 2, 1])
    projected = project_substance(target, base, classes)
    torch.testing.assert_close(projected.exp().sum(-1), torch.ones(9))
    for number in (1, 2):  # each class keeps the base's mass, and has the target's shape
        member = classes == number
        torch.testing.assert_close(projected[:, member].exp().sum(-1), base[:, member].exp().sum(-1))
        shape = (projected[:, member] - target[:, member]).diff(dim=-1)
        torch.testing.assert_close(shape, torch.zeros_like(shape), atol=1e-5, rtol=0)
    assert torch.equal(projected[:, classes == 0], base[:, classes == 0])
    kl, style = split_kl(projected, base, classes)
    torch.testing.assert_close(style, torch.zeros(9), atol=1e-6, rtol=0)
    # Substance of the projection: the base's mass of each class times the divergence within it.
    within = []
    for number in (1, 2):
        member = classes == number
        p, q = target[:, member].log_softmax(-1), base[:, member].log_softmax(-1)
        within.append(base[:, member].exp().sum(-1) * (p.exp() * (p - q)).sum(-1))
    torch.testing.assert_close(kl, torch.stack(within).sum(0), atol=1e-6, rtol=1e-5)
    assert torch.equal(project_substance(base, base, torch.zeros(12, dtype=torch.long)), base)
    torch.testing.assert_close(project_substance(target, base, torch.ones(12, dtype=torch.long)), target)


@pytest.mark.parametrize("support", ["top_k", "full"])
def test_the_two_switches_in_a_round(tmp_path: Path, support: str) -> None:
    switches = ("steer.project=substance", "train.until=first_mistake", "train.mistake_nats=0.5")
    overrides = (*SMALL, "steer.recipe=opsd", "steer.support=320", f"train.support={support}", "train.token_clip=0")
    plain = carry_out(small_config(tmp_path, *overrides, "name=plain"))
    both = carry_out(small_config(tmp_path, *overrides, "name=both", *switches))
    assert both.digest("trajectories", 1) != ""
    config: RunConfig = both.config
    tokenizer = load_tokenizer(config.model)
    classes = classify(tokenizer, 320, config.style.classes)
    targets = stored_targets(plain)
    marks = {(r["problem_id"], r["sample"]): r["first_mistake"] for r in both.records.read("steered", 1).to_pylist()}
    base_rows: dict[tuple[str, int], list[np.ndarray]] = {}
    for row in plain.records.read("targets", 1).to_pylist():
        dense = np.empty(320, np.float32)
        dense[row["ids"]] = row["base_logprobs"]
        base_rows.setdefault((row["problem_id"], row["sample"]), []).append(dense)
    for key, projected in stored_targets(both).items():
        base = torch.tensor(np.stack(base_rows[key]))
        expected = project_substance(targets[key], base, classes)
        torch.testing.assert_close(projected.exp(), expected.exp(), atol=2e-3, rtol=2e-2)  # all stored in fp16
    trained = both.records.read("updates", 1)["tokens"].to_pylist()
    lengths = {(r["problem_id"], r["sample"]): r["tokens"] for r in both.records.read("steered", 1).to_pylist()}
    expected_tokens = sum(lengths[k] if marks[k] is None else marks[k] + 1 for k in lengths)
    assert sum(trained) == expected_tokens
    assert any(mark is not None for mark in marks.values())


def test_weights_of_tokens_by_entropy_gap_and_of_groups_by_their_rate_of_success(two_models: Run) -> None:
    groups, targets = read_groups(two_models, 1), two_models.records.read("targets", 1)
    config = two_models.config.train.model_copy(update={"token_weights": "entropy_gap", "group_weights": "frontier"})
    gaps: dict[tuple[str, int], list[float]] = {}
    for row in targets.to_pylist():
        gap = abs(row["target_entropy"] - row["base_entropy"])
        gaps.setdefault((row["problem_id"], row["sample"]), []).append(gap)
    items = distillation_items(groups, targets, None, config)
    assert {item.key for item in items} == set(gaps)
    for item in items:
        outcomes = [r.outcome == "correct" for r in groups[item.key[0]] if r.outcome != "undecided"]
        share = sum(outcomes) / len(outcomes)
        assert item.weights is not None
        expected = torch.tensor(gaps[item.key]) * 4 * share * (1 - share)
        torch.testing.assert_close(item.weights, expected, atol=1e-6, rtol=1e-5)


def test_the_tail_of_short_correct_rollouts_alone() -> None:
    def rollout(sample: int, length: int, outcome: str) -> Rollout:
        return Rollout("p", sample, (1,), tuple(range(length)), "", outcome)

    lengths = ((9, "correct"), (4, "correct"), (6, "correct"), (2, "failed"))
    group = {"p": [rollout(i, n, outcome) for i, (n, outcome) in enumerate(lengths)]}
    config = TrainConfig(objective="grpo", tail_weight=1.0, tail_tokens=3)
    assert {i.key[1] for i in policy_gradient_items(group, config) if i.tail} == {0, 1, 2}
    short = config.model_copy(update={"tail_rollouts": "short_correct"})
    assert {i.key[1] for i in policy_gradient_items(group, short) if i.tail} == {1, 2}  # the median is 6


def test_the_plan_counts_teachers(two_models: Run, expert: Path) -> None:
    one = two_models.config.model_copy(update={"steer": SteerConfig(), "teacher": TeacherConfig()})
    alone, both = estimate(one, GPUS["h100"], 30), estimate(two_models.config, GPUS["h100"], 30)
    before, after = ({s.stage: s for s in plan.stages} for plan in (alone, both))
    shape = read_shape(one.model_copy(update={"model": one.model.model_copy(update={"path": str(expert)})}))
    assert (alone.teachers, both.teachers) == ({}, {str(expert): shape})
    added = after["teach"].memory - before["teach"].memory
    assert added >= shape.parameters * 4  # the other model is loaded beside the run's
    assert after["teach"].tokens > before["teach"].tokens
    assert after["steer"].memory - before["steer"].memory == shape.hidden * alone.shape.vocabulary * 4
    pools = {"base": alone.shape.hidden, "expert": shape.hidden, "judge": shape.hidden}
    states = 12 * 4 * 30 * sum(pools.values()) * 4  # groups, samples, tokens, widths, fp32
    assert both.disk["teacher_states"] == states
