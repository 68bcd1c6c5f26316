"""Groups, search and problems over rounds: what the token view says of all rollouts of a run is what the store has."""

from __future__ import annotations

from collections import Counter

import pytest
from conftest import carry_out, small_config

from ogls.analysis.no_target import reasons_without_target
from ogls.analysis.rollout_groups import GroupReader, read_completions
from ogls.analysis.rollout_search import Search, read_history, search_rollouts
from ogls.config import RunConfig
from ogls.distillation.exemplars import ContextPlanner
from ogls.errors import UserError
from ogls.models.load import load_tokenizer
from ogls.problems.prompts import Prompter
from ogls.records import Problem, Rollout
from ogls.stages.run import Run
from ogls.store import run_query

PROBLEM = Problem("p", "1+1", "2")


@pytest.fixture(scope="module")
def reader(finished: Run) -> GroupReader:
    problems = {p.problem_id: p for p in finished.problems("train")}
    return GroupReader(finished, load_tokenizer(finished.config.model), problems)


def test_every_rollout_has_a_target_or_a_reason(finished: Run, reader: GroupReader) -> None:
    groups = reader.read(reader.ids())
    assert len(groups) == 16
    assert reader.count()[0] == sum(len(g["rollouts"]) for g in groups) == 64
    targets = run_query(finished.store, "SELECT * FROM targets ORDER BY position", "tiny").to_pylist()
    gains: dict[tuple, list[float]] = {}
    for t in targets:
        change = t["token_target_logprob"] - t["token_base_logprob"]
        gains.setdefault((t["round"], t["problem_id"], t["sample"]), []).append(change)
    rows = run_query(finished.store, "SELECT * FROM trajectories JOIN verdicts USING (round, problem_id, sample)")
    by_key = {(r["round"], r["problem_id"], r["sample"]): r for r in rows.to_pylist()}
    reasons: Counter[str] = Counter()
    for group in groups:
        assert [r["sample"] for r in group["rollouts"]] == [0, 1, 2, 3]
        for rollout in group["rollouts"]:
            key = group["round"], group["problem_id"], rollout["sample"]
            assert (rollout["verdict"], rollout["answer"]) == (by_key[key]["verdict"], by_key[key]["answer"])
            assert len(rollout["text"]) == by_key[key]["n_tokens"]
            if key in gains:
                shown = rollout["gains"] or [0.0] * len(gains[key])
                assert shown == pytest.approx(gains[key], abs=6e-3)
            else:
                reasons[rollout["why"]] += 1
    assert reasons  # and the reasons count what the teacher left out
    planned = [finished.records.manifest("teacher_states", r).metrics["left_out"] for r in (1, 2)]
    assert sum(reasons.values()) == sum(sum(left_out.values()) for left_out in planned)


def rollouts(*outcomes: str) -> list[Rollout]:
    return [Rollout("p", i, (1,), (i + 5,), str(i), outcome) for i, outcome in enumerate(outcomes)]


@pytest.mark.parametrize(
    ("overrides", "outcomes", "expected"),
    [
        ({}, ("correct", "correct", "failed"), {2: "it is the only failed rollout of its group"}),
        ({"train.rollouts": "incorrect"}, ("correct", "failed", "failed"), {0: "correct rollouts are not distilled"}),
        (
            {"train.rollouts": "mixed_groups"},
            ("failed", "failed"),
            {1: "all decided rollouts of its group failed"},
        ),
        (
            {"teacher.unanimous": "skip", "train.rollouts": "all"},
            ("correct", "correct"),
            {0: "no rollout of its group is failed"},
        ),
        ({}, ("undecided", "correct", "failed"), {0: "its verdict is undecided"}),
        ({"steer.recipe": "opsd"}, ("correct", "failed"), {0: "no reference solution", 1: "no reference solution"}),
    ],
)
def test_the_reason_of_a_missing_target(
    overrides: dict, outcomes: tuple, expected: dict, prompter: Prompter, tmp_path
) -> None:
    config: RunConfig = small_config(tmp_path, *(f"{k}={v}" for k, v in overrides.items()))
    group = rollouts(*outcomes)
    found = reasons_without_target(ContextPlanner(config, prompter, 0), PROBLEM, group)
    for sample, text in expected.items():
        assert text in found["p", sample]


