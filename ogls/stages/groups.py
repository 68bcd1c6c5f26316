"""Read the rollouts of a round from the store, with their outcomes or with their cached states."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ogls.config import Pool
from ogls.progress import Progress, no_progress
from ogls.records import Rollout
from ogls.stages import columns
from ogls.stages.heads import Heads
from ogls.stages.run import Run

if TYPE_CHECKING:
    from torch import Tensor


def read_groups(run: Run, round_: int) -> dict[str, list[Rollout]]:
    """The rollouts of a round with their outcomes, grouped by problem."""
    return columns.to_rollouts(run.records.read("trajectories", round_), run.records.read("verdicts", round_))


def cached_rollouts(
    run: Run, round_: int, heads: Heads, progress: Progress = no_progress
) -> Iterator[tuple[Rollout, Tensor, dict[Pool, Tensor]]]:
    """Yield (rollout, token ids [T], states [T, D] by pool) of every rollout with cached states, placed for `heads`.

    T is the number of tokens that the teacher scored.
    """
    import torch

    rollouts = {r.key: r for group in read_groups(run, round_).values() for r in group}
    entries = run.records.list_shards("teacher_states", round_)
    for done, entry in enumerate(entries, start=1):
        for key, states in columns.unpack_states(run.records.read_shard(entry)).items():
            tokens = torch.tensor(rollouts[key].token_ids[: len(states["base"])], device=heads.matrix.device)
            yield rollouts[key], tokens, heads.place(states)
        progress(done, len(entries))
