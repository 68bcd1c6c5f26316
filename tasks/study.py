"""The page of a study as a task: files, and a Prefect artifact."""

from __future__ import annotations

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from ogls.analysis.study import StudyConfig
from ogls.analysis.study_page import write_study_page
from ogls.config import RunConfig
from tasks.artifacts import artifact_key


@task(task_run_name="publish {study.name}", cache_policy=NO_CACHE, persist_result=False)
def publish_study(study: StudyConfig, runs: list[RunConfig], tuning: list[RunConfig]) -> str:
    """Write the page and the figures of a study. Returns the path of the page."""
    path, page = write_study_page(study, runs, tuning)
    create_markdown_artifact(page, key=artifact_key(f"study-{study.name}"), description=f"study {study.name}")
    return str(path)
