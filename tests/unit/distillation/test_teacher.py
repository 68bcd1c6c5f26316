"""The plan of the teacher pass: the contexts of each scored rollout, why others are left out, and out of memory."""

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
    """A function that plans one group; `outcomes` has a letter per rollout: c correct, f failed, u undecided."""

    def make(
        outcomes: str, *overrides: str, problem: Problem = PROBLEM, same_text: bool = False
    ) -> exemplars.TeacherPlan:
        outcome_of = {"c": "correct", "f": "failed", "u": "undecided"}
        rollouts = []
        for i, letter in enumerate(outcomes):
            text = "\\boxed{7}" if same_text else f"{'3+4=7 ' * (i + 1)}\\boxed{{{i}}}"
            ids = (*prompter.tokenizer(text)["input_ids"], policy.stop_ids[0])
            rollouts.append(Rollout("p", i, (5, 6), ids, text, outcome_of[letter]))
        config = small_config(tmp_path, "teacher.pools=[]", *overrides)
        return exemplars.ContextPlanner(config, prompter, policy.context).group(problem, rollouts)

    return make


def scored(plan: exemplars.TeacherPlan) -> dict[int, dict[str, tuple[int, ...]]]:
    """The exemplars of each scored rollout, by sample and pool."""
    exemplars_by_pool: dict[int, dict[str, tuple[int, ...]]] = {}
    for item in plan.scored:
        exemplars_by_pool.setdefault(item.key[1], {})[item.pool] = tuple(sorted(item.exemplars))
    return exemplars_by_pool


def test_the_exemplars_of_a_mixed_group(plan) -> None:
    group_plan = plan("ccff")
    assert scored(group_plan) == {
        0: {"base": (), "correct": (1,), "incorrect": (2, 3)},
        1: {"base": (), "correct": (0,), "incorrect": (2, 3)},
        2: {"base": (), "correct": (0, 1), "incorrect": (3,)},
        3: {"base": (), "correct": (0, 1), "incorrect": (2,)},
    }
    assert group_plan.left_out == Counter()


