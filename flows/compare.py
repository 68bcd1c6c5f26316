"""A study as a flow: methods x seeds as sub-flows, so many at once, and a page of what they say together."""

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

from ogls.config import RunConfig
from ogls.errors import StoreError
from ogls.study import StudyConfig
from tasks.progress import say
from tasks.study import publish_study


@task(task_run_name="{config.name}", cache_policy=NO_CACHE, persist_result=False)
def train_one(config: RunConfig) -> str:
    """One run of the study, in a process of its own. A finished one proves itself by its manifests."""
    # Imported here: pickled for the worker as a global, the flow would lose what its annotations name.
    from flows.train import train_flow

    train_flow(config)
    return config.name


@flow(name="compare", flow_run_name="compare {study.name}", log_prints=False)
def compare_flow(study: StudyConfig, runs: list[RunConfig]) -> str:
    """Train every run of the study, then write its page, whose path is returned.

    Running it again goes on where it ended. A run that fails leaves the others to finish.
    """
    futures = [train_one.submit(config) for config in runs]
    for done, future in enumerate(as_completed(futures), start=1):
        future.wait()
        say(f"  {done} of {len(runs)} runs ended")
    names = {f.task_run_id: c.name for f, c in zip(futures, runs, strict=True)}
    failed = [names[f.task_run_id] for f in futures if not f.state.is_completed()]
    if failed:
        raise StoreError(
            f"{len(failed)} of {len(runs)} runs of the study failed: {', '.join(failed[:5])}; see them in the Prefect "
            "UI, or try one with `ogls train`; the same command goes on with what is missing"
        )
    return publish_study(study, runs)


def compare(study: StudyConfig, runs: list[RunConfig]) -> str:
    """The flow with as many runs at once as the study says, all of them reporting to one Prefect server."""
    pool: Any = ProcessPoolTaskRunner(max_workers=study.at_once)
    with _one_server():
        path: str = compare_flow.with_options(task_runner=pool)(study, runs)
    return path


@contextmanager
def _one_server() -> Iterator[None]:
    """The server in force, or a temporary one for this process and its workers; else each would start its own."""
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
    """Send what is still to be sent; at exit the server would be gone, and Prefect would try for a minute."""
    with suppress(RuntimeError):  # no worker was started
        APILogWorker.instance().drain()
    EventsWorker.drain_all()
