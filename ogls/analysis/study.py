"""A study: methods x seeds with equal numbers of rollouts, and the results of its runs as rows.

All runs of a study use the same problems and sampling seeds; methods differ only in their configuration. The result of
a run is its last round, not its best round. There are two kinds of intervals: over problems (bootstrap, within a run)
and over seeds (Student's t, between runs).
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError, model_validator

from ogls.config import RunConfig, Section, load_config, setting
from ogls.errors import ConfigError

_NAME = r"^[a-z0-9][a-z0-9._-]*$"


class Method(Section):
    """One method: a configuration file and overrides."""

    name: str = setting("ogls-sd", "Name in tables and figures.", pattern=_NAME)
    config: str = setting("tiny.toml", "Configuration file (TOML), relative to the folder of the study file.")
    set: tuple[str, ...] = setting((), "Overrides for this method: section.key=value.")
    seeds: tuple[int, ...] = setting((), "Seeds of this method; empty: those of the study.")


class Case(Section):
    """A condition under which every method runs, such as another world."""

    name: str = setting("case", "Name of the case; its methods are CASE-METHOD.", pattern=_NAME)
    set: tuple[str, ...] = setting((), "Overrides for this case: section.key=value. Those of a method come after them.")


class Tuning(Section):
    """A grid search over one setting before the study, with the same values for every method and separate seeds."""

    key: str = setting("train.learning_rate", "The setting to tune: section.key.")
    values: tuple[float, ...] = setting(
        (1e-4, 3e-4, 1e-3), "Values of the grid; each has one run per method and seed.", min_length=2
    )
    seeds: tuple[int, ...] = setting(
        (100,), "Seeds of the tuning runs; they must not be seeds of the study.", min_length=1
    )
    rounds: int = setting(
        6,
        "Rounds of a tuning run. The value with the best mean accuracy on the holdout in the last round is selected.",
        ge=1,
    )
    holdout: int = setting(
        100,
        "Training problems that every tuning run sets aside to select the value by. The benchmarks, which the study "
        "reports, are not used for it.",
        ge=1,
    )
    set: tuple[str, ...] = setting((), "Overrides for tuning runs only: section.key=value.")


class StudyConfig(Section):
    """The settings of a study: every method runs once with every seed."""

    name: str = setting("study", "Name of the study; its runs are NAME-METHOD-sSEED.", pattern=_NAME)
    root: str = setting("data/runs", "The store of the runs.", min_length=1)
    out: str = setting(
        "",
        "Folder for the pages and figures of studies; each study has a subfolder with its name. Empty: the folder "
        "studies beside a local root, and data/studies for another root.",
    )
    seeds: tuple[int, ...] = setting((0, 1, 2), "Seeds. Every method runs once with each seed.", min_length=1)
    set: tuple[str, ...] = setting((), "Overrides for every method: section.key=value.")
    at_once: int = setting(
        1,
        "Maximum number of runs at the same time, each in a separate process, and spread over the GPUs of the machine.",
        ge=1,
    )
    reference: str = setting(
        "ogls-sd", "The method that the other methods are compared with; with cases, in the same case."
    )
    methods: tuple[Method, ...] = setting((Method(),), "The methods.", min_length=1)
    cases: tuple[Case, ...] = setting((), "Conditions; every method runs in each of them. Empty: no conditions.")
    tune: Tuning | None = setting(None, "Tune one setting for each method before the study.")

    @property
    def folder(self) -> Path:
        """The folder of the page and the figures."""
        beside = "data/studies" if "://" in self.root else Path(self.root).parent / "studies"
        return Path(self.out or beside) / self.name

    def by_case(self) -> list[tuple[str, tuple[Method, ...]]]:
        """The methods of each case as they run, and the name of the one that the others are compared with.

        Without cases, one entry with the methods as they are.
        """
        if not self.cases:
            return [(self.reference, self.methods)]
        return [
            (
                f"{case.name}-{self.reference}",
                tuple(
                    m.model_copy(update={"name": f"{case.name}-{m.name}", "set": (*case.set, *m.set)})
                    for m in self.methods
                ),
            )
            for case in self.cases
        ]

    def references(self) -> dict[str, str]:
        """The method that each method is compared with."""
        return {m.name: reference for reference, methods in self.by_case() for m in methods}

    @model_validator(mode="after")
    def _check(self) -> StudyConfig:
        names = [m.name for m in self.methods]
        for kind, given in (
            ("method", names),
            ("case", [c.name for c in self.cases]),
            ("case-method", [m.name for _, methods in self.by_case() for m in methods]),
        ):
            if duplicates := sorted({n for n in given if given.count(n) > 1}):
                raise ValueError(f"{kind} names must be unique; used twice: {', '.join(duplicates)}")
        if self.reference not in names:
            raise ValueError(f"the reference {self.reference} is not a method; methods: {', '.join(names)}")
        used = {*self.seeds, *(seed for m in self.methods for seed in m.seeds)}
        if self.tune and (shared := sorted(used.intersection(self.tune.seeds))):
            raise ValueError(f"seeds {shared} are used by the study and by tuning: tune on other seeds")
        return self


class StudyRuns(NamedTuple):
    """A study and the configurations of its runs."""

    study: StudyConfig
    tuning: dict[tuple[str, float, int], RunConfig]  # by method, value and seed
    runs: dict[tuple[str, int], RunConfig]  # by method and seed, before tuning


def load_study(path: str | Path) -> StudyRuns:
    """Read the TOML file of a study.

    Raises ConfigError if a setting of the study or of a run is invalid, or if the runs sample different numbers of
    rollouts.
    """
    path = Path(path)
    try:
        study = StudyConfig.model_validate(tomllib.loads(path.read_text()))
    except FileNotFoundError:
        raise ConfigError(f"no study {path}; the shipped studies are in deployments/studies/") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ConfigError(f"{path}: " + "\n  ".join(lines)) from None
    runs, tuning = {}, {}

    def config(method: Method, prefix: str, seed: int, *extra: str) -> RunConfig:
        of_run = [f"name={study.name}-{prefix}{method.name}-s{seed}", f"root={study.root}", f"seed={seed}"]
        return load_config(path.parent / method.config, [*study.set, *method.set, *of_run, *extra])

    for _, methods in study.by_case():
        budgets = set()
        for method in methods:
            for seed in method.seeds or study.seeds:
                c = runs[method.name, seed] = config(method, "", seed)
                budgets.add((c.problems.per_round, c.rollout.samples, c.rounds, c.rollout.max_tokens))
            if not (tune := study.tune):
                continue
            for (index, value), seed in product(enumerate(tune.values), tune.seeds):
                of_tuning = (f"{tune.key}={value}", f"rounds={tune.rounds}", f"problems.holdout={tune.holdout}")
                tuning[method.name, value, seed] = config(method, f"tune{index}-", seed, *tune.set, *of_tuning)
        if len(budgets) > 1:
            raise ConfigError(
                f"{path}: the methods must sample the same number of rollouts: (problems.per_round, rollout.samples, "
                f"rounds, rollout.max_tokens) is {' and '.join(map(str, sorted(budgets)))}"
            )
    return StudyRuns(study, tuning, runs)


def tuning_rows(accuracies: Mapping[tuple[str, float], Sequence[float]]) -> list[dict[str, Any]]:
    """Return one row per method and value: mean accuracy over tuning seeds, and whether the value is selected.

    `accuracies` has the accuracy of each tuning seed by (method, value). The value with the best mean is selected; of
    values with equal means, the smallest.
    """
    means = {key: sum(values) / len(values) for key, values in accuracies.items()}
    best = {m: max((v for n, v in means if n == m), key=lambda v: (means[m, v], -v)) for m, _ in means}
    return [{"method": m, "value": v, "accuracy": mean, "chosen": best[m] == v} for (m, v), mean in means.items()]


def mean_and_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean of values (one per seed) and its 95% interval by Student's t: (mean, low, high).

    The interval of a single value has no width.
    """
    from scipy import stats

    n = len(values)
    mean = sum(values) / n
    if n == 1:
        return mean, mean, mean
    error = (sum((v - mean) ** 2 for v in values) / (n - 1) / n) ** 0.5
    half = error * float(stats.t.ppf(0.975, n - 1))
    return mean, mean - half, mean + half


