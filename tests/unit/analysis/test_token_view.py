"""The token view's numbers are the steering's own, at every recipe and strength, and its texts are safe to embed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import carry_out, small_config

from ogls.analysis import token_numbers as tokenview
from ogls.analysis.render import embed_json
from ogls.analysis.token_view import build_token_view, render_token_view
from ogls.config import SteerConfig
from ogls.distillation.steering import entropy, steer_tokens
from ogls.errors import UserError
from ogls.models.policy import Policy
from ogls.stages.run import Run
from ogls.store import run_query
from ogls.store.retention import drop_states

V, D, T = 40, 8, 7


def world(*pools: str) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    states = {p: 2 * torch.randn(T, D, generator=generator) for p in pools}
    return states, torch.randint(0, V, (T,), generator=generator), torch.randn(V, D, generator=generator)


def in_page(shown: tokenview.TokenNumbers, point: tokenview.ShownRecipe, t: int, k: int) -> float:
    """What the page's script computes for token k of place t under a point."""
    mixed = sum(w * shown.logprobs[d][t][k] for d, w in point.weights.items()) / point.temperature
    return mixed - shown.points[point.name]["log_z"][t]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_every_target_in_the_page_is_the_steered_target(temperature: float) -> None:
    states, ids, head = world("base", "reference", "correct", "incorrect")
    config = SteerConfig(strength=0.7, temperature=temperature)
    points = tokenview.shown_recipes(config, {"base", "reference", "correct", "incorrect"}, trained=False)
    assert {p.recipe for p in points} == {"ogls-sd", "contrastive", "sdpo", "opsd"}
    shown = tokenview.compute_token_numbers(states, ids, points, head)
    for point in points:
        weights = dict.fromkeys(("base", "reference", "correct", "incorrect"), 0.0) | dict(point.weights)
        recipe = SteerConfig.model_validate({"recipe": "custom", "weights": weights}).to_recipe()
        wanted = steer_tokens(states, ids, recipe, head, V, temperature=point.temperature)
        full = torch.zeros(T, V).scatter(-1, wanted.ids, wanted.target_logprobs)
        assert shown.points[point.name]["kl"] == pytest.approx(wanted.kl.tolist(), abs=1e-4)
        assert shown.points[point.name]["entropy"] == pytest.approx(wanted.target_entropy.tolist(), abs=1e-4)
        for t in range(T):
            for k, token in enumerate(shown.ids[t]):
                assert in_page(shown, point, t, k) == pytest.approx(float(full[t, token]), abs=3e-3)
    assert shown.direction_norm == pytest.approx(wanted.direction_norm.tolist(), rel=1e-4)


def test_the_sampled_token_and_what_is_likely_to_anything_can_be_shown() -> None:
    states, ids, head = world("base", "correct", "incorrect", "trained")
    points = tokenview.shown_recipes(SteerConfig(), {"base", "correct", "incorrect"}, trained=True)
    shown = tokenview.compute_token_numbers(states, ids, points, head, batch_tokens=3)
    whole = tokenview.compute_token_numbers(states, ids, points, head)
    assert shown.ids == whole.ids  # however it is cut
    for point in points:
        assert shown.points[point.name]["log_z"] == pytest.approx(whole.points[point.name]["log_z"], abs=2e-4)
    for t in range(T):
        assert shown.ids[t][0] == int(ids[t])
        assert len(set(shown.ids[t])) == len(shown.ids[t])
        for name, state in states.items():
            logprobs = (state[t] @ head.T).log_softmax(-1)
            assert set(logprobs.topk(5).indices.tolist()) <= set(shown.ids[t])
            assert shown.entropy[name][t] == pytest.approx(float(entropy(logprobs)), abs=1e-4)


def test_points_that_need_what_is_not_there_are_left_out() -> None:
    states, ids, head = world("base", "student", "trained")
    points = tokenview.shown_recipes(SteerConfig(), {"base", "correct", "incorrect"}, trained=True)
    shown = tokenview.compute_token_numbers(states, ids, points, head)
    assert list(shown.points) == ["after training"]
    assert shown.direction_norm is None
    assert [p.name for p in tokenview.shown_recipes(SteerConfig(), set(), trained=True)] == ["after training"]


