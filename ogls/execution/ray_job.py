"""Carry out a Prefect flow run as a job of a Ray cluster: the command of the work pool deployments/ray/work-pool.json.

    prefect work-pool create ogls-ray --type process --base-job-template deployments/ray/work-pool.json
    RAY_API_SERVER_ADDRESS=http://HEAD:8265 prefect worker start --pool ogls-ray

The worker submits the flow run, shows its log and waits for it. The job runs on the head node of the cluster, which
needs the same Python packages and reaches the Prefect server under the worker's PREFECT_API_URL.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import sys
import time
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from ogls.errors import ClusterUnavailable, ConfigError, UserError
from ogls.execution.ray_cluster import first_line, use_token

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_LOST_SECONDS = 600.0  # without the dashboard, before a job that may go on is given up
_OF_THE_WORKER = ("PREFECT__CONTROL", "PREFECT_HOME", "PREFECT_PROFILES_PATH", "PREFECT_LOGGING_SETTINGS_PATH")


def main(folder: str = ".") -> int:
    """Submit the flow run of this environment, and wait until it ends. Returns 0 if the job succeeded, else 1.

    `folder` is the folder of the head node in which the run works: relative paths of its configuration begin there. A
    SIGTERM, with which Prefect cancels a flow run, stops the job. A lost connection does not: the job goes on.
    """
    flow_run = os.environ.get("PREFECT__FLOW_RUN_ID")
    if not flow_run:
        raise ConfigError(
            "no flow run: a Prefect worker starts this command, see deployments/ray/work-pool.json; to start a run by "
            "hand, use `ray job submit -- ogls train NAME`"
        )
    client = _connect(os.environ.get("RAY_API_SERVER_ADDRESS", DEFAULT_ADDRESS))
    signal.signal(signal.SIGTERM, _end)
    job = f"ogls-{uuid4().hex}"  # known before it is submitted, so that a signal stops it in any case
    try:
        client.submit_job(
            entrypoint=f"cd {shlex.quote(folder)} && exec python -m prefect.engine",
            submission_id=job,
            runtime_env={"env_vars": flow_variables(os.environ)},
            metadata={"flow_run": flow_run},
        )
        print(f"flow run {flow_run} is the Ray job {job}", flush=True)
        asyncio.run(_follow(client, job))
    except (SystemExit, KeyboardInterrupt):
        client.stop_job(job)  # Ray ends what does not end by itself after RAY_JOB_STOP_WAIT_TIME_S
        raise
    info = client.get_job_info(job)
    print(f"Ray job {job}: {info.status}" + (f": {info.message}" if info.message else ""), flush=True)
    return 0 if info.status == "SUCCEEDED" else 1


def flow_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that a flow run needs: Prefect's, without those of the worker's process and of its disk."""
    names = [n for n in environment if n.startswith("PREFECT_") and not n.startswith(_OF_THE_WORKER)]
    return {name: environment[name] for name in names}


def _connect(address: str) -> JobSubmissionClient:
    """Connect to the dashboard of the cluster. Raises ConfigError, or ClusterUnavailable if it does not answer."""
    if find_spec("ray") is None:
        raise ConfigError("Ray is not installed: pip install 'ogls-sd[ray-jobs]'")
    from ray.job_submission import JobSubmissionClient

    use_token()
    try:
        return JobSubmissionClient(address)
    except ImportError as error:
        raise ConfigError("jobs of Ray need its dashboard: pip install 'ogls-sd[ray-jobs]'") from error
    except Exception as error:  # of the connection, of the token, of the version: Ray's own words say which
        raise ClusterUnavailable(
            f"no job can be submitted at {address} ({first_line(error)}); set RAY_API_SERVER_ADDRESS to the dashboard "
            "of the head node, which `ray start --head --dashboard-host=...` starts"
        ) from error


async def _follow(client: JobSubmissionClient, job: str) -> None:
    """Print the log of a job until it has ended. Gives up after _LOST_SECONDS without a connection; the job goes on."""
    printed, lost = 0, 0.0
    while True:
        try:
            skip = printed  # Ray sends the log from its first line
            async for lines in client.tail_job_logs(job):
                print(lines[skip:], end="", flush=True)
                printed, skip = printed + len(lines[skip:]), max(0, skip - len(lines))
            if client.get_job_status(job).is_terminal():
                return
            lost = 0.0
        except Exception as error:  # a websocket that was closed, a dashboard that restarts
            lost = lost or time.monotonic()
            if time.monotonic() - lost > _LOST_SECONDS:
                raise ClusterUnavailable(
                    f"the dashboard did not answer for {_LOST_SECONDS:g} s ({first_line(error)}); the job {job} may go "
                    "on: `ray job status` says so"
                ) from error
        await asyncio.sleep(1)


def _end(signum: int, frame: Any) -> None:
    raise SystemExit(128 + signum)


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except UserError as error:
        sys.exit(f"error: {error}")
