"""The numbers of the token view equal those of steering at every recipe and strength; its texts are safe to embed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import carry_out, small_config

from ogls.analysis.render import embed_json
from ogls.analysis.token_numbers import ShownRecipe, TokenNumbers, compute_token_numbers, shown_recipes, token_texts
from ogls.analysis.token_view import build_token_view, render_token_view
from ogls.config import SteerConfig
from ogls.distillation.steering import entropy, steer_tokens
from ogls.errors import UserError
from ogls.models.policy import Policy
from ogls.stages.run import Run
from ogls.store import run_query
from ogls.store.retention import drop_files

V, D, T = 40, 8, 7


def random_rollout(*pools: str) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Return random states [T, D] by pool, token ids [T] and a head [V, D]."""
    generator = torch.Generator().manual_seed(0)
    states = {p: 2 * torch.randn(T, D, generator=generator) for p in pools}
    return states, torch.randint(0, V, (T,), generator=generator), torch.randn(V, D, generator=generator)


def target_logprob(numbers: TokenNumbers, recipe: ShownRecipe, t: int, k: int) -> float:
    """Return the log-prob of token k at position t under the target of a recipe, as the script of the page does."""
    mixed = sum(w * numbers.logprobs[d][t][k] for d, w in recipe.weights.items()) / recipe.temperature
    return mixed - numbers.points[recipe.name]["log_z"][t]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_every_target_in_the_page_is_the_steered_target(temperature: float) -> None:
    states, ids, head = random_rollout("base", "reference", "correct", "incorrect")
    config = SteerConfig(strength=0.7, temperature=temperature)
    recipes = shown_recipes(config, {"base", "reference", "correct", "incorrect"}, trained=False)
    assert {r.recipe for r in recipes} == {"ogls-sd", "contrastive", "sdpo", "opsd"}
    shown = compute_token_numbers(states, ids, recipes, head)
    for recipe in recipes:
        weights = dict.fromkeys(("base", "reference", "correct", "incorrect"), 0.0) | dict(recipe.weights)
        pool_weights = SteerConfig.model_validate({"recipe": "custom", "weights": weights}).to_recipe()
        steered = steer_tokens(states, ids, pool_weights, head, V, temperature=recipe.temperature)
        full = torch.zeros(T, V).scatter(-1, steered.ids, steered.target_logprobs)
        assert shown.points[recipe.name]["kl"] == pytest.approx(steered.kl.tolist(), abs=1e-4)
        assert shown.points[recipe.name]["entropy"] == pytest.approx(steered.target_entropy.tolist(), abs=1e-4)
        for t in range(T):
            for k, token in enumerate(shown.ids[t]):
                assert target_logprob(shown, recipe, t, k) == pytest.approx(float(full[t, token]), abs=3e-3)
    assert shown.direction_norm == pytest.approx(steered.direction_norm.tolist(), rel=1e-4)


def test_the_sampled_token_and_the_likely_tokens_can_be_shown() -> None:
    states, ids, head = random_rollout("base", "correct", "incorrect", "trained")
    recipes = shown_recipes(SteerConfig(), {"base", "correct", "incorrect"}, trained=True)
    shown = compute_token_numbers(states, ids, recipes, head, batch_tokens=3)
    whole = compute_token_numbers(states, ids, recipes, head)
    assert shown.ids == whole.ids  # independent of batch_tokens
    for recipe in recipes:
        assert shown.points[recipe.name]["log_z"] == pytest.approx(whole.points[recipe.name]["log_z"], abs=2e-4)
    for t in range(T):
        assert shown.ids[t][0] == int(ids[t])
        assert len(set(shown.ids[t])) == len(shown.ids[t])
        for name, state in states.items():
            logprobs = (state[t] @ head.T).log_softmax(-1)
            assert set(logprobs.topk(5).indices.tolist()) <= set(shown.ids[t])
            assert shown.entropy[name][t] == pytest.approx(float(entropy(logprobs)), abs=1e-4)


def test_recipes_without_their_distributions_are_left_out() -> None:
    states, ids, head = random_rollout("base", "student", "trained")
    recipes = shown_recipes(SteerConfig(), {"base", "correct", "incorrect"}, trained=True)
    shown = compute_token_numbers(states, ids, recipes, head)
    assert list(shown.points) == ["after training"]
    assert shown.direction_norm is None
    assert [r.name for r in shown_recipes(SteerConfig(), set(), trained=True)] == ["after training"]


