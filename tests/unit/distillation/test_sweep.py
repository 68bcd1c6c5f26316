"""Sweeps: measures by definition, only the head of the model runs, and tables that agree with the stored targets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import small_config

from ogls.analysis.sweep import sweep
from ogls.distillation import sweep as sweeping
from ogls.distillation.auc import auc, group_auc
from ogls.distillation.steering import steer_tokens
from ogls.errors import DataError
from ogls.stages.registry import STAGES
from ogls.stages.run import Run


def test_auc_is_the_probability_that_a_positive_value_is_above_a_negative_one() -> None:
    rng = np.random.default_rng(0)
    positive, negative = rng.integers(0, 6, 40) + 1.0, rng.integers(0, 6, 30).astype(float)
    pairs = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
    assert auc(positive, negative) == pytest.approx(np.mean(pairs))
    assert auc(positive, negative[:0]) is None
    assert auc(np.ones(3), np.zeros(3)) == 1.0


def test_the_auc_within_groups_ignores_the_difficulty_of_problems() -> None:
    """Each group has its own level, which hides what tells its rollouts apart from the AUC over all rollouts."""
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(40), 4)
    correct = np.tile([True, True, False, False], 40)
    values = np.repeat(rng.normal(0, 50, 40), 4) + correct + rng.normal(0, 1, 160)
    pairs = [(values[i] > values[j]) for g in range(40) for i in (4 * g, 4 * g + 1) for j in (4 * g + 2, 4 * g + 3)]
    found = group_auc(values, correct, group)
    assert found is not None
    value, low, high = found
    assert value == pytest.approx(np.mean(pairs))
    assert 0.6 < low < value < high < 0.9
    assert auc(values[correct], values[~correct]) == pytest.approx(0.5, abs=0.05)
    assert group_auc(values, correct, np.arange(160)) is None


def test_the_grid_has_the_points_that_the_cached_pools_allow() -> None:
    points = sweeping.recipe_grid({"base", "correct", "incorrect"}, strengths=(0.5, 1.0))
    assert [p.name for p in points] == ["ogls-sd 0.5", "ogls-sd 1", "contrastive 0.5", "contrastive 1", "sdpo"]
    assert [p.name for p in sweeping.recipe_grid({"base", "reference"})] == ["opsd"]


def test_auc_by_class_ranks_rollouts_by_their_tokens_of_that_class() -> None:
    """Three rollouts; the class separates them, the other tokens do not, and the last rollout has none of the class."""
    tokens = sweeping.SweepTokens(
        rollout=np.array([0, 0, 1, 1, 2]),
        position=np.array([0, 1, 0, 1, 0]),
        correct=np.array([True, True, False, False, False]),
        token_class=np.array([0, 1, 0, 1, 0]),
        group=np.array([0, 0, 0, 0, 1]),
    )
    ratio = np.array([-5.0, 2.0, 1.0, -2.0, -9.0])
    zeros = np.zeros(5, np.float32)
    measures = sweeping.Measures(
        kl=np.arange(5.0), entropy=zeros, moved=zeros, ratio=ratio, top=zeros, projected_kl=zeros,
        projected_ratio=zeros, base_logprob=-ratio,
    )  # fmt: skip
    (point,) = sweeping.recipe_grid({"base", "reference"})
    rest, named = sweeping.class_rows([point], [measures], tokens, ["digit"])
    assert (rest["token_class"], rest["tokens"], rest["kl"], rest["auc"]) == ("rest", 3, 2.0, 0.5)
    assert (named["token_class"], named["tokens"], named["kl"], named["auc"]) == ("digit", 2, 2.0, 1.0)
    assert (rest["group_auc"], named["group_auc"]) == (0.0, 1.0)  # the last rollout is alone in its group
    assert (rest["base_auc"], named["base_auc"]) == (0.5, 0.0)


def test_measures_agree_with_the_steering_stage() -> None:
    generator = torch.Generator().manual_seed(0)
    states = {p: torch.randn(9, 8, generator=generator) for p in ("base", "correct", "incorrect")}
    head, ids = torch.randn(30, 8, generator=generator), torch.randint(0, 30, (9,), generator=generator)
    points = sweeping.recipe_grid(set(states), ("ogls-sd",), (0.5,))
    for batch in (100, 2):
        (got,) = sweeping.measure_points(states, ids, points, head, batch)
        expected = steer_tokens(states, ids, points[0].weights, head, 30)
        np.testing.assert_allclose(got.kl, expected.kl, atol=1e-5)
        ratio = expected.token_target_logprob - expected.token_base_logprob
        np.testing.assert_allclose(got.ratio, ratio, atol=1e-5)
        moved = expected.token_target_logprob.exp() - expected.token_base_logprob.exp()
        np.testing.assert_allclose(got.moved, moved, atol=1e-6)
        p = expected.target_logprobs.exp()
        np.testing.assert_allclose(got.entropy, -(p * expected.target_logprobs).sum(-1), atol=1e-5)
        assert (got.top == expected.ids[:, 0].numpy()).all()


@pytest.fixture
def swept(finished: Run, tmp_path) -> Run:
    import shutil

    shutil.copytree(f"{finished.records.storage.path}/tiny", tmp_path / "tiny")
    run = Run(small_config(tmp_path))
    sweep(run, 1)
    return run


def test_a_sweep_runs_only_the_head(finished: Run, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calling any module raises an error; the head is a matrix product."""
    import shutil

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a module ran")

    shutil.copytree(f"{finished.records.storage.path}/tiny", tmp_path / "tiny")
    monkeypatch.setattr(torch.nn.Module, "__call__", refuse)
    assert sweep(Run(small_config(tmp_path)), 1).rows > 10


