"""Delete cached teacher states of old trained rounds to save space. No other table is ever deleted.

A dropped round keeps its manifest, with the time of the deletion, so its stage stays done and no later stage is redone.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from ogls.store.manifest import DROPPABLE, FileEntry, Manifest, utc_now
from ogls.store.run_store import RunStore


@dataclass(frozen=True)
class DroppableStates:
    """The teacher states of one round, which can be deleted."""

    run: str
    round: int
    files: int
    bytes: int


def list_droppable(run: RunStore, keep: int) -> list[DroppableStates]:
    """List the rounds whose states can be deleted: all trained rounds except the `keep` newest.

    Raises ValueError if keep < 1.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, not {keep}")
    trained = [r for r in run.rounds(DROPPABLE) if run.manifest("updates", r)]
    droppable = []
    for round_ in trained[:-keep]:
        folder = run.folder(DROPPABLE, round_)
        present = {f"{folder}/{name}" for name in run.storage.list_files(f"{run.name}/{folder}")}
        manifest = run.manifest(DROPPABLE, round_)
        entries = [e for e in _states(manifest) if e.path in present] if manifest else []
        if entries:
            droppable.append(DroppableStates(run.name, round_, len(entries), sum(e.bytes for e in entries)))
    return droppable


def drop_states(run: RunStore, round_: int) -> None:
    """Delete the states of one round. The manifest records the deletion first, so a crash loses nothing."""
    manifest = run.manifest(DROPPABLE, round_)
    if manifest is None:
        return
    marked = replace(manifest, dropped=manifest.dropped or utc_now())
    run.write_json(f"{run.folder(DROPPABLE, round_)}/manifest.json", asdict(marked))
    for entry in _states(manifest):
        run.storage.remove(f"{run.name}/{entry.path}")


def _states(manifest: Manifest) -> list[FileEntry]:
    return [entry for entry in manifest.files if entry.table == DROPPABLE]