CURVES = ("accuracy", "greedy_accuracy", "mean_length", "entropy", "kl_base", "truncated", "distinct_answers")


def curve_rows(runs: Mapping[tuple[str, int], Sequence[Mapping[str, Any]]], measure: str) -> list[dict[str, Any]]:
    """Return the mean of one measure over seeds with its interval, by method and round.

    `runs` has the summaries of each run by (method, seed). Rounds that some seed of the method has not evaluated are
    left out.
    """
    rows = []
    for method in dict.fromkeys(m for m, _ in runs):
        of_method = [summaries for (m, _), summaries in runs.items() if m == method]
        for round_ in sorted({s["round"] for summaries in of_method for s in summaries}):
            values = [s[measure] for summaries in of_method for s in summaries if s["round"] == round_]
            if None not in values and len(values) == len(of_method):
                mean, low, high = mean_and_interval(values)
                rows.append({"method": method, "round": round_, "mean": mean, "low": low, "high": high})
    return rows


def rounds_to_share(curve: Iterable[Mapping[str, Any]], share: float = 0.9) -> int | None:
    """Return the first round at which a mean curve reaches `share` of its final gain, or None without a gain."""
    points = [(row["round"], row["mean"]) for row in curve]
    start, end = points[0][1], points[-1][1]
    if end <= start:
        return None
    return next(r for r, value in points if value >= start + share * (end - start))


