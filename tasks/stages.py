"""The stages as Prefect tasks: named like `teach r003`, with a time limit, and retried if a retry may succeed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, cast

from prefect import Task, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger
from prefect.states import Completed
from prefect.tasks import exponential_backoff
from rich.markup import escape

from ogls.config import RunConfig
from ogls.errors import UserError
from ogls.records import StageResult
from ogls.records.stages import STAGES_BY_NAME
from ogls.stages.kept_models import drop_models, process_models
from ogls.stages.registry import STAGES
from ogls.stages.run import Run
from tasks.devices import limits_of
from tasks.events import emit_redone
from tasks.progress import print_line, stage_progress


class StageTask(Protocol):
    """A stage of a round, as a task. Options go to the function of the stage."""

    def __call__(self, config: RunConfig, round_: int, **options: bool) -> StageResult: ...


_LEASE_SECONDS = 60.0  # a killed holder frees its slot after this time; a live one renews it


def _concurrency_slot(limit: str) -> AbstractContextManager[object]:
    """Wait for a slot of a limit (of several GPUs: of that of each GPU), and occupy it; do nothing without a limit."""
    if not limit:
        return nullcontext()
    from prefect.concurrency.sync import concurrency

    return concurrency(limits_of(limit), occupy=1, lease_duration=_LEASE_SECONDS, strict=True)


def may_succeed_on_retry(_task: Any, run: Any, state: State[Any]) -> bool:
    """Whether a retry may succeed. Errors that the user has to fix are not retried.

    Prefect calls it only while retries are left.
    """
    try:
        state.result()
    except Exception as error:
        if isinstance(error, UserError) and not error.transient:
            return False
        print_line(f"  [yellow]{run.name}: {type(error).__name__}: {escape(str(error)[:300])}; retrying[/yellow]")
    return True


def _stage_task(work: Callable[..., StageResult]) -> StageTask:
    """The task of one stage. Prefect caches nothing: the manifest decides whether a stage is done."""
    name = work.__name__

    @task(
        name=name,
        task_run_name=name + " r{round_:03d}",
        description=work.__doc__,
        cache_policy=NO_CACHE,
        persist_result=False,
        retry_condition_fn=may_succeed_on_retry,
        retry_jitter_factor=0.5,
    )
    def run_stage(config: RunConfig, round_: int, **options: bool) -> Any:
        limit = config.execution.limit if STAGES_BY_NAME[name].on_device else ""
        logger = get_run_logger()
        with _concurrency_slot(limit), stage_progress(config.name, name, round_) as progress:
            try:
                result = work(Run(config, process_models(config)), round_, progress, **options)
            except BaseException as error:
                drop_models()  # the slot goes to other runs, and an interrupted pass may have left them half changed
                if not STAGES_BY_NAME[name].diagnostic or not isinstance(error, Exception):
                    raise
                notice = (
                    f"{name} r{round_:03d} was skipped ({type(error).__name__}: {error}); training goes on without it"
                )
                logger.warning(notice)
                print_line(f"  [yellow]{escape(notice)}[/yellow]")
                return Completed(name="Skipped", message=notice, data=StageResult(name, round_, 0, 0.0, notice=notice))
            progress.finish(result)
        emit_redone(config, result)
        if result.notice:
            logger.warning(result.notice)
        if result.reused:
            message = f"already done: {result.rows} rows, verified by the manifest"
            logger.info(f"{name} r{round_:03d} {message}")
            return Completed(name="Already done", message=message, data=result)
        logger.info(f"{name} r{round_:03d}: {result.rows} rows in {result.seconds:.1f} s")
        return result

    def run_task(config: RunConfig, round_: int, **options: bool) -> StageResult:
        limits = config.execution
        configured: Task[..., Any] = run_stage.with_options(
            retries=limits.retries,
            retry_delay_seconds=exponential_backoff(limits.retry_seconds) if limits.retry_seconds else 0,
            timeout_seconds=limits.timeout_seconds,
        )
        return cast(StageResult, configured(config, round_, **options))

    run_task.__name__, run_task.__doc__ = name, work.__doc__
    return run_task


prepare = _stage_task(STAGES["prepare"])
sample = _stage_task(STAGES["sample"])
verify = _stage_task(STAGES["verify"])
teach = _stage_task(STAGES["teach"])
steer = _stage_task(STAGES["steer"])
style = _stage_task(STAGES["style"])
train = _stage_task(STAGES["train"])
evaluate = _stage_task(STAGES["evaluate"])
health = _stage_task(STAGES["health"])
