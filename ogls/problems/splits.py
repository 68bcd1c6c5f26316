"""Splitting the problems of a run into training problems and benchmarks, and choosing those of a round."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import numpy as np

from ogls.config import DataSource, RunConfig
from ogls.errors import DataError
from ogls.problems.load import UNUSABLE, Exclusions, load_problems, normalize_text
from ogls.records import Problem
from ogls.seeds import derive_seed


def split_problems(
    config: RunConfig,
    usable: Callable[[Sequence[str]], list[bool]],
    too_long: Callable[[Problem, int], str],
    seen: Collection[str] = (),
    imported: Sequence[Problem] | None = None,
) -> tuple[list[Problem], Exclusions]:
    """All problems of a run: `train`, then each benchmark. Splits do not overlap.

    Training problems are excluded and counted if their normalised text is in `seen` or in a benchmark. `usable` returns
    which answers the verifier can judge; `too_long(problem, max_tokens)` returns why a problem does not fit the model,
    or an empty string. `imported` are the training problems in place of those of problems.source. Raises DataError if
    more than problems.max_unusable of a source are unusable, or if no training problem or no benchmark problem is left.
    """
    report = Exclusions()
    benchmarks: list[Problem] = []
    for benchmark in config.evaluate.benchmarks:
        of_source = _load_usable(benchmark, benchmark.name, config, usable, too_long, report)
        if not of_source:
            raise DataError(
                f"benchmark {benchmark.name}: none of the rows of {benchmark.source} is a usable problem "
                f"({_counts(report)}); set its columns, or another source"
            )
        benchmarks += of_source
    train = _load_usable(config.problems, "train", config, usable, too_long, report, imported)
    benchmark_texts = {normalize_text(p.problem): p.split for p in benchmarks}
    candidates = []
    for problem in train:
        if split := benchmark_texts.get(normalize_text(problem.problem)):
            report.add(f"in benchmark {split}", problem.problem_id)
        elif normalize_text(problem.problem) in seen:
            report.add("trained on before", problem.problem_id)
        else:
            candidates.append(problem)
    order = np.random.default_rng(derive_seed(config.seed, "holdout")).permutation(len(candidates))
    holdout = set(order[: config.problems.holdout].tolist())
    train = [p for i, p in enumerate(candidates) if i not in holdout]
    benchmarks += [replace(p, split="holdout") for i, p in enumerate(candidates) if i in holdout]
    if not train:
        setting = "lower problems.holdout" if holdout else "set problems.source to other problems"
        if imported is not None and not holdout:
            setting = "import other problems"
        raise DataError(
            f"{_name(config.problems, imported)}: no training problem is left of {len(candidates)} "
            f"({_counts(report)}); {setting}"
        )
    if not benchmarks:
        raise DataError(f"no problem to evaluate on ({_counts(report)}); raise problems.holdout, or add a benchmark")
    return train + benchmarks, report


def _counts(report: Exclusions) -> str:
    return "excluded: " + (", ".join(f"{n} {reason}" for reason, n in report.counts.items()) or "none")


def _load_usable(
    source: DataSource,
    split: str,
    config: RunConfig,
    usable: Callable[[Sequence[str]], list[bool]],
    too_long: Callable[[Problem, int], str],
    report: Exclusions,
    given: Sequence[Problem] | None = None,
) -> list[Problem]:
    """The problems of a source (or `given`) that can be judged and that fit the model. Raises DataError if too many do
    not."""
    found, kept = Exclusions(), []
    further = config.columns() if split == "train" else ()
    pattern = config.verify.answer_pattern
    problems = load_problems(source, split, found, pattern, further) if given is None else list(given)
    rows = len(problems) + sum(found.counts[reason] for reason in UNUSABLE)
    max_tokens = config.rollout.max_tokens if split == "train" else config.evaluate.max_tokens
    for problem, ok in zip(problems, usable([p.answer for p in problems]), strict=True):
        if not ok:
            found.add("unusable answer", f"{problem.problem_id} ({problem.answer[:40]!r})")
        elif reason := too_long(problem, max_tokens):
            found.add("too long", f"{problem.problem_id} ({reason})")
        else:
            kept.append(problem)
    unusable = {reason: found.counts[reason] for reason in UNUSABLE if found.counts[reason]}
    count = sum(unusable.values())
    if count > config.problems.max_unusable * rows:
        listed = "; ".join(f"{n} {reason}: {found.describe(reason)}" for reason, n in unusable.items())
        too_many = f"{_name(source, given)}: {count} of {rows} problems are unusable ({listed})"
        if config.verify.checker and unusable.get("unusable answer") == rows:
            raise DataError(
                f"{too_many}; the checker {config.verify.checker} accepts no expected answer as an answer to itself: "
                "its arguments are (answer, expected), with the answer as it was found in the completion"
            )
        lower = "lower max_tokens, " if "too long" in unusable else ""
        raise DataError(f"{too_many}; fix them, {lower}or raise problems.max_unusable")
    report.extend(found)
    return kept


def _name(source: DataSource, given: Sequence[Problem] | None) -> str:
    return source.source if given is None else "the imported rollouts"


def select_round_problems(train: Sequence[Problem], per_round: int, round_: int, run_seed: int) -> list[Problem]:
    """The problems of a round (from 1), without duplicates.

    Rounds take consecutive parts of passes over all problems; each pass has its own seeded order.
    """
    chosen: dict[str, Problem] = {}
    orders: dict[int, np.ndarray] = {}
    for position in range((round_ - 1) * per_round, round_ * per_round):
        epoch, index = divmod(position, len(train))
        if epoch not in orders:
            orders[epoch] = np.random.default_rng(derive_seed(run_seed, "problems", epoch)).permutation(len(train))
        problem = train[orders[epoch][index]]
        chosen[problem.problem_id] = problem  # a problem at the boundary of two passes is used once
    return list(chosen.values())
