"""What a Prefect server is told about a project: work pool, limit, deployments, automations, and runs of the store."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from flows.console import count_of, err, out, waiting
from ogls.errors import UserError

POOL = "ogls"
GPU_LIMIT = "ogls-gpu"
DEPLOYMENTS = Path("deployments/prefect.yaml")
AUTOMATIONS = Path("deployments/automations")


def require_file(file: Path) -> None:
    """Raises UserError if the file with the deployments does not exist."""
    if not file.is_file():
        raise UserError(f"no file {file}: run this command in a project (`ogls init` writes one), or set --file")


def deploy(file: Path, root: str) -> None:
    """Create or update the deployments and the automations, and register the runs of the store; print what was done."""
    with waiting("deploying"):
        _deploy(file)
        count = _update_automations()
    with waiting("reading the store"):
        registered = _register_runs(root)
    deployed = f"{file}, {count_of(count, 'automation')}" if count else str(file)
    out.print(f"deployed    {deployed}", highlight=False, soft_wrap=True)
    if registered:
        out.print(f"registered  {count_of(registered, 'run')} of {root}", highlight=False, soft_wrap=True)


def create_pool_and_limit() -> None:
    """Create the work pool, and the concurrency limit that allows one GPU stage at a time on this machine."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

    with get_client(sync_client=True) as client:
        with suppress(ObjectAlreadyExists):
            client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
        try:
            client.read_global_concurrency_limit_by_name(GPU_LIMIT)  # keep a limit that was raised
        except ObjectNotFound:
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
