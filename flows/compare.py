"""A study as a flow: trains every method with every seed, several runs in parallel, and writes a comparison."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.events.worker import EventsWorker
from prefect.futures import as_completed
from prefect.logging.handlers import APILogWorker
from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.task_runners import ProcessPoolTaskRunner

from flows.services import exit_with_parent
from flows.shipped import find_file
from ogls.analysis.study import StudyConfig, StudyRuns, load_study
from ogls.analysis.study_page import apply_tuning
from ogls.config import RunConfig
from ogls.errors import StoreError
from ogls.stages.resume import is_complete
from tasks.progress import print_line
from tasks.study import publish_study


@task(task_run_name="{config.name}", cache_policy=NO_CACHE, persist_result=False)
def train_one(config: RunConfig) -> str:
    """Train one run of the study in a separate process. Returns its name."""
    # A module-level import would be pickled for the worker process, and lose the names in its annotations.
    from flows.train import train_flow

    exit_with_parent()
    train_flow(config)
    return config.name


@flow(name="compare", flow_run_name="compare {study.name}", log_prints=False)
def compare_flow(study: StudyConfig, tuning: list[RunConfig], runs: list[RunConfig]) -> str:
    """Train the tuning runs, then the runs of the study, and write its page. Returns the path of the page.

    Finished runs are not trained again. If a run fails, the other runs still finish, then StoreError is raised.
    """
    train_all(tuning, "tuning runs")
    runs = apply_tuning(study, tuning, runs)
    train_all(runs, "runs")
    return publish_study(study, runs, tuning)


def train_all(configs: list[RunConfig], label: str) -> None:
    """Train the runs that are not finished, in parallel; the task runner limits how many.

    `label` names the runs in messages. Raises StoreError after the last run ended if any failed.
    """
    pending = [config for config in configs if not is_complete(config)]
    finished = len(configs) - len(pending)
    if finished:
        print_line(f"  {finished} of {len(configs)} {label} are already finished")
    futures = [train_one.submit(config) for config in pending]
    for done, future in enumerate(as_completed(futures), start=finished + 1):
        future.wait()
        print_line(f"  {done} of {len(configs)} {label} ended")
    names = {f.task_run_id: c.name for f, c in zip(futures, pending, strict=True)}
    failed = [names[f.task_run_id] for f in futures if not f.state.is_completed()]
    if failed:
        raise StoreError(
            f"{len(failed)} of {len(configs)} {label} of the study failed: {', '.join(failed[:5])}; see the errors "
            "in the Prefect UI, or train one with `ogls train`; the same command trains the missing runs"
        )


def compare(loaded: StudyRuns) -> str:
    """Run the flow of a study with `at_once` runs in parallel on one Prefect server. Returns the path of the page."""
    pool: Any = ProcessPoolTaskRunner(max_workers=loaded.study.at_once)
    tuning, runs = list(loaded.tuning.values()), list(loaded.runs.values())
    with _shared_server():
        path: str = compare_flow.with_options(task_runner=pool)(loaded.study, tuning, runs)
    return path


@flow(name="compare file", flow_run_name="compare {study}", log_prints=False)
def compare_file_flow(study: str = "deployments/studies/family.toml") -> str:
    """Run the study of a TOML file, or a shipped one by its name; the entry point of deployments."""
    return compare(load_study(find_file(Path(study), "studies")))


@contextmanager
def _shared_server() -> Iterator[None]:
    """Use the configured Prefect server; without one, start a temporary server that all worker processes share."""
    if PREFECT_API_URL.value():
        yield
        return
    server = SubprocessASGIServer()
    server.start()
    try:
        with temporary_settings({PREFECT_API_URL: server.api_url}):
            yield
            _send_pending()
    finally:
        server.stop()


def _send_pending() -> None:
    """Send pending logs and events while the server runs. At exit Prefect would retry for a minute."""
    with suppress(RuntimeError):  # no log worker was started
        APILogWorker.instance().drain()
    EventsWorker.drain_all()
