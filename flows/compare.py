"""A study as a flow: methods x seeds as sub-flows, several at once, and a page that compares them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.events.worker import EventsWorker
from prefect.futures import as_completed
from prefect.logging.handlers import APILogWorker
from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.task_runners import ProcessPoolTaskRunner

from flows.services import end_with_parent
from ogls.analysis.study import StudyConfig, StudyRuns, load_study
from ogls.analysis.study_page import apply_tuning
from ogls.config import RunConfig
from ogls.errors import StoreError
from ogls.stages.run import is_complete
from tasks.progress import print_line
from tasks.study import publish_study


@task(task_run_name="{config.name}", cache_policy=NO_CACHE, persist_result=False)
def train_one(config: RunConfig) -> str:
    """One run of the study, in a separate process. A finished run is recognised by its manifests."""
    # Imported here: pickled as a global for the worker, the flow would lose the names in its annotations.
    from flows.train import train_flow

    end_with_parent()
    train_flow(config)
    return config.name


@flow(name="compare", flow_run_name="compare {study.name}", log_prints=False)
def compare_flow(study: StudyConfig, tuning: list[RunConfig], runs: list[RunConfig]) -> str:
    """Tune every method, train every run of the study, then write its page, whose path is returned.

    Running it again continues where it ended. If a run fails, the others still finish.
    """
    train_all(tuning, "tuning runs")
    runs = apply_tuning(study, tuning, runs)
    train_all(runs, "runs")
    return publish_study(study, runs, tuning)


def train_all(configs: list[RunConfig], what: str) -> None:
    """Train all runs, as many at once as the task runner allows. Raises StoreError after the last one if any failed."""
    todo = [config for config in configs if not is_complete(config)]
    before = len(configs) - len(todo)
    if before:
        print_line(f"  {before} of {len(configs)} {what} were finished before")
    futures = [train_one.submit(config) for config in todo]
    for done, future in enumerate(as_completed(futures), start=before + 1):
        future.wait()
        print_line(f"  {done} of {len(configs)} {what} ended")
    names = {f.task_run_id: c.name for f, c in zip(futures, todo, strict=True)}
    failed = [names[f.task_run_id] for f in futures if not f.state.is_completed()]
    if failed:
        raise StoreError(
            f"{len(failed)} of {len(configs)} {what} of the study failed: {', '.join(failed[:5])}; see them in the "
            "Prefect UI, or try one with `ogls train`; the same command continues with the missing runs"
        )


def compare(loaded: StudyRuns) -> str:
    """Run the flow with `at_once` runs in parallel; all of them report to one Prefect server."""
    pool: Any = ProcessPoolTaskRunner(max_workers=loaded.study.at_once)
    tuning, runs = list(loaded.tuning.values()), list(loaded.runs.values())
    with _one_server():
        path: str = compare_flow.with_options(task_runner=pool)(loaded.study, tuning, runs)
    return path


@flow(name="compare file", flow_run_name="compare {study}", log_prints=False)
def compare_file_flow(study: str = "deployments/studies/family.toml") -> str:
    """The study of a file, for deployments."""
    return compare(load_study(study))


@contextmanager
def _one_server() -> Iterator[None]:
    """The configured server, or one temporary server for this process and its workers instead of one for each."""
    if PREFECT_API_URL.value():
        yield
        return
    server = SubprocessASGIServer()
    server.start()
    try:
        with temporary_settings({PREFECT_API_URL: server.api_url}):
            yield
            _drain()
    finally:
        server.stop()


def _drain() -> None:
    """Send pending logs and events now; at exit the server is gone, and Prefect would retry for a minute."""
    with suppress(RuntimeError):  # no worker was started
        APILogWorker.instance().drain()
    EventsWorker.drain_all()