@pytest.mark.parametrize("text", ["7+8=5\n", "a \u00e9\u4e2d\U0001f600 b", "<b>&\u202e\\boxed{3}"])
def test_pieces_together_are_the_text(policy: Policy, text: str) -> None:
    ids = [*policy.tokenizer(text, add_special_tokens=False)["input_ids"], policy.tokenizer.eos_token_id]
    pieces = tokenview.token_texts(policy.tokenizer, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == policy.tokenizer.decode(ids, skip_special_tokens=False)
    assert pieces[-1] == policy.tokenizer.eos_token


@pytest.fixture(scope="module")
def data(finished: Run) -> dict:
    return build_token_view(finished, most=10, each=1)


def test_the_view_of_a_run_says_what_its_tables_say(finished: Run, data: dict) -> None:
    own = data["points"][0]
    assert (own["name"], own["temperature"]) == ("own", finished.config.steer.temperature)
    point = tokenview.ShownRecipe(**own)
    compared = 0
    for rollout in data["rollouts"]:
        key = rollout["problem_id"], rollout["sample"]
        rows = [
            r
            for r in finished.records.read("targets", rollout["round"]).to_pylist()
            if (r["problem_id"], r["sample"]) == key
        ]
        if not rows:
            assert "not scored" in rollout["note"]
            continue
        shown = tokenview.TokenNumbers(**rollout["numbers"])
        for row in rows:
            t = row["position"]
            assert shown.ids[t][0] == row["token_id"]
            assert in_page(shown, point, t, 0) == pytest.approx(row["token_target_logprob"], abs=2e-3)
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


def test_why_each_is_shown(finished: Run, data: dict) -> None:
    for rollout in data["rollouts"]:
        assert rollout["outcome"] in rollout["tags"]
        if "fixed" in rollout["tags"]:
            assert rollout["outcome"] == "failed"
            assert "solves it greedily" in rollout["later"]["how"]
    top = "SELECT problem_id, sample FROM steered ORDER BY kl DESC, round DESC, problem_id, sample LIMIT 1"
    steered = run_query(finished.store, top, run="tiny").to_pylist()
    most = build_token_view(finished, show="steered", most=1)["rollouts"]
    assert [(r["problem_id"], r["sample"]) for r in most] == [tuple(steered[0].values())]
    only = build_token_view(finished, problem=most[0]["problem_id"], sample=most[0]["sample"], policy=False)
    assert len(only["rollouts"]) == 1
    assert "trained" not in only["rollouts"][0]["numbers"]["logprobs"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"rounds": [9]}, "no verified rollouts in round 9; it has those of 1 to 2"),
        ({"problem": "nobody"}, "no problem nobody in round 1 to 2 of run tiny"),
    ],
)
def test_what_is_not_there_is_said(finished: Run, arguments: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        build_token_view(finished, **arguments)


def test_without_states_the_student_is_still_shown(finished: Run, tmp_path: Path) -> None:
    shutil.copytree(Path(finished.records.storage.path) / "tiny", tmp_path / "tiny")
    copy = Run(small_config(tmp_path))
    drop_states(copy.records, 1)
    rollouts = build_token_view(copy, rounds=[1], most=5)["rollouts"]
    assert any(r["exemplars"] for r in rollouts), "who read what is kept"
    for rollout in rollouts:
        assert "dropped to save space" in rollout["note"]
        assert set(rollout["numbers"]["points"]) == {"after training"}


def test_a_method_without_a_teacher_shows_what_training_did(tmp_path: Path) -> None:
    run = carry_out(small_config(tmp_path, "name=grpo", "train.objective=grpo", "rounds=1"))
    data = build_token_view(run, most=5)
    assert [p["name"] for p in data["points"]] == ["after training"]
    assert data["method"] == "grpo"
    assert all(r["numbers"]["points"]["after training"]["kl"] for r in data["rollouts"])


def test_nothing_embedded_can_end_its_element(data: dict) -> None:
    hostile = ["</script><script>hit()</script>", "<!--", "\u2028", "&amp;", "]]>"]
    text = str(embed_json(hostile))
    assert not set(text) & set("<>&\u2028")
    assert json.loads(text) == hostile
    page = render_token_view(data | {"run": "<img src=x onerror=hit()>"})
    assert "<img" not in page
