"""Studies: loading of files, intervals, paired differences, and errors."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import REPO

from ogls.analysis.study import (
    CURVES,
    Method,
    StudyConfig,
    curve_rows,
    load_study,
    mean_and_interval,
    result_rows,
    rounds_to_share,
    tuning_rows,
)
from ogls.analysis.study_figure import figure_rows, study_figure
from ogls.analysis.study_page import _method, _tuned_method, write_study_page
from ogls.analysis.study_problems import gain_rows, gains_markdown
from ogls.errors import ConfigError, StoreError

STUDIES = sorted((REPO / "deployments" / "studies").glob("*.toml"))
HEAD = f'seeds = [0, 1]\n[[methods]]\nname = "ogls-sd"\nconfig = "{REPO}/deployments/runs/tiny.toml"\n'


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
def test_shipped_studies_load_and_have_equal_budgets(path: Path) -> None:
    study, tuning, runs = load_study(path)
    methods = [m for _, of_case in study.by_case() for m in of_case]
    assert [*runs] == [(m.name, seed) for m in methods for seed in m.seeds or study.seeds]
    assert len({c.name for c in runs.values()}) == len(runs)
    for (method, seed), config in runs.items():
        assert config.name == f"{study.name}-{method}-s{seed}"
        assert _method(study, config) == method
        assert config.seed == seed
    for (method, value, seed), config in tuning.items():
        assert seed not in study.seeds
        assert config.train.learning_rate == value
        assert _tuned_method(study, config) == method


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('reference = "none"\n' + HEAD, "the reference none is not a method; methods: ogls-sd"),
        (HEAD + HEAD.split("\n", 1)[1], "method names must be unique; used twice: ogls-sd"),
        (HEAD + 2 * '[[cases]]\nname = "a"\n', "case names must be unique; used twice: a"),
        (
            HEAD
            + HEAD.split("\n", 1)[1].replace("ogls-sd", "b-ogls-sd")
            + '[[cases]]\nname="a"\n[[cases]]\nname="a-b"\n',
            "case-method names must be unique; used twice: a-b-ogls-sd",
        ),
        (HEAD + 'set = ["train.epoch=2"]\n', "train.epoch: unknown key; did you mean epochs?"),
        (HEAD + '[[methods]]\nname = "b"\nconfig = "none.toml"\n', "no configuration file"),
        (HEAD.replace("seeds", "seed"), "seed: Extra inputs are not permitted"),
        (
            HEAD + HEAD.split("\n", 1)[1].replace("ogls-sd", "more") + 'set = ["rollout.samples=9"]\n',
            "the methods must sample the same number of rollouts",
        ),
        ("seeds = [\n", "study.toml"),
        (HEAD + "[tune]\nseeds = [1, 2]\n", "seeds [1] are used by the study and by tuning"),
    ],
)
def test_a_mistake_in_a_study_raises(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "study.toml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_study(tmp_path / "study.toml")
    assert message in str(caught.value)


def test_the_interval_over_seeds_is_students_t() -> None:
    mean, low, high = mean_and_interval([0.1, 0.2, 0.3])
    assert mean == pytest.approx(0.2)
    assert high - mean == pytest.approx(4.3026527 * 0.1 / 3**0.5)
    assert mean - low == pytest.approx(high - mean)
    assert mean_and_interval([0.4]) == (0.4, 0.4, 0.4)


def summaries(accuracies: list[float], length: float = 30.0) -> list[dict]:
    rest = {m: 0.5 for m in CURVES if m not in ("accuracy", "mean_length")}
    return [
        {"round": r, "accuracy": a, "mean_length": length, "accuracy_low": a - 0.02, "accuracy_high": a + 0.04, **rest}
        for r, a in enumerate(accuracies)
    ]


RUNS = {
    ("ogls-sd", 0): summaries([0.5, 0.7, 0.9]),
    ("ogls-sd", 1): summaries([0.5, 0.6, 0.8]),
    ("opsd", 0): summaries([0.5, 0.3, 0.2], 18),
    ("opsd", 1): summaries([0.5, 0.95, 0.3], 20),
}


def test_the_last_round_is_the_result_and_differences_are_paired() -> None:
    seconds = {key: 10.0 + key[1] for key in RUNS}
    ogls, opsd = result_rows(RUNS, seconds, {"ogls-sd": "ogls-sd", "opsd": "ogls-sd"})
    assert (ogls["accuracy"], ogls["difference"]) == (pytest.approx(0.85), None)
    assert opsd["accuracy"] == pytest.approx(0.25)  # the 0.95 of round 1 is not the result
    mean, low, high = opsd["difference"]
    assert mean == pytest.approx(-0.6)
    assert high - low == pytest.approx(2 * 12.7062047 * 0.1)
    assert ogls["problem_interval"] == pytest.approx(0.03)
    assert (opsd["mean_length"], ogls["seconds"]) == (19, 10.5)
    assert (ogls["rounds_to_90"], opsd["rounds_to_90"]) == (2, None)


def test_gains_and_differences_are_paired_by_problem() -> None:
    def solved(*shares: int) -> dict[str, dict[str, list[bool]]]:
        """Ten problems; each number is how many of four completions solve it, and greedy decoding if all do."""
        sampled = {f"p{i}": [n < s for n in range(4)] for i, s in enumerate(shares * 2)}
        return {"sampled": sampled, "greedy": {p: [all(v)] for p, v in sampled.items()}}

    keys = [("a", 0), ("a", 1), ("b", 0), ("b", 2)]
    before = dict.fromkeys(keys, solved(0, 1, 2, 3, 4))
    after = {
        ("a", 0): solved(1, 2, 3, 4, 4),
        ("a", 1): solved(1, 2, 3, 4, 4),
        ("b", 0): solved(0, 1, 2, 3, 3),
        ("b", 2): solved(0, 0, 0, 0, 0),  # no run of the reference has this seed
    }
    sampled, greedy, other, _ = gain_rows(before, after, {"a": "a", "b": "a"})
    assert (sampled["decoding"], sampled["problems"], sampled["difference"]) == ("sampled", 10, None)
    assert (sampled["before"], sampled["after"]) == (0.5, 0.7)
    gain, low, high = sampled["gain"]
    assert gain == pytest.approx(0.2)
    assert 0.1 < low < 0.2 < high <= 0.25  # of 10 problems, 8 gain a quarter and 2 nothing
    assert (greedy["before"], greedy["after"]) == (0.2, 0.4)
    assert other["gain"][0] == pytest.approx(9 / 40 - 0.5)
    assert other["difference"] == pytest.approx((-0.25, -0.25, -0.25))
    table = gains_markdown([sampled, greedy], "a").splitlines()
    assert table[2].startswith("| a | 0.500 | 0.700 | +0.200 (+")
    assert table[2].count("|") == table[0].count("|") == 10


def test_rounds_to_a_share_of_the_gain() -> None:
    curve = [{"round": r, "mean": m} for r, m in enumerate([0.5, 0.8, 0.87, 0.9])]
    assert rounds_to_share(curve) == 2
    assert rounds_to_share(curve, 0.5) == 1
    assert rounds_to_share(curve[::-1]) is None


def test_curves_and_their_figure() -> None:
    curves = {measure: curve_rows(RUNS, measure) for measure in CURVES}
    assert [(r["method"], r["round"]) for r in curves["accuracy"]] == [
        (m, r) for m in ("ogls-sd", "opsd") for r in (0, 1, 2)
    ]
    assert curves["accuracy"][1]["mean"] == pytest.approx(0.65)
    pass_rows = [{"method": "opsd", "k": k, "mean": 0.1 * k, "low": 0.0, "high": 0.5} for k in (1, 2)]
    assert study_figure([["ogls-sd", "opsd"]], curves, pass_rows)[:4] == b"\x89PNG"


def test_the_rows_of_a_figure_have_five_lines_at_most() -> None:
    configs = ["a"] + ["a"] * 5 + ["b", "c"] + ["d"] * 3
    methods = tuple(Method(name=f"m{i}", config=config) for i, config in enumerate(configs))
    assert figure_rows(StudyConfig(reference="m0", methods=methods)) == [
        ["m0", "m1", "m2", "m3"],
        ["m0", "m4", "m5", "m6", "m7"],
        ["m0", "m8", "m9", "m10"],
    ]
    assert figure_rows(StudyConfig(reference="m0", methods=methods[:1])) == [["m0"]]


def test_every_method_runs_in_every_case(tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text(
        f'''
        seeds = [0, 1]
        set = ["evaluate.every=3", "train.learning_rate=1e-3"]
        [[methods]]
        config = "{REPO}/deployments/runs/tiny.toml"
        [[methods]]
        name = "slow"
        config = "{REPO}/deployments/runs/tiny.toml"
        set = ["train.learning_rate=1e-5"]
        [[cases]]
        name = "short"
        set = ["rollout.max_tokens=32"]
        [[cases]]
        name = "long"
        set = ["rollout.max_tokens=128", "train.learning_rate=1e-4"]
        '''
    )
    study, _, runs = load_study(tmp_path / "study.toml")
    assert study.references() == {name: f"{name.split('-')[0]}-ogls-sd" for name, _ in runs}
    names = ["short-ogls-sd", "short-slow", "long-ogls-sd", "long-slow"]
    assert list(runs) == [(name, seed) for name in names for seed in (0, 1)]
    of_run = [runs[name, 1] for name in names]
    assert [c.rollout.max_tokens for c in of_run] == [32, 32, 128, 128]
    assert [c.train.learning_rate for c in of_run] == [1e-3, 1e-5, 1e-4, 1e-5]  # study, then case, then method
    assert [c.name for c in of_run] == [f"study-{name}-s1" for name in names]
    assert figure_rows(study) == [names[:2], names[2:]]  # the reference of each case first


def test_the_best_value_is_selected_for_each_method() -> None:
    rows = tuning_rows({("a", 1e-4): [0.4, 0.6], ("a", 1e-3): [0.5, 0.7], ("b", 1e-4): [0.3], ("b", 1e-3): [0.3]})
    assert [(r["method"], r["value"]) for r in rows if r["chosen"]] == [("a", 1e-3), ("b", 1e-4)]
    assert rows[1]["accuracy"] == pytest.approx(0.6)


def test_an_unfinished_run_raises(tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text(f'root = "{tmp_path}/runs"\nout = "{tmp_path}/out"\n' + HEAD)
    study, _, runs = load_study(tmp_path / "study.toml")
    with pytest.raises(
        StoreError, match=r"2 runs of the study are not finished \(study-ogls-sd-s0, study-ogls-sd-s1\)"
    ):
        write_study_page(study, list(runs.values()))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "folder"),
    [
        ({}, "data/studies/study"),
        ({"root": "elsewhere/runs"}, "elsewhere/studies/study"),
        ({"root": "s3://bucket/runs"}, "data/studies/study"),
        ({"root": "elsewhere/runs", "out": "pages"}, "pages/study"),
    ],
)
def test_the_page_of_a_study_is_beside_its_runs(settings: dict[str, str], folder: str) -> None:
    methods = ({"name": "ogls-sd"},)
    assert StudyConfig.model_validate({"methods": methods, **settings}).folder == Path(folder)
