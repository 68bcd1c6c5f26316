"""A study: methods x seeds at equal rollouts, and what their runs say together, as plain rows.

Every run of a study has the study's problems and sampling seeds; methods differ by their configuration alone. The
result is the last round, never the best one. Two kinds of interval: over problems (bootstrap, within a run) and over
seeds (Student's t, between runs).
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError, model_validator

from ogls.config import RunConfig, Section, setting
from ogls.configfile import load_config
from ogls.errors import ConfigError

# Two-sided 95% quantiles of Student's t for 1 .. 10 degrees of freedom; 2 beyond is close enough.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


class Method(Section):
    """One method: a configuration file and overrides."""

    name: str = setting("ogls-sd", "Name in tables and figures.", pattern=r"^[a-z0-9][a-z0-9._-]*$")
    config: str = setting("tiny.toml", "TOML file, relative to the study's.")
    set: tuple[str, ...] = setting((), "Overrides, section.key=value.")


class StudyConfig(Section):
    """Methods x seeds."""

    name: str = setting(
        "study", "Name of the study; its runs are <name>-<method>-s<seed>.", pattern=r"^[a-z0-9][a-z0-9._-]*$"
    )
    root: str = setting("data/runs", "The store of the runs.")
    out: str = setting("data/studies", "Where the study's page and figures go, in a folder of its name.")
    seeds: tuple[int, ...] = setting((0, 1, 2), "Seeds; every method gets each.", min_length=1)
    set: tuple[str, ...] = setting((), "Overrides of every method: section.key=value.")
    at_once: int = setting(1, "Runs at once, each in a process of its own.", ge=1)
    reference: str = setting("ogls-sd", "The method that the others are compared with.")
    methods: tuple[Method, ...] = setting((Method(),), "The methods.", min_length=1)

    @model_validator(mode="after")
    def _names(self) -> StudyConfig:
        names = [m.name for m in self.methods]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(f"two methods are named {', '.join(twice)}")
        if self.reference not in names:
            raise ValueError(f"the reference {self.reference} is none of the methods {', '.join(names)}")
        return self


def load_study(path: str | Path) -> tuple[StudyConfig, dict[tuple[str, int], RunConfig]]:
    """The study and the configuration of each of its runs, by (method, seed). Raises ConfigError as load_config does,
    and where the runs would not sample equally many rollouts."""
    path = Path(path)
    try:
        study = StudyConfig.model_validate(tomllib.loads(path.read_text()))
    except FileNotFoundError:
        raise ConfigError(f"no study {path}; the shipped ones are in deployments/studies/") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ConfigError(f"{path}: " + "\n  ".join(lines)) from None
    runs = {}
    for method in study.methods:
        for seed in study.seeds:
            own = [f"name={study.name}-{method.name}-s{seed}", f"root={study.root}", f"seed={seed}"]
            config = load_config(path.parent / method.config, [*study.set, *method.set, *own])
            runs[method.name, seed] = config
    budgets = {(c.problems.per_round, c.rollout.samples, c.rounds, c.rollout.max_tokens) for c in runs.values()}
    if len(budgets) > 1:
        raise ConfigError(
            f"{path}: the methods do not sample alike: (problems.per_round, rollout.samples, rounds, "
            f"rollout.max_tokens) is {' and '.join(map(str, sorted(budgets)))}"
        )
    return study, runs


def mean_and_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of values, one a seed, and its 95% interval by Student's t (no width for a single seed)."""
    n = len(values)
    mean = sum(values) / n
    if n == 1:
        return mean, mean, mean
    error = (sum((v - mean) ** 2 for v in values) / (n - 1) / n) ** 0.5
    half = error * (_T95[n - 2] if n - 2 < len(_T95) else 2.0)
    return mean, mean - half, mean + half


CURVES = ("accuracy", "greedy_accuracy", "mean_length", "entropy", "kl_base", "truncated", "distinct_answers")


def curve_rows(runs: Mapping[tuple[str, int], Sequence[Mapping[str, Any]]], measure: str) -> list[dict[str, Any]]:
    """Mean over seeds and its interval by method and round, of one measure of the summaries."""
    rows = []
    for method in dict.fromkeys(m for m, _ in runs):
        mine = [summaries for (m, _), summaries in runs.items() if m == method]
        for round_ in sorted({s["round"] for summaries in mine for s in summaries}):
            values = [s[measure] for summaries in mine for s in summaries if s["round"] == round_]
            if None not in values:
                mean, low, high = mean_and_interval(values)
                rows.append({"method": method, "round": round_, "mean": mean, "low": low, "high": high})
    return rows


def rounds_to_most(curve: Iterable[Mapping[str, Any]], share: float = 0.9) -> int | None:
    """First round at which a method's mean has made `share` of its final gain; None if it did not gain."""
    points = [(row["round"], row["mean"]) for row in curve]
    start, end = points[0][1], points[-1][1]
    if end <= start:
        return None
    return next(r for r, value in points if value >= start + share * (end - start))


def result_rows(
    runs: Mapping[tuple[str, int], Sequence[Mapping[str, Any]]],
    seconds: Mapping[tuple[str, int], float],
    reference: str,
) -> list[dict[str, Any]]:
    """A row a method: the last round over seeds, and the differences from the reference, paired by seed."""
    last = {key: summaries[-1] for key, summaries in runs.items()}
    rows = []
    for method in dict.fromkeys(m for m, _ in runs):
        seeds = [s for m, s in runs if m == method]
        mine = [last[method, s] for s in seeds]
        accuracy, low, high = mean_and_interval([s["accuracy"] for s in mine])
        pairs = [last[method, s]["accuracy"] - last[reference, s]["accuracy"] for s in seeds if (reference, s) in last]
        difference = mean_and_interval(pairs) if pairs and method != reference else None
        rows.append(
            {
                "method": method,
                "seeds": len(seeds),
                "accuracy": accuracy,
                "accuracy_low": low,
                "accuracy_high": high,
                "problem_interval": sum(s["accuracy_high"] - s["accuracy_low"] for s in mine) / 2 / len(mine),
                "difference": difference,
                **{name: _mean([s[name] for s in mine]) for name in CURVES[1:]},
                "rounds_to_90": rounds_to_most(
                    curve_rows({k: v for k, v in runs.items() if k[0] == method}, "accuracy")
                ),
                "seconds": _mean([seconds[method, s] for s in seeds]),
            }
        )
    return rows


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None
