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

from flows.console import configure_prefect, err, out
from flows.services import HOST, LOOPBACK, Services, describe_port_owner, responds
from ogls.errors import UserError

POOL = "ogls"
GPU_LIMIT = "ogls-gpu"
DEPLOYMENTS = Path("deployments/prefect.yaml")
AUTOMATIONS = Path("deployments/automations")
Folder = Annotated[Path, typer.Option("--folder", help="Folder of their databases, logs and process ids.")]


def register(app: Any) -> None:
    """Add the commands to the command line."""
    for command in (up, down):
        app.command()(command)


def up(
    host: Annotated[
        str, typer.Option(help="Address to listen on; any address but loopback is reachable by others.")
    ] = HOST,
    prefect_port: Annotated[int, typer.Option(help="Port of the Prefect server.")] = 4200,
    mlflow_port: Annotated[int, typer.Option(help="Port of MLflow.")] = 5000,
    folder: Folder = Path("data/services"),
    file: Annotated[Path, typer.Option(help="File with the deployments.")] = DEPLOYMENTS,
    store: Annotated[Path, typer.Option(help="MLflow's database and artifacts.")] = Path("data/mlflow"),
) -> None:
    """Start a Prefect server, a worker and MLflow on loopback, and create the deployments.

    Running it again starts only what is missing. `ogls down` stops what `ogls up` started.
    """
    if not file.is_file():
        raise UserError(f"no file {file}: run this in the folder of the project")
    if host not in LOOPBACK:
        err.print(
            f"warning: Prefect and MLflow will listen on {host} without a password: everyone who reaches them "
            "can start runs on this machine; put an authenticating proxy in front of them",
            style="yellow",
            soft_wrap=True,
        )
    configure_prefect()
    services = Services(folder)
    home = services.folder / "prefect"
    with services.held():
        api = _prefect(services, host, prefect_port, home)
        environment = {"PREFECT_API_URL": api, "PREFECT_HOME": str(home)}
        os.environ |= environment
        mlflow = _mlflow(services, host, mlflow_port, store.absolute())
        _pool_and_limit()
        _worker(services, {**environment, "MLFLOW_TRACKING_URI": mlflow})
        _deploy(file)
        made = _automations()
    out.print(f"Prefect     {api.removesuffix('/api')}", highlight=False)
    out.print(f"MLflow      {mlflow}", highlight=False)
    out.print(f"worker      pool {POOL}, log {services.folder / 'worker.log'}", highlight=False, soft_wrap=True)
    out.print(f"deployed    {file}{f', {made} automations' if made else ''}", highlight=False, soft_wrap=True)
    out.print(f"in another shell:  export PREFECT_API_URL={api}", highlight=False, soft_wrap=True)


def down(folder: Folder = Path("data/services")) -> None:
    """Stop what `ogls up` has started, and nothing else."""
    services = Services(folder)
    with services.held():
        names = [n for n in ("worker", "mlflow", "prefect") if n in services.recorded()]
        for name in names:
            out.print(f"{name}: {'stopped' if services.stop(name) else 'was not running'}", highlight=False)
    if not names:
        out.print(f"nothing that `ogls up` started runs in {folder}", highlight=False)


def _prefect(services: Services, host: str, port: int, home: Path) -> str:
    def alive(at: str) -> bool:
        return responds(f"{at}/health", "true")

    url = f"{_reached(host, port)}/api"
    if there := _there(services, "prefect", url, alive, "the Prefect server", "a Prefect server"):
        return there
    _free(host, port, "--prefect-port")
    environment = {
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_API_URL": "/api",  # relative, for any address in the browser
        # Heartbeats, and an automation that marks a flow run without heartbeats as Crashed.
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
    }
    err.print("starting the Prefect server")
    command = ("prefect", "server", "start", "--host", host, "--port", str(port))
    return services.start("prefect", command, url, environment, lambda: alive(url)).url


def _mlflow(services: Services, host: str, port: int, store: Path) -> str:
    def alive(at: str) -> bool:
        return responds(f"{at}/health", "OK") and responds(f"{at}/version")

    url = _reached(host, port)
    if there := _there(services, "mlflow", url, alive, "MLflow", "an MLflow"):
        return there
    _free(host, port, "--mlflow-port")
    store.mkdir(parents=True, exist_ok=True)
    err.print("starting MLflow")
    command = (
        *("mlflow", "server", "--host", host, "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{store}/mlflow.db", "--default-artifact-root", f"{store}/artifacts"),
    )
    # MLflow's job runners (eight processes, 1.5 GiB) evaluate language-model applications; tracking does not use them.
    jobs = "MLFLOW_SERVER_ENABLE_JOB_EXECUTION"
    environment = {jobs: os.environ.get(jobs, "false")}
    return services.start("mlflow", command, url, environment, lambda: alive(url)).url


def _there(services: Services, name: str, url: str, alive: Callable[[str], bool], ours: str, other: str) -> str | None:
    """The URL of a running server: the one that was started here, or another one at `url`.

    None if it must be started.
    """
    if running := services.answering(name, alive):
        err.print(f"{ours} is already running: {running}")
        return running
    services.stop(name)
    if not alive(url):
        return None
    err.print(f"{other} that was not started here responds at {url}: it is used, and ogls down does not stop it")
    return url


def _worker(services: Services, environment: dict[str, str]) -> None:
    if "worker" in services.running():
        err.print("the worker is already running")
        return
    err.print("starting the worker")
    command = ("prefect", "worker", "start", "--pool", POOL, "--type", "process", "--name", "ogls")
    beat = {**environment, "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"}
    services.start("worker", command, "", beat, _worker_online)


def _reached(host: str, port: int) -> str:
    """The URL by which processes of this machine reach a server that listens on `host`."""
    return f"http://{HOST if host == '0.0.0.0' else host}:{port}"


def _free(host: str, port: int, option: str) -> None:
    if owner := describe_port_owner(port, host):
        raise UserError(f"port {port} is used by {owner}; stop it, or choose another port: ogls up {option} {port + 1}")


def _worker_online() -> bool:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        reply = client.request(
            "POST", "/work_pools/{work_pool_name}/workers/filter", path_params={"work_pool_name": POOL}, json={}
        )
    return any(worker["status"] == "ONLINE" for worker in reply.json())


def _pool_and_limit() -> None:
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
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        last = "\n  ".join((done.stdout + done.stderr).strip().splitlines()[-12:])
        raise UserError(f"{file} was not deployed:\n  {last}")


def _automations() -> int:
    """Create or update the automations in the folder, by name. Returns how many.

    An automation whose action names a missing block is skipped with a message.
    """
    import yaml
    from prefect.automations import Automation

    made = 0
    for path in sorted(AUTOMATIONS.glob("*.yaml")):
        about = yaml.safe_load(path.read_text())
        missing = [name for action in about["actions"] if (name := _fill_block(action))]
        if missing:
            err.print(f"{path} needs the block {missing[0]}: create it in the Prefect UI, then run ogls up again")
            continue
        wanted = Automation.model_validate(about)
        try:
            there: Any = Automation.read(name=wanted.name)
            wanted.id = there.id
            wanted.update()
        except ValueError:
            wanted.create()
        made += 1
    return made


def _fill_block(action: dict[str, Any]) -> str:
    """Replace the name of a block (`block: type/name`) by its id. Returns the name if the block does not exist."""
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    name = action.pop("block", "")
    if not name:
        return ""
    kind, _, document = name.partition("/")
    with get_client(sync_client=True) as client:
        try:
            action["block_document_id"] = client.read_block_document_by_name(document, kind).id
        except ObjectNotFound:
            return str(name)
    return ""
