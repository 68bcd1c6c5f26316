"""Continual training: a series of runs <name>-0001, <name>-0002, ..., each on the problems that the earlier runs lack.

A run of a series starts from the last adapter of the previous run, or from its best adapter if a health check stopped
it.
"""

from __future__ import annotations

import re

from ogls.config import RunConfig
from ogls.problems.load import Exclusions, load_problems, normalize_text
from ogls.stages.resume import is_finished, is_stopped
from ogls.stages.run import POLICY, open_run
from ogls.store import RunStore, Store


def series_runs(config: RunConfig) -> list[RunStore]:
    """The runs of a series, oldest first."""
    pattern = re.compile(re.escape(config.name) + r"-\d{4,}$")
    return sorted((r for r in Store(config.root).runs() if pattern.match(r.name)), key=lambda r: r.name)


def count_new_problems(config: RunConfig, earlier: list[RunStore]) -> int:
    """The number of problems of the source that no earlier run of the series has."""
    seen = set()
    for run in earlier:
        for row in run.read("problems", 0, ["split", "problem"]).to_pylist():
            seen.add(normalize_text(row["problem"]))  # problems of benchmarks are not new either
    problems = load_problems(config.problems, "train", Exclusions(), config.verify.answer_pattern)
    return sum(normalize_text(p.problem) not in seen for p in problems)


def next_start_adapter(run: RunStore) -> str:
    """The path of the adapter that the run after `run` starts from; empty for the base model.

    It is the one that the last health decision chose: the best round's after a stop, the restart of a rollback, or else
    the last round's.
    """
    opened = open_run(run.storage.root, run.name)
    health, trained = run.newest_manifest("health"), run.newest_manifest("updates")
    if health and is_stopped(opened, health.round):
        chosen = int(health.metrics["best"])
    else:
        chosen = opened.start_point(trained.round + 1).round if trained else 0
    problems = run.manifest("problems", 0)
    if chosen or (problems and problems.files_of(POLICY)):  # round 0: the run's own copy of the adapter it began with
        return run.url(run.folder(POLICY, chosen))
    return opened.config.adapter.start


def next_run(config: RunConfig) -> RunConfig | None:
    """The configuration of the run to train now: the last one if it is unfinished, else a new one.

    None if there are no new problems.
    """
    earlier = series_runs(config)
    if earlier and not is_finished(stored_config(earlier[-1])):
        number = len(earlier)
        earlier = earlier[:-1]
    else:
        number = len(earlier) + 1
        if earlier and not count_new_problems(config, earlier):
            return None
    adapter = config.adapter.model_copy(
        update={"start": next_start_adapter(earlier[-1]) if earlier else config.adapter.start}
    )
    problems = config.problems.model_copy(update={"after": tuple(r.name for r in earlier)})
    update = {"name": f"{config.name}-{number:04d}", "adapter": adapter, "problems": problems}
    return config.model_copy(update=update)


def newest_config(config: RunConfig) -> RunConfig | None:
    """The configuration of the newest run of a series; None if the series has no run."""
    earlier = series_runs(config)
    return stored_config(earlier[-1]) if earlier else None


def stored_config(run: RunStore) -> RunConfig:
    """The configuration that a run was started with."""
    return open_run(run.storage.root, run.name).config
