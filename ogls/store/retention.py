"""Which cached teacher states may go: those of trained rounds, all but the newest few. Nothing else ever does.

A dropped round keeps its manifest, which says when, so its stage stays done and no later one is done again.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from ogls.store.manifest import DROPPABLE, FileEntry, Manifest, utc_now
from ogls.store.run_store import RunStore


@dataclass(frozen=True)
class DroppableStates:
    """The teacher states of one round of one run."""

    run: str
    round: int
    files: int
    bytes: int


def list_droppable(run: RunStore, keep: int) -> list[DroppableStates]:
    """Rounds whose states may go so that the `keep` newest trained ones stay; ValueError for keep < 1."""
    if keep < 1:
        raise ValueError(f"at least one round's states are kept, not {keep}")
    trained = [r for r in run.rounds(DROPPABLE) if run.manifest("updates", r)]
    found = []
    for round_ in trained[:-keep]:
        there = set(run.storage.list_names(f"{run.name}/{run.folder(DROPPABLE, round_)}"))
        manifest = run.manifest(DROPPABLE, round_)
        mine = [e for e in _states(manifest) if e.path.rsplit("/", 1)[1] in there] if manifest else []
        if mine:
            found.append(DroppableStates(run.name, round_, len(mine), sum(e.bytes for e in mine)))
    return found


def drop_states(run: RunStore, round_: int) -> None:
    """Drop one round's states: first it is recorded, then the files go, so that a crash between loses nothing."""
    manifest = run.manifest(DROPPABLE, round_)
    if manifest is None:
        return
    marked = replace(manifest, dropped=manifest.dropped or utc_now())
    run.write_json(f"{run.folder(DROPPABLE, round_)}/manifest.json", asdict(marked))
    for entry in _states(manifest):
        run.storage.remove(f"{run.name}/{entry.path}")


def _states(manifest: Manifest) -> list[FileEntry]:
    return [entry for entry in manifest.files if entry.table == DROPPABLE]
