"""Carry out a Prefect flow run as a job of a Ray cluster: the command of the work pool deployments/ray/work-pool.json.

    prefect work-pool create ogls-ray --type process --base-job-template deployments/ray/work-pool.json
    RAY_API_SERVER_ADDRESS=http://HEAD:8265 prefect worker start --pool ogls-ray

The worker may run anywhere: it submits the flow run, shows its log and waits for it. The job runs on the head of the
cluster, which needs the same Python packages and reaches the Prefect server under the worker's PREFECT_API_URL.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import sys
from typing import TYPE_CHECKING, Any

from ogls.errors import ClusterUnavailable, ConfigError, UserError
from ogls.execution.ray_cluster import require_ray, use_token

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_STOP_SECONDS = 20.0  # for a job to end after it was stopped; Prefect kills this process after 30


def main(folder: str = ".") -> int:
    """Submit the flow run of this environment, and wait until it ends. Returns 0 if the job succeeded, else 1.

    `folder` is the folder of the head in which the run works: relative paths of its configuration begin there. A
    SIGTERM, with which Prefect cancels a flow run, stops the job.
    """
    flow_run = os.environ.get("PREFECT__FLOW_RUN_ID")
    if not flow_run:
        raise ConfigError(
            "no flow run: a Prefect worker starts this command, see deployments/ray/work-pool.json; to start a run by "
            "hand, use `ray job submit -- ogls train NAME`"
        )
    client = _connect(os.environ.get("RAY_API_SERVER_ADDRESS", DEFAULT_ADDRESS))
    job = client.submit_job(
        entrypoint=f"cd {shlex.quote(folder)} && exec python -m prefect.engine",
        runtime_env={"env_vars": flow_variables(os.environ)},
        metadata={"flow_run": flow_run},
    )
    print(f"flow run {flow_run} is the Ray job {job}", flush=True)
    signal.signal(signal.SIGTERM, _end)
    try:
        asyncio.run(_follow(client, job))
    except BaseException:
        client.stop_job(job)
        asyncio.run(_await_end(client, job))
        raise
    info = client.get_job_info(job)
    print(f"Ray job {job}: {info.status}{': ' * bool(info.message)}{info.message or ''}", flush=True)
    return 0 if info.status == "SUCCEEDED" else 1


def flow_variables(environment: Any) -> dict[str, str]:
    """The variables that a flow run needs: Prefect's, without those of the channel to the worker's own process."""
    names = (n for n in environment if n.startswith("PREFECT_") and not n.startswith("PREFECT__CONTROL"))
    return {name: environment[name] for name in names}


def _connect(address: str) -> JobSubmissionClient:
    """Connect to the dashboard of the cluster. Raises ConfigError, or ClusterUnavailable if it does not answer."""
    require_ray()
    from ray.job_submission import JobSubmissionClient

    use_token()
    try:
        return JobSubmissionClient(address)
    except ImportError as error:
        raise ConfigError("jobs of Ray need its dashboard: pip install 'ogls-sd[ray-jobs]'") from error
    except Exception as error:  # of the connection, of the token, of the version: Ray's own words say which
        raise ClusterUnavailable(
            f"no job can be submitted at {address} ({str(error).splitlines()[0]}); set RAY_API_SERVER_ADDRESS to the "
            "dashboard of the head, which `ray start --head --dashboard-host=...` starts"
        ) from error


async def _follow(client: JobSubmissionClient, job: str) -> None:
    """Print the log of a job until it has ended."""
    while not client.get_job_status(job).is_terminal():
        async for lines in client.tail_job_logs(job):
            print(lines, end="", flush=True)
        await asyncio.sleep(1)  # after a lost connection


async def _await_end(client: JobSubmissionClient, job: str) -> None:
    deadline = asyncio.get_running_loop().time() + _STOP_SECONDS
    while not client.get_job_status(job).is_terminal() and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(0.5)


def _end(signum: int, frame: Any) -> None:
    raise SystemExit(128 + signum)


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except UserError as error:
        sys.exit(f"error: {error}")