def test_the_tables_of_a_sweep(swept: Run) -> None:
    rows = swept.records.read("sweeps", 1).to_pylist()
    ogls = {r["strength"]: r for r in rows if r["recipe"] == "ogls-sd"}
    assert list(ogls) == list(sweeping.STRENGTHS)
    kls = [r["kl"] for r in ogls.values()]
    assert kls == sorted(kls)
    assert kls[0] > 0
    assert {r["recipe"] for r in rows} == {"ogls-sd", "contrastive", "sdpo", "opsd"}
    tokens = swept.records.read("targets", 1).num_rows
    assert {r["tokens"] for r in rows} == {tokens}
    at_own_strength = ogls[swept.config.steer.strength]
    targets = swept.records.read("targets", 1)["kl"].to_numpy()
    assert at_own_strength["kl"] == pytest.approx(targets.mean(), rel=1e-3)
    positions = swept.records.read("sweep_positions", 1).to_pylist()
    one_point = [p for p in positions if (p["recipe"], p["strength"]) == ("ogls-sd", 0.5)]
    assert sum(p["correct_tokens"] + p["failed_tokens"] for p in one_point) == tokens
    classes = swept.records.read("sweep_classes", 1).to_pylist()
    one_point = [c for c in classes if (c["recipe"], c["strength"]) == ("ogls-sd", 0.5)]
    assert sum(c["tokens"] for c in one_point) == tokens
    assert {c["token_class"] for c in one_point} == {"substance", "rest"}
    assert sum(c["tokens"] * c["kl"] for c in one_point) == pytest.approx(tokens * ogls[0.5]["kl"], rel=1e-5)
    assert all(0 <= c["substance_kl"] <= c["kl"] + 1e-6 for c in classes)
    pairs = swept.records.read("sweep_agreement", 1).to_pylist()
    assert len(pairs) == len(rows) * (len(rows) - 1) // 2
    assert all(0 <= p["same_top"] <= 1 for p in pairs)
    assert swept.records.storage.read_bytes("tiny/figures/round=001/sweep.png")[:4] == b"\x89PNG"


def test_a_sweep_is_reused_and_missing_pools_raise_an_error(swept: Run) -> None:
    assert sweep(swept, 1).reused
    assert not sweep(swept, 1, strengths=(0.3,)).reused
    teacher = swept.config.teacher.model_copy(update={"pools": ()})
    without = Run(swept.config.model_copy(update={"name": "without", "teacher": teacher}))
    STAGES["prepare"](without, 0)
    for stage in ("sample", "verify", "teach", "steer"):
        STAGES[stage](without, 1)
    with pytest.raises(DataError, match=r"allow none of opsd: in a new run, set teacher\.pools to cache more"):
        sweep(without, 1, recipes=("opsd",))
