"""Delete files of old trained rounds that training does not need any more: cached teacher states, optimizer states.

No other file is ever deleted. A round whose files were deleted keeps its manifest, with the time of the deletion, so
its stage stays done and no later stage is redone.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from typing import Literal

from ogls.store.manifest import DROPPABLE, FileEntry, Manifest, utc_now
from ogls.store.run_store import RunStore

Kind = Literal["states", "optimizers"]
_TABLES: dict[Kind, str] = {"states": DROPPABLE, "optimizers": "updates"}  # whose manifests list the files
_SEEN = "retention.json"  # by kind: rounds below `below` are done, except those in `kept`


@dataclass(frozen=True)
class Droppable:
    """The files of one round that can be deleted."""

    run: str
    kind: Kind
    round: int
    files: int
    bytes: int


def list_droppable(
    run: RunStore, keep: int, kind: Kind = "states", needed: Collection[int] = (), among: Collection[int] | None = None
) -> list[Droppable]:
    """List the rounds whose files can be deleted: all trained rounds except the `keep` newest and those in `needed`.

    `among` limits the search to some rounds. Raises ValueError if keep < 1.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, not {keep}")
    droppable = []
    for round_ in _trained(run)[:-keep]:
        if round_ in needed or (among is not None and round_ not in among):
            continue
        manifest = run.manifest(_TABLES[kind], round_)
        listed = _files(manifest) if manifest else []
        folders = {entry.table for entry in listed}
        present = {
            f"{run.folder(table, round_)}/{name}"
            for table in folders
            for name in run.storage.list_files(f"{run.name}/{run.folder(table, round_)}")
        }
        if entries := [e for e in listed if e.path in present]:
            droppable.append(Droppable(run.name, kind, round_, len(entries), sum(e.bytes for e in entries)))
    return droppable


def drop_files(run: RunStore, round_: int, kind: Kind = "states") -> None:
    """Delete the files of one round. The manifest records the deletion first, so a crash loses nothing."""
    manifest = run.manifest(_TABLES[kind], round_)
    if manifest is None:
        return
    marked = replace(manifest, dropped=manifest.dropped or utc_now())
    run.write_json(f"{run.folder(_TABLES[kind], round_)}/manifest.json", asdict(marked))
    for entry in _files(manifest):
        run.storage.remove(f"{run.name}/{entry.path}")


def drop_old_files(run: RunStore, keep: int, kind: Kind, needed: Collection[int] = ()) -> list[Droppable]:
    """Delete the files that `list_droppable` lists. Returns what was deleted.

    Looks at each round once, so that the cost does not grow with the run, and again at those that were in `needed`.
    """
    seen = run.read_json(_SEEN) or {}
    below, kept = seen.get(kind, {}).get("below", 0), seen.get(kind, {}).get("kept", [])
    old = _trained(run)[:-keep]
    found = list_droppable(run, keep, kind, needed, [n for n in old if n >= below or n in kept])
    for droppable in found:
        drop_files(run, droppable.round, kind)
    now = {"below": max([below, *(n + 1 for n in old)]), "kept": [n for n in old if n in needed]}
    if now != seen.get(kind):
        run.write_json(_SEEN, {**{k: v for k, v in seen.items() if k in _TABLES}, kind: now})
    return found


def _trained(run: RunStore) -> list[int]:
    """The trained rounds, sorted: those that have begun training, up to the newest one that is done."""
    newest = run.newest_manifest("updates")
    return [n for n in run.started_rounds("updates") if newest and n <= newest.round]


def _files(manifest: Manifest) -> list[FileEntry]:
    return [entry for entry in manifest.files if entry.is_droppable]
