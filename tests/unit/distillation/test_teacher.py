"""The teacher's plan: which rollouts are scored by which contexts, and why others are left out."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import small_config

from ogls.distillation import exemplars, teacher
from ogls.errors import ModelError
from ogls.models.policy import Policy
from ogls.problems.prompts import Prompter
from ogls.records import Problem, Rollout

PROBLEM = Problem("p", r"Modulo 10, left to right: $3+4$", "7", "3+4=7\n\\boxed{7}")


@pytest.fixture
def plan(policy: Policy, prompter: Prompter, tmp_path: Path):
    def make(
        outcomes: str, *overrides: str, problem: Problem = PROBLEM, same_text: bool = False
    ) -> exemplars.TeacherPlan:
        words = {"c": "correct", "f": "failed", "u": "undecided"}
        rollouts = []
        for i, letter in enumerate(outcomes):
            text = "\\boxed{7}" if same_text else f"{'3+4=7 ' * (i + 1)}\\boxed{{{i}}}"
            ids = (*prompter.tokenizer(text)["input_ids"], policy.stop_ids[0])
            rollouts.append(Rollout("p", i, (5, 6), ids, text, words[letter]))
        config = small_config(tmp_path, "teacher.pools=[]", *overrides)
        return exemplars.ContextPlanner(config, prompter, policy.context).group(problem, rollouts)

    return make


def scored(plan: exemplars.TeacherPlan) -> dict[int, dict[str, tuple[int, ...]]]:
    found: dict[int, dict[str, tuple[int, ...]]] = {}
    for item in plan.scored:
        found.setdefault(item.key[1], {})[item.pool] = tuple(sorted(item.exemplars))
    return found


def test_mixed_groups(plan) -> None:
    found = plan("ccff")
    assert scored(found) == {
        0: {"base": (), "correct": (1,), "incorrect": (2, 3)},
        1: {"base": (), "correct": (0,), "incorrect": (2, 3)},
        2: {"base": (), "correct": (0, 1), "incorrect": (3,)},
        3: {"base": (), "correct": (0, 1), "incorrect": (2,)},
    }
    assert found.left_out == Counter()


@pytest.mark.parametrize(
    ("outcomes", "overrides", "kept", "left_out"),
    [
        ("cccc", [], [], {"group_not_mixed": 4}),
        ("ffff", [], [], {"group_not_mixed": 4}),
        ("cfff", [], [1, 2, 3], {"no_correct_exemplar": 1}),
        ("cccf", [], [0, 1, 2], {"no_incorrect_exemplar": 1}),
        ("ccffu", [], [0, 1, 2, 3], {"undecided": 1}),
        ("ccff", ["train.rollouts=incorrect"], [2, 3], {"already_correct": 2}),
        ("cccc", ["train.rollouts=all"], [], {"no_incorrect_exemplar": 4}),
        ("cccc", ["train.rollouts=all", "steer.recipe=sdpo"], [0, 1, 2, 3], {}),
        ("ffff", ["train.rollouts=all", "steer.recipe=opsd"], [0, 1, 2, 3], {}),
        ("cfff", ["teacher.empty_pool=reference"], [0, 1, 2, 3], {}),
        ("ccff", ["train.rollouts=correct"], [0, 1], {"failed": 2}),
        ("cfff", ["teacher.reference_exemplar=true"], [0, 1, 2, 3], {}),
        ("ffff", ["teacher.reference_exemplar=true", "train.rollouts=all"], [0, 1, 2, 3], {}),
        ("cccc", ["teacher.unanimous=anchor", "train.rollouts=all"], [0, 1, 2, 3], {}),
        ("cccf", ["teacher.unanimous=anchor", "train.rollouts=all"], [0, 1, 2], {"no_incorrect_exemplar": 1}),
        ("c", ["teacher.unanimous=anchor", "train.rollouts=all"], [], {"no_correct_exemplar": 1}),
    ],
)
def test_who_is_trained_and_why_not(plan, outcomes: str, overrides: list, kept: list, left_out: dict) -> None:
    found = plan(outcomes, *overrides)
    assert sorted(scored(found)) == kept
    assert dict(found.left_out) == left_out


def test_the_reference_stands_in_for_an_empty_correct_pool(plan) -> None:
    assert scored(plan("cfff", "teacher.empty_pool=reference"))[0]["correct"] == (exemplars.REFERENCE,)


def test_the_reference_is_one_more_correct_exemplar(plan, prompter: Prompter) -> None:
    found = plan("ccff", "teacher.reference_exemplar=true")
    assert scored(found)[0]["correct"] == (exemplars.REFERENCE, 1)
    assert scored(found)[3]["correct"] == (exemplars.REFERENCE, 0, 1)
    # In the exemplars' template, not the reference's: else its style would not cancel.
    wanted = tuple(prompter.teacher(PROBLEM.problem, PROBLEM.solution, reference=False))
    assert wanted in {c.prompt_ids for s in found.scored if s.pool == "correct" for c, _ in s.shares}
    capped = plan("ccff", "teacher.reference_exemplar=true", "teacher.max_exemplars=1")
    assert scored(capped)[3]["correct"] == (exemplars.REFERENCE,)
    bare = plan("ccff", "teacher.reference_exemplar=true", problem=Problem("p", PROBLEM.problem, "7"))
    assert scored(bare)[0]["correct"] == (1,)


def test_unanimous_groups_have_no_direction(plan) -> None:
    """Equal contexts at equal shares: the averaged states of both pools are the same numbers."""
    pools = {s.pool: s.shares for s in plan("cccc", "teacher.unanimous=anchor", "train.rollouts=all").scored}
    assert pools["correct"] == pools["incorrect"]


def test_without_a_reference_solution_opsd_has_nothing_to_read(plan) -> None:
    bare = Problem("p", PROBLEM.problem, "7")
    found = plan("ccff", "steer.recipe=opsd", "train.rollouts=all", problem=bare)
    assert found.scored == []
    assert dict(found.left_out) == {"no_reference_exemplar": 4}


def test_extra_pools_are_cached_where_they_exist(plan) -> None:
    found = scored(plan("cfff", "steer.recipe=opsd", "train.rollouts=all", 'teacher.pools=["correct"]'))
    assert "correct" not in found[0]
    assert found[1]["correct"] == (0,)


def test_exemplars_are_capped(plan) -> None:
    found = scored(plan("ccccffff", "teacher.max_exemplars=2"))
    assert all(len(pools[p]) == 2 for pools in found.values() for p in ("correct", "incorrect"))


def test_long_exemplars_are_cut_and_counted(plan, prompter: Prompter) -> None:
    whole, cut = plan("ccff"), plan("ccff", "teacher.exemplar_tokens=4")
    assert (whole.cut, cut.cut) == (0, 4)

    def longest(found: exemplars.TeacherPlan) -> int:
        return max(len(c.prompt_ids) for s in found.scored for c, _ in s.shares)

    assert longest(cut) < longest(whole)


def test_a_prompt_without_room_for_an_exemplar_is_an_error(plan) -> None:
    crowded = Problem("p", "1+" * 300 + "1", "7")
    with pytest.raises(ModelError, match="leave no room for an exemplar in a context of 512"):
        plan("ccff", problem=crowded)


def test_equal_texts_share_a_context(plan) -> None:
    found = plan("cccf" + "f", same_text=True)
    (item,) = [s for s in found.scored if s.key[1] == 3 and s.pool == "correct"]
    assert len(item.shares) == 1
    assert item.shares[0][1] == 1.0
    assert len(item.exemplars) == 3


@pytest.mark.parametrize(
    ("weights", "anchor", "base"),
    [("frozen", "policy", "policy"), ("frozen", "teacher", "teacher"), ("live", "policy", "teacher")],
)
def test_whose_weights_the_base_pool_is_read_with(plan, weights: str, anchor: str, base: str) -> None:
    found = plan("ccff", f"teacher.weights={weights}", f"teacher.anchor={anchor}")
    whose = {(s.pool, c.weights) for s in found.scored for c, _ in s.shares}
    assert whose == {("base", base), ("correct", "teacher"), ("incorrect", "teacher")}


def test_only_the_first_tokens_are_scored(plan) -> None:
    assert {len(s.token_ids) for s in plan("ccff", "train.tokens=5").scored} == {5}


@pytest.mark.parametrize("most", [1, 3, 40])
def test_a_batch_that_does_not_fit_is_halved_until_it_does(
    policy: Policy, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """States are the same, however often memory runs out; one sequence that does not fit is said."""
    contexts = [exemplars.Context("teacher", tuple(range(5, 12 + n))) for n in range(3)]
    scored = [
        exemplars.ScoredRollout((f"p{n}", s), "correct", tuple(range(20, 24 + s)), ((contexts[n], 1.0),), (0,))
        for n in range(3)
        for s in range(4)
    ]
    wanted = teacher.score_rollouts(policy, scored, 16384)
    plain, ran = teacher.run_continuations, []

    def scarce(policy: Policy, prefixes: list, pairs: list, batch_tokens: int):
        if len(pairs) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        ran.append(len(pairs))
        return plain(policy, prefixes, pairs, batch_tokens)

    monkeypatch.setattr(teacher, "run_continuations", scarce)
    got = teacher.score_rollouts(policy, scored, 16384)
    assert sum(ran) == 12
    assert max(ran) <= most
    for key, states in wanted.items():
        torch.testing.assert_close(got[key], states, atol=1e-5, rtol=1e-5)
    most = 0
    with pytest.raises(
        ModelError, match=r"out of memory on one sequence of \d+ tokens: lower teacher\.exemplar_tokens"
    ):
        teacher.score_rollouts(policy, scored, 16384)
