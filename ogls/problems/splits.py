"""Splitting the problems of a run into training problems and benchmarks, and choosing those of a round."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import numpy as np

from ogls.config import RunConfig
from ogls.errors import DataError
from ogls.problems.load import Exclusions, load_problems, normalize_text
from ogls.records import Problem
from ogls.seeds import derive_seed


def split_problems(
    config: RunConfig,
    usable: Callable[[Sequence[str]], list[bool]],
    too_long: Callable[[Problem, int], str],
    seen: Collection[str] = (),
) -> tuple[list[Problem], Exclusions]:
    """All problems of a run: `train`, then each benchmark; splits never overlap.

    Training problems whose normalize_text text is in `seen` are left out and counted. `usable` says which answers the
    verifier can work with; `too_long(problem, max_tokens)` why a problem does not fit the model (or nothing). A
    training problem whose normalize_text text stands in any benchmark is dropped and counted. Raises DataError where
    more than problems.max_unusable of a source are unusable, and where nothing is left.
    """
    report = Exclusions()
    benchmarks: list[Problem] = []
    for benchmark in config.evaluate.benchmarks:
        loaded = load_problems(benchmark, benchmark.name, report)
        benchmarks += _keep_usable(
            loaded, benchmark.source, config, config.evaluate.max_tokens, usable, too_long, report
        )
    train = load_problems(config.problems, "train", report)
    train = _keep_usable(train, config.problems.source, config, config.rollout.max_tokens, usable, too_long, report)
    held = {normalize_text(p.problem): p.split for p in benchmarks}
    apart = []
    for problem in train:
        if split := held.get(normalize_text(problem.problem)):
            report.note(f"in benchmark {split}", problem.problem_id)
        elif normalize_text(problem.problem) in seen:
            report.note("trained on before", problem.problem_id)
        else:
            apart.append(problem)
    order = np.random.default_rng(derive_seed(config.seed, "holdout")).permutation(len(apart))
    holdout = set(order[: config.problems.holdout].tolist())
    train = [p for i, p in enumerate(apart) if i not in holdout]
    benchmarks += [replace(p, split="holdout") for i, p in enumerate(apart) if i in holdout]
    if not train or not benchmarks:
        raise DataError(
            f"{len(train)} problems to train on and {len(benchmarks)} to evaluate on are left of "
            f"{config.problems.source}; left out: {dict(report.counts)}"
        )
    return train + benchmarks, report


def _keep_usable(
    problems: list[Problem],
    source: str,
    config: RunConfig,
    max_tokens: int,
    usable: Callable[[Sequence[str]], list[bool]],
    too_long: Callable[[Problem, int], str],
    report: Exclusions,
) -> list[Problem]:
    """The problems that can be judged and fit the model; DataError if too many cannot or do not."""
    kept, why = [], Exclusions()
    for problem, ok in zip(problems, usable([p.answer for p in problems]), strict=True):
        if not ok:
            why.note("unusable answer", f"{problem.problem_id} ({problem.answer[:40]!r})")
        elif reason := too_long(problem, max_tokens):
            why.note("too long", f"{problem.problem_id} ({reason})")
        else:
            kept.append(problem)
    lost = len(problems) - len(kept)
    if lost > config.problems.max_unusable * len(problems):
        listed = "; ".join(f"{n} {reason}: {why.words(reason)}" for reason, n in why.counts.items())
        raise DataError(
            f"{source}: {lost} of {len(problems)} problems cannot be used ({listed}); mend them, or raise "
            "problems.max_unusable"
        )
    report.counts += why.counts
    report.named |= why.named
    return kept


def select_round_problems(train: Sequence[Problem], per_round: int, round_: int, run_seed: int) -> list[Problem]:
    """The problems of round 1, 2, ...: pass after pass over all of them, each in a seeded order of its own."""
    chosen: dict[str, Problem] = {}
    orders: dict[int, np.ndarray] = {}
    for place in range((round_ - 1) * per_round, round_ * per_round):
        epoch, index = divmod(place, len(train))
        if epoch not in orders:
            orders[epoch] = np.random.default_rng(derive_seed(run_seed, "problems", epoch)).permutation(len(train))
        problem = train[orders[epoch][index]]
        chosen[problem.problem_id] = problem  # one that two passes meet on is posed once
    return list(chosen.values())
