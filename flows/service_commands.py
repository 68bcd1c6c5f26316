"""`ogls up` and `ogls down`: a Prefect server, a worker, MLflow, the deployments and the automations."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.console import OPERATE, Root, err, out, waiting
from flows.deploying import DEPLOYMENTS, POOL, create_pool_and_limit, deploy, require_file
from flows.foreground import check_prefect, configure_prefect, prefect_address
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
from ogls.execution.ray_cluster import accepts_connections

_DATABASE = "PREFECT_SERVER_DATABASE_CONNECTION_URL"
File = Annotated[Path, typer.Option(help="YAML file with the Prefect deployments to create.")]
Folder = Annotated[Path, typer.Option("--folder", help="Folder for logs and process ids.")]


def register(app: Any) -> None:
    """Add the commands to the command line."""
    for command in (up, down):
        app.command(rich_help_panel=OPERATE)(command)
    app.command("deploy", rich_help_panel=OPERATE)(deploy_project)


def up(
    host: Annotated[
        str, typer.Option(help="Address to listen on. Other machines can reach any address that is not loopback.")
    ] = HOST,
    prefect_port: Annotated[int, typer.Option(help="Port of the Prefect server.")] = 4200,
    mlflow_port: Annotated[int, typer.Option(help="Port of the MLflow server.")] = 5000,
    folder: Folder = FOLDER,
    home: Annotated[Path, typer.Option(help="Folder for Prefect's database.")] = PREFECT_FOLDER,
    root: Root = "data/runs",
    file: File = DEPLOYMENTS,
    store: Annotated[Path, typer.Option(help="Folder for MLflow's database and artifacts.")] = Path("data/mlflow"),
    ray: Annotated[
        bool, typer.Option("--ray", help='Also start a Ray cluster of this machine, for execution.workers = "ray".')
    ] = False,
    ray_port: Annotated[int, typer.Option(help="Port of the head of the Ray cluster.")] = 6379,
) -> None:
    """Start a Prefect server, a worker and MLflow on loopback, and create the deployments and automations.

    The server shows the runs of the store, also those that were trained before it was started.
    Run it again to start only what is missing and to update the deployments. `ogls down` stops the services.
    """
    require_file(file)
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
        create_pool_and_limit()
        cluster = {"RAY_ADDRESS": start_ray(services, ray_port)} if ray else {}
        _start_worker(services, {**environment, **cluster, "MLFLOW_TRACKING_URI": mlflow})
        deploy(file, root)
    out.print(f"Prefect     {api.removesuffix('/api')}", highlight=False)
    out.print(f"MLflow      {mlflow}", highlight=False)
    for address in cluster.values():
        out.print(f"Ray         {address}", highlight=False)
    out.print(f"worker      pool {POOL}, log {services.folder / 'worker.log'}", highlight=False, soft_wrap=True)
    out.print("trainings in this folder use them; stop them with: ogls down", highlight=False)
    out.print(f"for prefect commands:  export PREFECT_API_URL={api}", highlight=False, soft_wrap=True)


def deploy_project(file: File = DEPLOYMENTS, root: Root = "data/runs") -> None:
    """Create the deployments, automations and work pool at a running Prefect server (PREFECT_API_URL).

    `ogls up` does it for the server that it starts; this command is for one in a container or on another machine.
    """
    require_file(file)
    configure_prefect()
    if not (address := prefect_address()):
        raise UserError("no Prefect server: set PREFECT_API_URL, or start one with `ogls up`, which also deploys")
    check_prefect(address)
    create_pool_and_limit()
    deploy(file, root)


def down(folder: Folder = FOLDER) -> None:
    """Stop the services that `ogls up` started; other servers are not stopped."""
    services = Services(folder)
    if not services.file.exists():
        out.print(f"no services are recorded in {folder}", highlight=False)
        return
    with services.lock():
        names = [n for n in ("worker", "ray", "mlflow", "prefect") if n in services.recorded()]
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


def start_ray(services: Services, port: int) -> str:
    """Start a Ray cluster of this machine that listens on loopback. Returns the address of its head.

    Raises ConfigError if Ray is not installed.
    """
    from ogls.execution.ray_cluster import LOOPBACK_ONLY, OBJECT_STORE_BYTES, require_ray

    require_ray()
    address = f"{HOST}:{port}"
    if "ray" in services.running() and accepts_connections(services.running()["ray"].url):
        address = services.running()["ray"].url
        err.print(f"the Ray cluster is already running: {address}", soft_wrap=True)
        return address
    services.stop("ray")
    _require_free_port(HOST, port, "--ray-port")
    command = (
        *("ray.scripts.scripts", "start", "--head", "--block", "--node-ip-address", HOST, "--port", str(port)),
        *("--include-dashboard", "false", "--disable-usage-stats", "--object-store-memory", str(OBJECT_STORE_BYTES)),
    )

    def ready() -> bool:
        return accepts_connections(address) and "raylet" in services.children("ray")  # the head, then the node

    with waiting("starting the Ray cluster"):
        return services.start("ray", command, address, LOOPBACK_ONLY, ready).url


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
    with waiting("starting the worker"):
        services.start("worker", command, "", environment, _worker_online)


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
