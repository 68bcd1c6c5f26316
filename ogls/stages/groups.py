"""Read the rollouts of a round from the store, with their outcomes or with their cached states."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import accumulate
from typing import TYPE_CHECKING

from ogls.config import Pool
from ogls.progress import Progress, no_progress
from ogls.records import Key, Rollout
from ogls.stages import columns
from ogls.stages.heads import Heads
from ogls.stages.run import Run
from ogls.store.manifest import FileEntry
from ogls.store.shards import read_rows

if TYPE_CHECKING:
    from torch import Tensor


def read_groups(run: Run, round_: int) -> dict[str, list[Rollout]]:
    """The rollouts of a round with their outcomes, grouped by problem."""
    return columns.to_rollouts(run.records.read("trajectories", round_), run.records.read("verdicts", round_))


def state_keys(run: Run, round_: int) -> list[tuple[FileEntry, list[Key]]]:
    """The shards of teacher states of a round, each with the key of the rollout of every row, in order.

    Reads the small table `contexts`, which has the rows in the same order; in a store without it, columns of the
    shards.
    """
    names = ["problem_id", "sample"]
    entries = run.records.list_shards("teacher_states", round_)
    if run.records.list_shards("contexts", round_):
        rows = run.records.read("contexts", round_, names)
    else:  # before schema version 3
        rows = run.records.read("teacher_states", round_, names)
    keys = list(zip(rows["problem_id"].to_pylist(), rows["sample"].to_pylist(), strict=True))
    ends = list(accumulate(entry.rows for entry in entries))
    return [(entry, keys[end - entry.rows : end]) for entry, end in zip(entries, ends, strict=True)]


def read_states(
    run: Run, round_: int, chosen: Collection[Key] | None = None, progress: Progress = no_progress
) -> Iterator[tuple[Key, dict[Pool, Tensor]]]:
    """Yield (key, cached states [T, D] by pool) of every rollout of a round, or of the `chosen` ones.

    Of a shard, only the row groups with chosen rollouts are read.
    """
    entries = run.records.list_shards("teacher_states", round_)
    keys_of = {} if chosen is None else {entry.path: keys for entry, keys in state_keys(run, round_)}
    for done, entry in enumerate(entries, start=1):
        rows = [i for i, key in enumerate(keys_of.get(entry.path, ())) if key in (chosen or ())]
        if chosen is None:
            yield from columns.unpack_states(run.records.read_shard(entry)).items()
        elif rows:
            yield from columns.unpack_states(read_rows(run.records, entry, rows)).items()
        progress(done, len(entries))


def cached_rollouts(
    run: Run, round_: int, heads: Heads, progress: Progress = no_progress, chosen: Collection[Key] | None = None
) -> Iterator[tuple[Rollout, Tensor, dict[Pool, Tensor]]]:
    """Yield (rollout, token ids [T], states [T, D] by pool) of every rollout with cached states, or of `chosen` ones.

    The states are placed for `heads`. T is the number of tokens that the teacher scored.
    """
    import torch

    rollouts = {r.key: r for group in read_groups(run, round_).values() for r in group}
    for key, states in read_states(run, round_, chosen, progress):
        tokens = torch.tensor(rollouts[key].token_ids[: len(states["base"])], device=heads.matrix.device)
        yield rollouts[key], tokens, heads.place(states)