def result_rows(
    runs: Mapping[tuple[str, int], Sequence[Mapping[str, Any]]],
    seconds: Mapping[tuple[str, int], float],
    references: Mapping[str, str],
) -> list[dict[str, Any]]:
    """Return one row per method: the last round over seeds, and the difference from its reference, paired by seed.

    `references` has, by method, the one that it is compared with.
    """
    last = {key: summaries[-1] for key, summaries in runs.items()}
    common: dict[str, set[int]] = {}  # the rounds that all methods with the same reference have evaluated
    for (method, _), summaries in runs.items():
        rounds = {s["round"] for s in summaries}
        common[references[method]] = common.get(references[method], rounds) & rounds
    curves, rows = curve_rows(runs, "accuracy"), []
    for method in dict.fromkeys(m for m, _ in runs):
        seeds = [s for m, s in runs if m == method]
        results = [last[method, s] for s in seeds]
        accuracy, low, high = mean_and_interval([s["accuracy"] for s in results])
        reference = references[method]
        pairs = [last[method, s]["accuracy"] - last[reference, s]["accuracy"] for s in seeds if (reference, s) in last]
        difference = mean_and_interval(pairs) if pairs and method != reference else None
        rows.append(
            {
                "method": method,
                "seeds": len(seeds),
                "accuracy": accuracy,
                "accuracy_low": low,
                "accuracy_high": high,
                "problem_interval": sum(s["accuracy_high"] - s["accuracy_low"] for s in results) / 2 / len(results),
                "difference": difference,
                "paired_seeds": len(pairs),
                **{name: _mean([s[name] for s in results]) for name in CURVES[1:]},
                "rounds_to_90": rounds_to_share(
                    c for c in curves if c["method"] == method and c["round"] in common[reference]
                ),
                "seconds": _mean([seconds[method, s] for s in seeds]),
            }
        )
    return rows


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None
