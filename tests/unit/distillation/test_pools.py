"""Declared pools: what each kind reads, who computes it, which exemplars it takes; invalid declarations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, small_config

from ogls.config import Recipe, RunConfig, SteerConfig, load_config
from ogls.config.fingerprint import canonical_json, fingerprint
from ogls.distillation.exemplars import COLUMN, REFERENCE, ContextPlanner, TeacherPlan
from ogls.errors import ConfigError
from ogls.models.policy import Policy
from ogls.problems.prompts import Prompter
from ogls.records import Problem, Rollout

HINT = {"hint": "Add first.", "source": "sums"}
PROBLEM = Problem("p", r"Modulo 10, left to right: $3+4$", "7", "3+4=7\n\\boxed{7}", columns=HINT)
TEXTS = ("3+4=7\n\\boxed{7}", "3+4=7\n7+0=7\n\\boxed{7}", "3+4=8\n\\boxed{8}", "3+4=7\n7+0=1\n\\boxed{1}")
OUTCOMES = ("correct", "correct", "failed", "failed")


def declared(*pools: str, **recipe: float) -> list[str]:
    """Overrides that declare pools (TOML inline tables) and give a custom recipe."""
    weights = ", ".join(f"{name} = {weight}" for name, weight in recipe.items())
    return [
        f"teacher.pools=[{', '.join(pools)}]",
        "steer.recipe=custom",
        f"steer.weights={{{weights}}}",
        "train.rollouts=all",
    ]


@pytest.fixture
def plan(policy: Policy, prompter: Prompter, tmp_path: Path) -> Any:
    """A function that plans the group of TEXTS with overrides."""

    def make(*overrides: str) -> tuple[TeacherPlan, Prompter]:
        rollouts = []
        for i, (text, outcome) in enumerate(zip(TEXTS, OUTCOMES, strict=True)):
            ids = tuple(prompter.tokenizer(text, add_special_tokens=False)["input_ids"])
            feedback = "Its last digit is wrong." if outcome == "failed" else ""
            rollouts.append(Rollout("p", i, (5, 6), ids, text, outcome, feedback=feedback))
        config = small_config(tmp_path, *overrides)
        return ContextPlanner(config, prompter, policy.context).group(PROBLEM, rollouts), prompter

    return make


def prompts(plan: TeacherPlan, prompter: Prompter, sample: int, pool: str) -> list[str]:
    """The rendered prompts of a pool of a rollout, in order of their tokens."""
    (item,) = [s for s in plan.scored if s.key[1] == sample and s.pool == pool]
    return [prompter.tokenizer.decode(context.prompt_ids) for context, _ in item.shares]


def test_a_pool_reads_a_column_of_the_problem(plan: Any) -> None:
    pool = '{name="hinted", reads="hint", template="{problem} HINT {exemplar}"}'
    group_plan, prompter = plan(*declared(pool, base=0, hinted=1))
    assert {s.pool for s in group_plan.scored} == {"base", "hinted"}
    (text,) = prompts(group_plan, prompter, 0, "hinted")
    assert f"{PROBLEM.problem} HINT Add first." in text
    assert {s.exemplars for s in group_plan.scored if s.pool == "hinted"} == {(COLUMN,)}


def test_a_pool_reads_the_rollout_and_the_feedback_on_it(plan: Any) -> None:
    group_plan, prompter = plan(*declared('{name="told", reads="feedback"}', base=0, told=1))
    assert group_plan.left_out == {"no_told_exemplar": 2}  # correct rollouts have no feedback
    (text,) = prompts(group_plan, prompter, 2, "told")
    assert TEXTS[2] in text
    assert "About this attempt: Its last digit is wrong." in text
    assert {(s.key[1], s.exemplars) for s in group_plan.scored if s.pool == "told"} == {(2, (2,)), (3, (3,))}


def test_a_pool_has_its_own_words_without_an_exemplar(plan: Any) -> None:
    pool = '{name="careful", template="Be careful. {problem}"}'
    group_plan, prompter = plan(*declared(pool, base=0, careful=1))
    assert prompts(group_plan, prompter, 1, "careful")[0].count("Be careful. Modulo") == 1
    assert "careful" not in prompts(group_plan, prompter, 1, "base")[0]


@pytest.mark.parametrize(
    ("choose", "of_correct", "of_failed"),
    [
        ("shortest", {0: (1,), 1: (0,), 2: (0,), 3: (0,)}, {0: (2,), 1: (2,), 2: (3,), 3: (2,)}),
        ("longest", {0: (1,), 1: (0,), 2: (1,), 3: (1,)}, {0: (3,), 1: (3,), 2: (3,), 3: (2,)}),
        ("nearest", {0: (1,), 1: (0,), 2: (1,), 3: (0,)}, {0: (3,), 1: (3,), 2: (3,), 3: (2,)}),
    ],
)
def test_which_exemplars_a_pool_takes(plan: Any, choose: str, of_correct: Any, of_failed: Any) -> None:
    """The third failed rollout parts from the correct ones last; a rollout never reads itself."""
    pools = [f'{{name="{name}", choose="{choose}", max_exemplars=1}}' for name in ("correct", "incorrect")]
    group_plan, _ = plan(f"teacher.pools=[{', '.join(pools)}]")
    by_pool = {
        pool: {s.key[1]: s.exemplars for s in group_plan.scored if s.pool == pool} for pool in ("correct", "incorrect")
    }
    assert by_pool == {"correct": of_correct, "incorrect": of_failed}


def test_a_second_pool_of_correct_rollouts_excludes_the_rollout_too(plan: Any) -> None:
    pool = '{name="one", reads="correct", max_exemplars=1}'
    group_plan, _ = plan(*declared(pool, base=0.5, one=0.5))
    for item in group_plan.scored:
        if item.pool == "one":
            assert len(item.exemplars) == 1
            assert item.key[1] not in item.exemplars


def test_who_computes_a_pool(plan: Any) -> None:
    pools = (
        '{name="now", weights="live"}',
        '{name="mean", weights="ema", reads="reference"}',
        '{name="base", weights="frozen"}',
    )
    group_plan, _ = plan(*declared(*pools, base=0.5, now=0.25, mean=0.25), "teacher.weights=live")
    weights = {s.pool: s.shares[0][0].weights for s in group_plan.scored}
    assert weights == {"base": "frozen", "now": "live", "mean": "ema"}
    assert {s.exemplars for s in group_plan.scored if s.pool == "mean"} == {(REFERENCE,)}


def test_weights_depend_on_the_source_of_the_problem(plan: Any) -> None:
    group_plan, _ = plan("steer.recipe=opsd", "steer.sources.sums={base=0, correct=1}", "train.rollouts=all")
    assert group_plan.left_out == {}
    steer = SteerConfig.model_validate({"recipe": "opsd", "sources": {"sums": {"base": 0, "correct": 1}}})
    assert steer.recipe_for("sums").weights() == {"correct": 1}
    assert steer.recipe_for("other").weights() == steer.recipe_for(None).weights() == {"reference": 1}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ['teacher.pools=["expert"]'],
            "names the pool expert, which is not declared; declared pools: base, reference",
        ),
        (declared('{name="expert"}', base=0, exprt=1), "the recipe names the pool exprt.*did you mean expert?"),
        (["teacher.pools=[{name='a'}, {name='a'}]"], "declares a more than once"),
        (
            ["teacher.pools=[{name='a', reads='hint'}]"],
            "pool a reads the column hint of the problems, so it needs",
        ),
        (["teacher.pools=[{name='a', reads='correct', template='{problem}'}]"], r"must contain \{exemplar\}"),
        (["teacher.pools=[{name='a', model='m', weights='live'}]"], "another model is frozen, so weights = live"),
        (["teacher.pools=[{name='a', revision='main'}]"], "revision is of `model`, which is not set"),
        (["teacher.pools=[{name='A b'}]"], "name: String should match pattern"),
        (["teacher.pools=[{name='a', read='correct'}]"], r"pools\.0\.read: unknown key; did you mean reads\?$"),
        (
            ["teacher.pools=[{name='a', reads='correct', template='{problem} {exemplar} {answer}'}]"],
            r"pools\.0: pool a reads correct, so its template cannot contain \{answer\}, only",
        ),
        (["teacher.pools=[{name='base', reads='reference'}]"], "the pool base reads nothing: .* another name"),
        (
            [
                *declared('{name="a", reads="correct", model="m"}', base=0, a=1.5, incorrect=-0.5),
                "teacher.unanimous=anchor",
            ],
            "teacher.unanimous = anchor puts the base pool in place of a, which another model computes",
        ),
        (["train.loss=forward_k"], r"train\.loss: a function of your own is written module:function; those built in"),
        (declared('{name="expert"}', expert=1), "recipe weights must sum to 1, but they sum to 2"),
    ],
)
def test_an_invalid_declaration_is_an_error(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(TINY, overrides)


def test_latex_in_a_template_is_no_placeholder() -> None:
    template = r"{problem} {exemplar} as \\boxed{answer} or \\frac{a}{b}"
    config = load_config(TINY, [f'teacher.pools=[{{name="a", reads="correct", template="{template}"}}]'])
    assert config.declared_pools()["a"].template.endswith(r"\boxed{answer} or \frac{a}{b}")


def test_declarations_identify_a_run_and_names_alone_do_so_as_before(tmp_path: Path) -> None:
    named = small_config(tmp_path)
    assert '"pools":["reference"]' in canonical_json(named.teacher)
    assert "sources" not in canonical_json(named.steer)
    assert "feedback" not in canonical_json(named.prompts)
    one = small_config(tmp_path, "teacher.pools=[{name='a', max_exemplars=1}]")
    other = small_config(tmp_path, "teacher.pools=[{name='a', max_exemplars=2}]")
    assert fingerprint(one.teacher) != fingerprint(other.teacher)
    assert fingerprint(Recipe(base=0.5, correct=0.5)) != fingerprint(Recipe(base=0.5, correct=0.5, a=0.0))
    assert fingerprint(Recipe.model_validate({"base": 0.5, "a": 0.5})) != fingerprint(
        Recipe.model_validate({"base": 0.5, "b": 0.5})
    )


def test_a_run_config_with_pools_survives_toml(tmp_path: Path) -> None:
    from ogls.config import to_toml

    config = small_config(tmp_path, *declared('{name="a", reads="correct", choose="nearest"}', base=0.5, a=0.5))
    (tmp_path / "run.toml").write_text(to_toml(config))
    assert load_config(tmp_path / "run.toml") == config
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config
    assert config.pools() == ("base", "a")