@pytest.mark.parametrize("text", ["7+8=5\n", "a \u00e9\u4e2d\U0001f600 b", "<b>&\u202e\\boxed{3}"])
def test_token_texts_join_to_the_text(policy: Policy, text: str) -> None:
    ids = [*policy.tokenizer(text, add_special_tokens=False)["input_ids"], policy.tokenizer.eos_token_id]
    texts = token_texts(policy.tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == policy.tokenizer.decode(ids, skip_special_tokens=False)
    assert texts[-1] == policy.tokenizer.eos_token


@pytest.fixture(scope="module")
def data(finished: Run) -> dict:
    return build_token_view(finished, max_rollouts=10, per_round=1)


def test_the_view_has_the_numbers_of_the_tables(finished: Run, data: dict) -> None:
    own = data["points"][0]
    assert (own["name"], own["temperature"]) == ("own", finished.config.steer.temperature)
    recipe = ShownRecipe(**own)
    compared = 0
    for rollout in data["rollouts"]:
        key = rollout["problem_id"], rollout["sample"]
        rows = [
            r
            for r in finished.records.read("targets", rollout["round"]).to_pylist()
            if (r["problem_id"], r["sample"]) == key
        ]
        if not rows:
            assert rollout["note"].startswith("it is the only ") or "group" in rollout["note"]
            continue
        shown = TokenNumbers(**rollout["numbers"])
        for row in rows:
            t = row["position"]
            assert shown.ids[t][0] == row["token_id"]
            assert target_logprob(shown, recipe, t, 0) == pytest.approx(row["token_target_logprob"], abs=2e-3)
            assert shown.logprobs["base"][t][0] == pytest.approx(row["token_base_logprob"], abs=2e-3)
            assert shown.points["own"]["kl"][t] == pytest.approx(row["kl"], abs=2e-3)
            assert shown.direction_norm[t] == pytest.approx(row["direction_norm"], rel=1e-3)
            compared += 1
    assert compared > 50


def test_the_student_is_the_policy_that_sampled(finished: Run, data: dict) -> None:
    for rollout in data["rollouts"]:
        rows = finished.records.read("trajectories", rollout["round"]).to_pylist()
        (row,) = [r for r in rows if (r["problem_id"], r["sample"]) == (rollout["problem_id"], rollout["sample"])]
        assert "".join(rollout["text"]).startswith(row["text"][:5])
        if rollout["numbers"]:
            student = [lp[0] for lp in rollout["numbers"]["logprobs"]["student"]]
            assert student == pytest.approx(row["logprobs"][: len(student)], abs=2e-3)
            assert rollout["numbers"]["logprobs"]["trained"] != rollout["numbers"]["logprobs"]["student"]


def test_the_reasons_for_the_selection(finished: Run, data: dict) -> None:
    for rollout in data["rollouts"]:
        assert rollout["outcome"] in rollout["tags"]
        if "fixed" in rollout["tags"]:
            assert rollout["outcome"] == "failed"
            assert "solves it greedily" in rollout["later"]["how"]
    top = "SELECT problem_id, sample FROM steered ORDER BY kl DESC, round DESC, problem_id, sample LIMIT 1"
    steered = run_query(finished.store, top, run="tiny").to_pylist()
    selected = build_token_view(finished, show="steered", max_rollouts=1)["rollouts"]
    assert [(r["problem_id"], r["sample"]) for r in selected] == [tuple(steered[0].values())]
    only = build_token_view(finished, problem=selected[0]["problem_id"], sample=selected[0]["sample"], policy=False)
    assert len(only["rollouts"]) == 1
    assert "trained" not in only["rollouts"][0]["numbers"]["logprobs"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rounds": [9]}, "no verified rollouts in round 9; verified rounds: 1 to 2"),
        ({"problem": "nobody"}, "no rollouts of problem nobody in round 1 to 2 of run tiny"),
    ],
)
def test_a_missing_round_or_problem_raises(finished: Run, arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_token_view(finished, **arguments)


def test_without_states_the_student_is_shown(finished: Run, tmp_path: Path) -> None:
    shutil.copytree(Path(finished.records.storage.path) / "tiny", tmp_path / "tiny")
    copy = Run(small_config(tmp_path))
    drop_files(copy.records, 1)
    rollouts = build_token_view(copy, rounds=[1], max_rollouts=5)["rollouts"]
    assert any(r["exemplars"] for r in rollouts), "the table contexts is kept"
    for rollout in rollouts:
        assert "dropped to save space" in rollout["note"]
        assert set(rollout["numbers"]["points"]) == {"after training"}


def test_a_method_without_a_teacher_shows_the_effect_of_training(tmp_path: Path) -> None:
    run = carry_out(small_config(tmp_path, "name=grpo", "train.objective=grpo", "rounds=1"))
    data = build_token_view(run, max_rollouts=5)
    assert [p["name"] for p in data["points"]] == ["after training"]
    assert data["method"] == "grpo"
    assert all(r["numbers"]["points"]["after training"]["kl"] for r in data["rollouts"])


def test_embedded_text_cannot_end_its_element(data: dict) -> None:
    hostile = ["</script><script>hit()</script>", "<!--", "\u2028", "&amp;", "]]>"]
    text = str(embed_json(hostile))
    assert not set(text) & set("<>&\u2028")
    assert json.loads(text) == hostile
    page = render_token_view(data | {"run": "<img src=x onerror=hit()>"})
    assert "<img" not in page