@pytest.mark.parametrize(
    ("outcomes", "overrides", "trained", "left_out"),
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
def test_trained_rollouts_and_the_reasons_of_others(
    plan, outcomes: str, overrides: list, trained: list, left_out: dict
) -> None:
    group_plan = plan(outcomes, *overrides)
    assert sorted(scored(group_plan)) == trained
    assert dict(group_plan.left_out) == left_out


def test_the_reference_replaces_an_empty_correct_pool(plan) -> None:
    assert scored(plan("cfff", "teacher.empty_pool=reference"))[0]["correct"] == (exemplars.REFERENCE,)


def test_the_reference_can_be_a_correct_exemplar(plan, prompter: Prompter) -> None:
    group_plan = plan("ccff", "teacher.reference_exemplar=true")
    assert scored(group_plan)[0]["correct"] == (exemplars.REFERENCE, 1)
    assert scored(group_plan)[3]["correct"] == (exemplars.REFERENCE, 0, 1)
    # It uses the template of exemplars: with the template of the reference, its style would not cancel.
    expected = tuple(prompter.teacher(PROBLEM.problem, PROBLEM.solution, reference=False))
    assert expected in {c.prompt_ids for s in group_plan.scored if s.pool == "correct" for c, _ in s.shares}
    capped = plan("ccff", "teacher.reference_exemplar=true", "teacher.max_exemplars=1")
    assert scored(capped)[3]["correct"] == (exemplars.REFERENCE,)
    bare = plan("ccff", "teacher.reference_exemplar=true", problem=Problem("p", PROBLEM.problem, "7"))
    assert scored(bare)[0]["correct"] == (1,)


def test_unanimous_groups_have_no_direction(plan) -> None:
    """Both pools have equal contexts with equal weights, so their averaged states are equal."""
    pools = {s.pool: s.shares for s in plan("cccc", "teacher.unanimous=anchor", "train.rollouts=all").scored}
    assert pools["correct"] == pools["incorrect"]


@pytest.mark.parametrize("own", ['template="{problem} WRONG: {exemplar}"', 'weights="live"'])
def test_unanimous_groups_have_no_direction_if_the_two_pools_are_not_alike(plan, own: str) -> None:
    """Equal exemplars in other words, or under other weights, would not cancel: both are the base pool."""
    declared = f'teacher.pools=[{{name="incorrect", reads="incorrect", {own}}}]'
    planned = plan("cccc", "teacher.unanimous=anchor", "train.rollouts=all", declared)
    shares = {s.pool: s.shares for s in planned.scored if s.key[1] == 0}
    assert shares["correct"] == shares["incorrect"] == shares["base"]
    mixed = {s.pool: s.shares for s in plan("ccff", declared).scored if s.key[1] == 0}
    assert mixed["correct"] != mixed["incorrect"] != mixed["base"]


def test_unanimous_groups_have_the_base_pool_as_target_under_contrastive(plan) -> None:
    """Its weights of the two pools do not cancel, so equal pools would leave the correct pool."""
    overrides = ("teacher.unanimous=anchor", "train.rollouts=all", "steer.recipe=contrastive")
    for s in plan("cccc", *overrides).scored:
        (context, share), *others = s.shares
        assert (share, others, s.exemplars) == (1.0, [], ())
        assert context.weights == "live"  # the anchor
    mixed = {s.pool: s.exemplars for s in plan("ccff", *overrides).scored if s.key[1] == 0}
    assert mixed == {"base": (), "correct": (1,), "incorrect": (2, 3)}


def test_another_rollout_with_equal_tokens_may_be_an_exemplar(plan) -> None:
    """It is a sample of its own. Only the rollout itself is excluded."""
    pools = scored(plan("ccff", same_text=True))
    assert pools[0]["correct"] == (1,)
    assert pools[2]["incorrect"] == (3,)


def test_opsd_leaves_out_problems_without_a_reference_solution(plan) -> None:
    bare = Problem("p", PROBLEM.problem, "7")
    group_plan = plan("ccff", "steer.recipe=opsd", "train.rollouts=all", problem=bare)
    assert group_plan.scored == []
    assert dict(group_plan.left_out) == {"no_reference_exemplar": 4}


def test_extra_pools_are_cached_if_they_have_exemplars(plan) -> None:
    pools = scored(plan("cfff", "steer.recipe=opsd", "train.rollouts=all", 'teacher.pools=["correct"]'))
    assert "correct" not in pools[0]
    assert pools[1]["correct"] == (0,)


def test_the_number_of_exemplars_is_limited(plan) -> None:
    pools_of = scored(plan("ccccffff", "teacher.max_exemplars=2"))
    assert all(len(pools[p]) == 2 for pools in pools_of.values() for p in ("correct", "incorrect"))


def test_long_exemplars_are_truncated_and_counted(plan, prompter: Prompter) -> None:
    whole, cut = plan("ccff"), plan("ccff", "teacher.exemplar_tokens=4")
    assert (whole.cut, cut.cut) == (0, 4)

    def longest_prompt(group_plan: exemplars.TeacherPlan) -> int:
        return max(len(c.prompt_ids) for s in group_plan.scored for c, _ in s.shares)

    assert longest_prompt(cut) < longest_prompt(whole)


def test_only_the_matches_of_the_pattern_are_shown_of_an_exemplar(plan, prompter: Prompter) -> None:
    settings = ["teacher.reference_exemplar=true", "teacher.exemplar_pattern='boxed.(.)'"]
    group_plan = plan("ccff", *settings)
    (item,) = [s for s in group_plan.scored if s.key[1] == 2 and s.pool == "correct"]
    expected = {tuple(prompter.teacher(PROBLEM.problem, shown)) for shown in ("0", "1", "7")}  # the answers alone
    assert {c.prompt_ids for c, _ in item.shares} == expected
    assert group_plan.unmatched == 0

    without = plan("ccff", "teacher.reference_exemplar=true", "teacher.exemplar_pattern=nothing")
    assert without.unmatched == 5  # four rollouts and the reference, shown whole
    whole = plan("ccff", "teacher.reference_exemplar=true")
    assert [s.shares for s in without.scored] == [s.shares for s in whole.scored]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [(r"\d = (\d)", "1\n2"), ("^b.*$", "b 3 = 2"), ("(a)|b", "a"), ("x*", "")],
)
def test_the_matches_of_a_pattern(pattern: str, found: str) -> None:
    assert exemplars.matches(pattern, "a 0 = 1\nb 3 = 2") == found


