"""`ogls up` and `ogls down`: a Prefect server, a worker, MLflow, the deployments and the automations."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.console import OPERATE, Root, count_of, err, out, waiting
from flows.foreground import configure_prefect
from flows.services import (
    FOLDER,
    HOST,
    LOOPBACK,
    PREFECT_FOLDER,
    Services,
    database_url,
    describe_port_owner,
    responds,
)
from ogls.errors import UserError

POOL = "ogls"
GPU_LIMIT = "ogls-gpu"
_DATABASE = "PREFECT_SERVER_DATABASE_CONNECTION_URL"
DEPLOYMENTS = Path("deployments/prefect.yaml")
AUTOMATIONS = Path("deployments/automations")
Folder = Annotated[Path, typer.Option("--folder", help="Folder for logs and process ids.")]


def register(app: Any) -> None:
    """Add the commands to the command line."""
    for command in (up, down):
        app.command(rich_help_panel=OPERATE)(command)


def up(
    host: Annotated[
        str, typer.Option(help="Address to listen on. Other machines can reach any address that is not loopback.")
    ] = HOST,
    prefect_port: Annotated[int, typer.Option(help="Port of the Prefect server.")] = 4200,
    mlflow_port: Annotated[int, typer.Option(help="Port of the MLflow server.")] = 5000,
    folder: Folder = FOLDER,
    home: Annotated[Path, typer.Option(help="Folder for Prefect's database.")] = PREFECT_FOLDER,
    root: Root = "data/runs",
    file: Annotated[Path, typer.Option(help="YAML file with the Prefect deployments to create.")] = DEPLOYMENTS,
    store: Annotated[Path, typer.Option(help="Folder for MLflow's database and artifacts.")] = Path("data/mlflow"),
) -> None:
    """Start a Prefect server, a worker and MLflow on loopback, and create the deployments and automations.

    The server shows the runs of the store, also those that were trained before it was started.
    Run it again to start only what is missing and to update the deployments. `ogls down` stops the services.
    """
    if not file.is_file():
        raise UserError(f"no file {file}: run this command in the root folder of the project, or set --file")
    if host not in LOOPBACK:
        err.print(
            f"warning: Prefect and MLflow will listen on {host} without a password: everyone who can connect "
            "to them can start runs on this machine; put a proxy with authentication in front of them",
            style="yellow",
            soft_wrap=True,
        )
    configure_prefect()
    services = Services(folder)
    home = home.absolute()
    with services.lock():
        api = _start_prefect(services, host, prefect_port, home)
        environment = {"PREFECT_API_URL": api, "PREFECT_HOME": str(home)}
        os.environ |= environment
        mlflow = _start_mlflow(services, host, mlflow_port, store.absolute())
        _create_pool_and_limit()
        _start_worker(services, {**environment, "MLFLOW_TRACKING_URI": mlflow})
        with waiting("deploying"):
            _deploy(file)
            count = _update_automations()
        with waiting("reading the store"):
            registered = _register_runs(root)
    out.print(f"Prefect     {api.removesuffix('/api')}", highlight=False)
    out.print(f"MLflow      {mlflow}", highlight=False)
    out.print(f"worker      pool {POOL}, log {services.folder / 'worker.log'}", highlight=False, soft_wrap=True)
    deployed = f"{file}, {count_of(count, 'automation')}" if count else str(file)
    out.print(f"deployed    {deployed}", highlight=False, soft_wrap=True)
    if registered:
        out.print(f"registered  {count_of(registered, 'run')} of {root}", highlight=False, soft_wrap=True)
    out.print(f"in another shell:  export PREFECT_API_URL={api}", highlight=False, soft_wrap=True)


def down(folder: Folder = FOLDER) -> None:
    """Stop the services that `ogls up` started; other servers are not stopped."""
    services = Services(folder)
    with services.lock():
        names = [n for n in ("worker", "mlflow", "prefect") if n in services.recorded()]
        for name in names:
            out.print(f"{name}: {'stopped' if services.stop(name) else 'was not running'}", highlight=False)
    if not names:
        out.print(f"no services are recorded in {folder}", highlight=False)


def _start_prefect(services: Services, host: str, port: int, home: Path) -> str:
    def alive(at: str) -> bool:
        return responds(f"{at}/health", "true")

    url = f"{_local_url(host, port)}/api"
    if running := _find_running(services, "prefect", url, alive, "the Prefect server", "a Prefect server"):
        return running
    _require_free_port(host, port, "--prefect-port")
    _move_old_database(services, home)
    home.mkdir(parents=True, exist_ok=True)
    environment = {
        "PREFECT_HOME": str(home),
        _DATABASE: os.environ.get(_DATABASE) or database_url(home),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_API_URL": "/api",  # relative, so that the UI works at any address
        # Seconds between heartbeats; an automation marks a flow run without heartbeats as Crashed.
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
    }
    command = ("prefect", "server", "start", "--host", host, "--port", str(port))
    with waiting("starting the Prefect server"):
        return services.start("prefect", command, url, environment, lambda: alive(url)).url


def _move_old_database(services: Services, home: Path) -> None:
    """Version 0.3.0 kept Prefect's home among the services: move it, so that its flow runs stay visible."""
    old = services.folder / "prefect"
    if (old / "prefect.db").exists() and not home.exists():
        home.parent.mkdir(parents=True, exist_ok=True)
        old.rename(home)


