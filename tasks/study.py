"""A study's page as a task: files for people, and a Prefect artifact."""

from __future__ import annotations

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from ogls.config import RunConfig
from ogls.study import StudyConfig
from ogls.studypage import write_page
from tasks.live import artifact_key


@task(task_run_name="publish {study.name}", cache_policy=NO_CACHE, persist_result=False)
def publish_study(study: StudyConfig, runs: list[RunConfig], tuning: list[RunConfig]) -> str:
    """Write the study's page and figures; returns the page's path."""
    path, page = write_page(study, runs, tuning)
    create_markdown_artifact(page, key=artifact_key(f"study-{study.name}"), description=f"study {study.name}")
    return str(path)
