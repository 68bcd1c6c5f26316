"""Run a flow in the process of a command: with the Prefect server that runs here, or with a temporary one."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

from flows.console import err, waiting
from ogls.errors import UserError

_RECONNECT_SECONDS = 600.0  # how long to wait for a Prefect server that stopped responding during a flow


def configure_prefect() -> None:
    """Set environment variables that Prefect and MLflow read on import; values of the user are kept."""
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    # The command prints errors itself; Prefect would print them again with a traceback. The server logs the traceback.
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    os.environ.setdefault("PREFECT_LOGGING_INTERNAL_LEVEL", "CRITICAL")
    # The first start creates a database. On a busy machine that takes longer than Prefect's default of 20 seconds.
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "180")
    # Seconds between heartbeats. After 90 s without one, an automation of `ogls up` marks a flow run as Crashed.
    os.environ.setdefault("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", "30")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    from flows.services import use_running

    use_running()


def _share_database() -> None:
    """Let a temporary Prefect server use the database of `ogls up`, unless the environment names another one.

    So `ogls up` shows runs that were trained before it.
    """
    from flows.services import PREFECT_FOLDER, database_url

    others = ("PREFECT_HOME", "PREFECT_SERVER_DATABASE_CONNECTION_URL", "PREFECT_API_DATABASE_CONNECTION_URL")
    if not any(name in os.environ for name in others):
        PREFECT_FOLDER.mkdir(parents=True, exist_ok=True)
        os.environ[others[1]] = database_url()


def run_in_foreground(flow: Callable[[], Any]) -> Any:
    """Run a flow in this process and show its progress on the terminal. Returns the result of the flow.

    If the Prefect server stops responding, waits for it and starts the flow again; finished stages are not repeated.
    Raises UserError if the server does not respond within ten minutes, and Interrupted on Ctrl-C.
    """
    with waiting("starting") as status:
        from tasks.progress import show_progress_on

        show_progress_on(err, status.stop)
        if address := prefect_address():
            check_prefect(address)
        else:
            from flows.services import stop_orphaned_servers

            stop_orphaned_servers()
            _share_database()
            status.update("starting a temporary Prefect server")
            if not err.is_terminal:
                err.print("starting a temporary Prefect server", style="dim")
        try:
            return _run_flow(flow, address)
        finally:
            show_progress_on(err)


def _run_flow(flow: Callable[[], Any], address: str) -> Any:
    """Run a flow; wait for a Prefect server that stops responding, and start the flow again."""
    import httpx

    interrupted = False

    def interrupt(number: int, frame: Any) -> None:
        nonlocal interrupted
        interrupted = True
        signal.default_int_handler(number, frame)

    previous_handler = signal.signal(signal.SIGINT, interrupt)
    try:
        while True:
            try:
                return flow()
            except httpx.TransportError:
                if not address or interrupted:
                    raise
                _wait_for_prefect(address)
    except BaseException:
        # After Ctrl-C between two tasks Prefect can raise any of its errors.
        if interrupted:
            raise Interrupted from None
        raise
    finally:
        signal.signal(signal.SIGINT, previous_handler)


def prefect_address() -> str:
    """The Prefect API URL from the environment or the active Prefect profile; "" if none is set."""
    from prefect.settings import PREFECT_API_URL

    return PREFECT_API_URL.value() or ""


def _wait_for_prefect(address: str) -> None:
    from flows.services import responds

    message = f"the Prefect server at {address} does not respond; waiting for it; finished stages are kept"
    err.print(message, style="yellow", soft_wrap=True)
    deadline = time.monotonic() + _RECONNECT_SECONDS
    while not responds(f"{address}/health", "true"):
        if time.monotonic() > deadline:
            raise UserError(
                f"the Prefect server at {address} did not respond for {_RECONNECT_SECONDS / 60:.0f} minutes; "
                "start it and run the same command again: it continues where this one ended"
            )
        time.sleep(1)


def check_prefect(address: str) -> None:
    """Raises UserError if no Prefect server answers at the address."""
    import httpx

    try:
        httpx.get(f"{address}/health", timeout=10)
    except httpx.TransportError:
        raise UserError(
            f"no Prefect server answers at {address}; start one (ogls up), or unset PREFECT_API_URL"
        ) from None


class Interrupted(Exception):
    """Raised on Ctrl-C instead of KeyboardInterrupt, which typer would handle itself."""
