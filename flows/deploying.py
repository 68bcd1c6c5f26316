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
    import yaml

    entries = yaml.safe_load(file.read_text())["deployments"]
    with waiting("deploying"):
        _deploy(file)
        count, skipped = _update_automations()
    with waiting("reading the store"):
        registered = _register_runs(root)
    deployed = f"{file}, {count_of(count, 'automation')}" if count else str(file)
    out.print(f"deployed    {deployed}", highlight=False, soft_wrap=True)
    if scheduled := [f"{e['name']} ({s['cron']})" for e in entries for s in e.get("schedules", ()) if "cron" in s]:
        out.print(f"scheduled   {', '.join(scheduled)}; pause them in the UI", highlight=False, soft_wrap=True)
    for block, names in skipped.items():
        out.print(f"skipped     {', '.join(names)}: no block {block}", highlight=False, soft_wrap=True)
    if registered:
        out.print(f"registered  {count_of(registered, 'run')} of {root}", highlight=False, soft_wrap=True)


def create_pool_and_limit() -> None:
    """Create the work pool, and the concurrency limit that allows one GPU stage at a time on this machine."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists

    from tasks.devices import create_limit

    with get_client(sync_client=True) as client:
        with suppress(ObjectAlreadyExists):
            client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
        create_limit(client, GPU_LIMIT)


def _deploy(file: Path) -> None:
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(file)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if result.returncode:
        output_end = "\n  ".join((result.stdout + result.stderr).strip().splitlines()[-12:])
        raise UserError(f"`prefect deploy` failed for {file}; the end of its output:\n  {output_end}")


def _register_runs(root: str) -> int:
    """Show the runs of a store that Prefect does not know. Returns their number; warns if the store cannot be read."""
    from ogls.store import Store
    from tasks.register import mark_dead_flow_runs, register_runs

    try:
        if dead := mark_dead_flow_runs(Store(root)):
            err.print(f"{count_of(dead, 'flow run')} marked as Crashed: no process holds the run any more")
        return register_runs(Store(root))
    except UserError as error:
        err.print(f"runs of {root} are not shown: {error}", style="yellow", markup=False, soft_wrap=True)
        return 0


def _update_automations() -> tuple[int, dict[str, list[str]]]:
    """Create the automations in the folder, or update those that differ. Returns their number, and the skipped ones.

    An automation with an action on a missing block is skipped: names by missing block.
    """
    import yaml
    from prefect.automations import Automation

    count = 0
    skipped: dict[str, list[str]] = {}
    for path in sorted(AUTOMATIONS.glob("*.yaml")):
        spec = yaml.safe_load(path.read_text())
        missing = [name for action in spec["actions"] if (name := _fill_block(action))]
        if missing:
            skipped.setdefault(missing[0], []).append(path.name)
            continue
        automation = Automation.model_validate(spec)
        try:
            existing: Any = Automation.read(name=automation.name)
            automation.id = existing.id
            automation.update()
        except ValueError:
            automation.create()
        count += 1
    return count, skipped


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