def _start_mlflow(services: Services, host: str, port: int, store: Path) -> str:
    def alive(at: str) -> bool:
        return responds(f"{at}/health", "OK") and responds(f"{at}/version")

    url = _local_url(host, port)
    if running := _find_running(services, "mlflow", url, alive, "MLflow", "an MLflow server"):
        return running
    _require_free_port(host, port, "--mlflow-port")
    store.mkdir(parents=True, exist_ok=True)
    command = (
        *("mlflow", "server", "--host", host, "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{store}/mlflow.db", "--default-artifact-root", f"{store}/artifacts"),
    )
    # MLflow starts eight job processes (1.5 GiB) to evaluate LLM applications. Tracking does not use them.
    variable = "MLFLOW_SERVER_ENABLE_JOB_EXECUTION"
    environment = {variable: os.environ.get(variable, "false")}
    with waiting("starting MLflow"):
        return services.start("mlflow", command, url, environment, lambda: alive(url)).url


def _find_running(
    services: Services, name: str, url: str, alive: Callable[[str], bool], ours: str, other: str
) -> str | None:
    """The URL of a running server: the recorded one, or another one that responds at `url`.

    None if no server responds; then a recorded process that does not respond has been stopped.
    """
    if running := services.responding_url(name, alive):
        err.print(f"{ours} is already running: {running}", soft_wrap=True)
        return running
    services.stop(name)
    if not alive(url):
        return None
    err.print(
        f"{other} that was not started here responds at {url}: it is used, and `ogls down` will not stop it",
        soft_wrap=True,
    )
    return url


def _start_worker(services: Services, environment: dict[str, str]) -> None:
    if "worker" in services.running():
        err.print("the worker is already running")
        return
    command = ("prefect", "worker", "start", "--pool", POOL, "--type", "process", "--name", "ogls")
    worker_environment = {**environment, "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"}
    with waiting("starting the worker"):
        services.start("worker", command, "", worker_environment, _worker_online)


def _local_url(host: str, port: int) -> str:
    """The URL of a server that listens on `host`, for processes on this machine."""
    return f"http://{HOST if host == '0.0.0.0' else host}:{port}"


def _require_free_port(host: str, port: int, option: str) -> None:
    """Raises UserError if a process listens on the port; `option` is the command-line option that sets it."""
    if owner := describe_port_owner(port, host):
        raise UserError(f"port {port} is used by {owner}; stop it, or choose another port: ogls up {option} {port + 1}")


def _worker_online() -> bool:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        reply = client.request(
            "POST", "/work_pools/{work_pool_name}/workers/filter", path_params={"work_pool_name": POOL}, json={}
        )
    return any(worker["status"] == "ONLINE" for worker in reply.json())


def _create_pool_and_limit() -> None:
    """Create the work pool, and the concurrency limit that allows one GPU stage at a time on this machine."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists

    with get_client(sync_client=True) as client:
        with suppress(ObjectAlreadyExists):
            client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
        client.upsert_global_concurrency_limit_by_name(GPU_LIMIT, 1)


def _deploy(file: Path) -> None:
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(file)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if result.returncode:
        output_end = "\n  ".join((result.stdout + result.stderr).strip().splitlines()[-12:])
        raise UserError(f"`prefect deploy` failed for {file}; the end of its output:\n  {output_end}")


def _register_runs(root: str) -> int:
    """Show the runs of a store that Prefect does not know. Returns their number; warns if the store cannot be read."""
    from ogls.store import Store
    from tasks.register import register_runs

    try:
        return register_runs(Store(root))
    except UserError as error:
        err.print(f"runs of {root} are not shown: {error}", style="yellow", markup=False, soft_wrap=True)
        return 0


def _update_automations() -> int:
    """Create the automations in the folder, or update those with the same name. Returns their number.

    An automation with an action on a missing block is skipped with a message.
    """
    import yaml
    from prefect.automations import Automation

    count = 0
    for path in sorted(AUTOMATIONS.glob("*.yaml")):
        spec = yaml.safe_load(path.read_text())
        missing = [name for action in spec["actions"] if (name := _fill_block(action))]
        if missing:
            err.print(
                f"skipped {path}: no block {missing[0]}; create it in the Prefect UI, then run `ogls up` again",
                soft_wrap=True,
            )
            continue
        automation = Automation.model_validate(spec)
        try:
            existing: Any = Automation.read(name=automation.name)
            automation.id = existing.id
            automation.update()
        except ValueError:
            automation.create()
        count += 1
    return count


def _fill_block(action: dict[str, Any]) -> str:
    """Replace `block: TYPE/NAME` of an action with the id of the block. Returns TYPE/NAME if the block does not exist.

    Returns "" otherwise.
    """
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    name = action.pop("block", "")
    if not name:
        return ""
    block_type, _, document = name.partition("/")
    with get_client(sync_client=True) as client:
        try:
            action["block_document_id"] = client.read_block_document_by_name(document, block_type).id
        except ObjectNotFound:
            return str(name)
    return ""