def test_a_prompt_without_room_for_an_exemplar_is_an_error(plan) -> None:
    long_problem = Problem("p", "1+" * 300 + "1", "7")
    with pytest.raises(ModelError, match="leave no room for an exemplar in a context of 512"):
        plan("ccff", problem=long_problem)


def test_equal_texts_share_a_context(plan) -> None:
    group_plan = plan("cccf" + "f", same_text=True)
    (item,) = [s for s in group_plan.scored if s.key[1] == 3 and s.pool == "correct"]
    assert len(item.shares) == 1
    assert item.shares[0][1] == 1.0
    assert len(item.exemplars) == 3


@pytest.mark.parametrize(
    ("weights", "anchor", "base"),
    [("frozen", "policy", "live"), ("frozen", "teacher", "frozen"), ("live", "policy", "live")],
)
def test_the_weights_that_run_the_base_pool(plan, weights: str, anchor: str, base: str) -> None:
    group_plan = plan("ccff", f"teacher.weights={weights}", f"teacher.anchor={anchor}")
    weights_by_pool = {(s.pool, c.weights) for s in group_plan.scored for c, _ in s.shares}
    assert weights_by_pool == {("base", base), ("correct", weights), ("incorrect", weights)}


def test_only_the_first_tokens_are_scored(plan) -> None:
    assert {len(s.token_ids) for s in plan("ccff", "train.tokens=5").scored} == {5}


@pytest.mark.parametrize("max_pairs", [1, 3, 40])
def test_a_batch_that_does_not_fit_is_halved_until_it_fits(
    policy: Policy, max_pairs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Halving does not change the states; a single sequence that does not fit raises ModelError."""
    contexts = [exemplars.Context("frozen", tuple(range(5, 12 + n))) for n in range(3)]
    scored = [
        exemplars.ScoredRollout((f"p{n}", s), "correct", tuple(range(20, 24 + s)), ((contexts[n], 1.0),), (0,))
        for n in range(3)
        for s in range(4)
    ]
    expected = teacher.score_rollouts(policy, scored, 16384)
    prompts, rollouts = [s.shares[0][0].prompt_ids for s in scored], [s.token_ids for s in scored]
    expected_sums = teacher.rollout_logprobs(policy, prompts, rollouts, 16384)
    run_continuations, batch_sizes = teacher.run_continuations, []

    def run_out_of_memory(policy: Policy, prefixes: list, pairs: list, batch_tokens: int):
        if len(pairs) > max_pairs:
            raise torch.OutOfMemoryError("CUDA out of memory")
        batch_sizes.append(len(pairs))
        return run_continuations(policy, prefixes, pairs, batch_tokens)

    monkeypatch.setattr(teacher, "run_continuations", run_out_of_memory)
    got = teacher.score_rollouts(policy, scored, 16384)
    assert sum(batch_sizes) == 12
    assert max(batch_sizes) <= max_pairs
    for key, states in expected.items():
        torch.testing.assert_close(got[key], states, atol=1e-5, rtol=1e-5)
    assert teacher.rollout_logprobs(policy, prompts, rollouts, 16384) == pytest.approx(expected_sums, abs=1e-4)
    max_pairs = 0
    with pytest.raises(
        ModelError, match=r"out of memory on one sequence of \d+ tokens: in a new run, lower teacher\.exemplar_tok"
    ):
        teacher.score_rollouts(policy, scored, 16384)
    with pytest.raises(ModelError, match=r"out of memory on one sequence of \d+ tokens: set evaluate\.base_kl = false"):
        teacher.rollout_logprobs(policy, prompts, rollouts, 16384)
