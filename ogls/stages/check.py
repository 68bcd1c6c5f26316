"""Find the damaged files of a run, and restore those that can be computed again to the same bytes.

A file is restored only if its stage, computed again from the stored inputs, gives exactly the bytes that the manifest
lists. So nothing that later rounds were built on changes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ogls.config import build_config
from ogls.errors import UserError
from ogls.progress import Progress, no_progress
from ogls.records import TABLES
from ogls.records.stages import STAGES as STAGE_FACTS
from ogls.stages.registry import STAGES
from ogls.stages.rounds import FOLDER as SUMMARY
from ogls.stages.rounds import find_summary_damage, rebuild_file, record_round
from ogls.stages.run import POLICY, Run
from ogls.store.manifest import FileEntry, Manifest
from ogls.store.overlay import Overlay
from ogls.store.run_store import RunStore
from ogls.store.storage import Storage


@dataclass(frozen=True)
class Damage:
    """A file of a finished stage that is missing or has other bytes than its manifest lists."""

    stage: str
    round: int
    path: str  # relative to the run's folder
    problem: str
    consequence: str


def find_damage(run: Run, progress: Progress = no_progress) -> list[Damage]:
    """Compare every file of the run with its manifest, oldest round first. Reads the whole run."""
    found = []
    order = [facts.table for facts in STAGE_FACTS]
    others = [table.name for table in TABLES.values() if table.manifest_table == table.name and table.name not in order]
    stages = [(round_, table) for table in (*order, *others) for round_ in _rounds(run, table)]
    for done, (round_, table) in enumerate(sorted(stages, key=lambda s: s[0]), start=1):
        for path, problem in _damaged_files(run, table, round_):
            stage = TABLES[table].stage
            found.append(Damage(stage, round_, path, problem, _consequence(run, stage, round_, path)))
        progress(done, len(stages))
    summary = find_summary_damage(run.records).items()
    return found + [
        Damage(SUMMARY, 0, path, problem, "tables of rounds show other numbers") for path, problem in summary
    ]


def _rounds(run: Run, table: str) -> list[int]:
    """The rounds for which a table has a folder."""
    names = run.records.storage.list_names(f"{run.records.name}/{table}")
    return sorted(int(n.removeprefix("round=")) for n in names if n.startswith("round="))


def _damaged_files(run: Run, table: str, round_: int) -> Iterator[tuple[str, str]]:
    """(path, problem) of each damaged file of a stage. A stage that is not finished has none."""
    manifest = run.records.manifest(table, round_)
    if manifest is not None:
        for entry in manifest.present_files:
            if problem := run.records.find_damage(entry):
                yield entry.path, problem
    elif run.is_closed(round_) and table not in ("health", "sweeps"):
        yield f"{run.records.folder(table, round_)}/manifest.json", "is missing or cannot be read"


def _consequence(run: Run, stage: str, round_: int, path: str) -> str:
    """What the damage of a file means for the run."""
    if stage not in STAGES:
        return f"`ogls {stage}` computes it again"
    if not run.is_closed(round_):
        return "the next training redoes the stage"
    newest = run.records.newest_manifest("updates")
    if path.startswith(f"{POLICY}/") and newest and run.start_point(newest.round + 1).round == round_:
        return "training cannot continue: the next round starts from this policy"
    if stage == "prepare":
        return "training cannot continue: every stage reads the problems"
    return "training does not need it; queries, reports and exports of this round do"


def repair(run: Run, damaged: Sequence[Damage], progress: Progress = no_progress) -> Iterator[tuple[Damage, str]]:
    """Restore damaged files, and yield each with the reason why it was not restored (empty: it was).

    Computes a stage again into a temporary folder, with the numerics settings of its manifest.
    """
    stages = list(dict.fromkeys((d.stage, d.round) for d in damaged))
    for done, (stage, round_) in enumerate(stages, start=1):
        of_stage = [d for d in damaged if (d.stage, d.round) == (stage, round_)]
        if stage == SUMMARY:
            for damage in of_stage:
                rebuild_file(run.records, damage.path)
                yield damage, ""
            continue
        if stage not in STAGES:
            yield from ((d, d.consequence) for d in of_stage)
            continue
        with tempfile.TemporaryDirectory(prefix="ogls-repair-") as folder:
            try:
                fresh, computed = _compute_again(run, stage, round_, folder)
            except UserError as error:
                yield from ((d, str(error)) for d in of_stage)
                continue
            for damage in of_stage:
                yield damage, _restore(run, damage, fresh, computed)
        progress(done, len(stages))


def _compute_again(run: Run, stage: str, round_: int, folder: str) -> tuple[RunStore, Manifest]:
    """Compute a stage into a folder: the records with its output, and its manifest."""
    table = next(facts.table for facts in STAGE_FACTS if facts.name == stage)
    manifest = run.records.manifest(table, round_)
    overrides = [f"{k}={str(v).lower()}" for k, v in (manifest.numerics if manifest else {}).items()]
    overrides.append("execution.workers=local")  # workers in other processes do not see the overlay
    again = Run(build_config(run.config.model_dump(mode="json"), overrides))
    again.records = RunStore(Overlay(run.records.storage, Storage(folder)), run.records.name)
    again.may_redo_closed = True
    STAGES[stage](again, round_)
    computed = again.records.manifest(table, round_)
    assert computed  # the stage has just written it
    return again.records, computed


def _restore(run: Run, damage: Damage, fresh: RunStore, computed: Manifest) -> str:
    """Write the computed bytes of a damaged file, if they are those that its manifest lists."""
    by_name = {_name(entry): entry for entry in computed.files}
    if damage.path.endswith("/manifest.json"):
        return _restore_manifest(run, damage.path, fresh, computed)
    expected = _listed(run, damage)
    entry = by_name.get(_name(expected))
    if entry is None or entry.sha256 != expected.sha256:
        return "computed again, it has other bytes (another device, or other versions of the libraries)"
    content, _ = fresh.read_verified(entry)
    run.records.storage.write_bytes(f"{run.records.name}/{damage.path}", content)
    return ""


def _restore_manifest(run: Run, path: str, fresh: RunStore, computed: Manifest) -> str:
    """Write the computed manifest, if the files that it lists are those in the store."""
    if any(run.records.find_damage(entry) for entry in computed.files):
        return "computed again, the stage gives other files than the stored ones"
    run.records.write_json(path, fresh.read_json(path) or {})
    record_round(run.records, computed.round)  # the stage took another time
    return ""


def _name(entry: FileEntry) -> tuple[str, str]:
    """What identifies a file within a stage; its folder may have the epoch of a lease."""
    return entry.table, entry.path.rsplit("/", 1)[1]


def _listed(run: Run, damage: Damage) -> FileEntry:
    """The entry of a damaged file in the manifest of its stage."""
    table = next(facts.table for facts in STAGE_FACTS if facts.name == damage.stage)
    manifest = run.records.manifest(table, damage.round)
    assert manifest  # the damage was found through it
    return next(entry for entry in manifest.files if entry.path == damage.path)