@pytest.mark.parametrize(
    ("values", "condition"),
    [
        ({"verdict": "correct"}, "verdict = 'correct'"),
        ({"round": "2", "target": "without"}, "round = 2 AND kl IS NULL"),
        ({"text": "BOXED{4}"}, "contains(lower(text), 'boxed{4}')"),
        ({"text": "' OR true --"}, "false"),
    ],
)
def test_search_finds_what_sql_finds(finished: Run, values: dict, condition: str) -> None:
    found = search_rollouts(finished, Search.parse(values), limit=5)
    sql = f"""SELECT count(*) AS n FROM trajectories JOIN verdicts USING (round, problem_id, sample)
              LEFT JOIN steered USING (round, problem_id, sample) WHERE {condition}"""
    (row,) = run_query(finished.store, sql, "tiny").to_pylist()
    assert found["total"] == row["n"]
    assert len(found["rows"]) == min(5, row["n"])


def test_search_by_group_and_order(finished: Run) -> None:
    groups = {
        kind: {(r["round"], r["problem_id"]) for r in search_rollouts(finished, Search(group=kind))["rows"]}
        for kind in ("mixed", "correct", "failed")
    }
    for round_ in (1, 2):
        metrics = finished.records.manifest("verdicts", round_).metrics
        assert sum(r == round_ for r, _ in groups["mixed"]) == metrics["mixed_groups"]
    assert not groups["mixed"] & (groups["correct"] | groups["failed"])
    by_kl = [r["kl"] for r in search_rollouts(finished, Search(target="with", sort="kl"))["rows"]]
    assert by_kl == sorted(by_kl, reverse=True)
    for wrong, message in (
        ({"sort": "x"}, "unknown sort 'x'"),
        ({"round": "one"}, "is a number, not 'one'"),
        ({"sql": "1"}, "unknown search field sql"),
    ):
        with pytest.raises(UserError, match=message):
            Search.parse(wrong)


def test_problems_over_rounds_are_the_scores(finished: Run) -> None:
    (split,) = read_history(finished)  # no training problem is sampled twice
    assert (split["rounds"], split["total"]) == ([0, 1, 2], 8)
    for index, round_ in enumerate(split["rounds"]):
        (summary,) = finished.records.read("summaries", round_).to_pylist()
        cells = [p["cells"][index] for p in split["problems"]]
        assert sum(c[0] for c in cells) / sum(c[1] for c in cells) == pytest.approx(summary["accuracy"])
        assert sum(c[2] for c in cells) / len(cells) == pytest.approx(summary["greedy_accuracy"])
    changes = [p["cells"][-1][0] - p["cells"][0][0] for p in split["problems"]]
    assert changes == sorted(changes, reverse=True)


def test_completions_of_a_benchmark_problem(finished: Run, reader: GroupReader) -> None:
    (split,) = read_history(finished)
    name = split["problems"][0]["id"]
    group = read_completions(finished, reader.tokenizer, split["split"], 2, name)
    assert [(r["sample"], r["greedy"]) for r in group["rollouts"]] == [(0, False), (1, False), (0, True)]
    texts = {r["text"] for r in finished.records.read("scores", 2).to_pylist() if r["problem_id"] == name}
    assert {"".join(r["text"]) for r in group["rollouts"]} == texts
    with pytest.raises(UserError, match="no completions of problem nobody"):
        read_completions(finished, reader.tokenizer, split["split"], 2, "nobody")


def test_a_method_without_a_teacher_says_so(tmp_path) -> None:
    run = carry_out(small_config(tmp_path, "name=grpo", "train.objective=grpo", "rounds=1"))
    problems = {p.problem_id: p for p in run.problems("train")}
    groups = GroupReader(run, load_tokenizer(run.config.model), problems).read([(1, next(iter(problems)))])
    assert all(r["why"] == "this method has no teacher" for g in groups for r in g["rollouts"])


def test_a_page_has_no_more_groups_than_it_can_hold(reader: GroupReader) -> None:
    ids = reader.ids()
    tokens = [sum(len(r["text"]) for r in group["rollouts"]) for group in reader.read(ids)]
    assert reader.within(ids, sum(tokens)) == ids
    assert reader.within([*ids, *ids], sum(tokens[:3]) + 1) == ids[:3]
    assert reader.within(ids, 0) == []
