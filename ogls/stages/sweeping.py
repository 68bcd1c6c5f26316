"""`sweep`: read a round's cached states, measure a grid of recipes, write three tables. The head is all that runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ogls import columns
from ogls import sweep as sweeping
from ogls.errors import DataError
from ogls.figures import sweep_figure
from ogls.policy import load_head
from ogls.records import SWEEP_AGREEMENT, SWEEP_POSITIONS, SWEEPS, StageResult, to_arrow
from ogls.run import Progress, Run, silent
from ogls.stages.common import groups_of
from ogls.writer import StageWriter

FIGURES, FIGURE = "figures", "sweep.png"


def sweep(
    run: Run,
    round_: int,
    progress: Progress = silent,
    recipes: Sequence[str] = sweeping.RECIPES,
    strengths: Sequence[float] = sweeping.STRENGTHS,
) -> StageResult:
    """Measure recipes and strengths on a round's cached states. Raises DataError where there is nothing to measure."""
    config = run.config
    inputs = {
        "model": config.model,
        "states": run.digest("teacher_states", round_),
        "trajectories": run.digest("trajectories", round_),
        "recipes": recipes,
        "strengths": strengths,
    }

    def work(writer: StageWriter) -> dict[str, Any]:
        import torch

        head = load_head(config.model)
        rollouts = {r.key: r for group in groups_of(run, round_).values() for r in group}
        entries = [e for e in run.records.shards("teacher_states", round_) if e.rows]
        if not entries:
            raise DataError(f"round {round_} of run {config.name} has no cached states: no rollout was taught in it")
        points: list[sweeping.Point] = []
        measured: list[list[sweeping.Measures]] = []
        places: list[tuple[int, int, bool]] = []  # (tokens, rollout, correct)
        for done, entry in enumerate(entries, start=1):
            cached = columns.unpack_states(run.records.read_shard(entry))
            common = set.intersection(*(set(pools) for pools in cached.values()))
            points = points or sweeping.grid(common, recipes, strengths)
            for key, states in cached.items():
                tokens = torch.tensor(rollouts[key].token_ids[: len(states["base"])], device=head.device)
                on_device = {p: s.to(head.device) for p, s in states.items()}
                measured.append(sweeping.measure(on_device, tokens, points, head, config.steer.batch_tokens))
                places.append((len(tokens), len(places), rollouts[key].outcome == "correct"))
            progress(done, len(entries))
        if not points:
            names = ", ".join(recipes)
            raise DataError(
                f"the pools cached in round {round_} allow none of {names}: set teacher.pools to cache more"
            )
        measures = [sweeping.joined(parts) for parts in zip(*measured, strict=True)]
        where = sweeping.Tokens(
            rollout=np.concatenate([np.full(n, i) for n, i, _ in places]),
            position=np.concatenate([np.arange(n) for n, _, _ in places]),
            correct=np.concatenate([np.full(n, c) for n, _, c in places]),
        )
        rows = list(sweeping.summary_rows(points, measures, where))
        positions = list(sweeping.position_rows(points, measures, where))
        writer.shard(0, to_arrow(SWEEPS, rows))
        writer.also(SWEEP_POSITIONS, to_arrow(SWEEP_POSITIONS, positions))
        writer.also(SWEEP_AGREEMENT, to_arrow(SWEEP_AGREEMENT, list(sweeping.agreement_rows(points, measures))))
        title = f"{config.name}, round {round_}: {len(where.position)} tokens, {len(places)} rollouts"
        writer.attach(FIGURES, FIGURE, sweep_figure(rows, positions, title))
        return {"points": len(points), "rollouts": len(places)}

    return run.stage("sweeps", round_, inputs, work)
