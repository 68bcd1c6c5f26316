"""`ogls sweep`: measure a grid of recipes on the cached states of a round, and write three tables and a figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ogls.analysis.figures import sweep_figure
from ogls.config import Pool
from ogls.distillation import sweep as sweeping
from ogls.distillation.concatenate import concatenate
from ogls.errors import DataError
from ogls.models.load import load_head
from ogls.progress import Progress, no_progress
from ogls.records import SWEEP_AGREEMENT, SWEEP_POSITIONS, SWEEPS, StageResult
from ogls.records.schema import to_arrow
from ogls.stages.groups import cached_rollouts
from ogls.stages.run import Run
from ogls.store.writer import StageWriter

FIGURES, FIGURE = "figures", "sweep.png"


def sweep(
    run: Run,
    round_: int,
    progress: Progress = no_progress,
    recipes: Sequence[str] = sweeping.RECIPES,
    strengths: Sequence[float] = sweeping.STRENGTHS,
) -> StageResult:
    """Measure recipes and strengths on the cached states of a round.

    Raises DataError if there is nothing to measure.
    """
    config = run.config
    inputs = {
        "model": config.model,
        "states": run.digest("teacher_states", round_),
        "trajectories": run.digest("trajectories", round_),
        "recipes": recipes,
        "strengths": strengths,
    }

    def work(writer: StageWriter) -> dict[str, Any]:
        head = load_head(config.model)
        points: list[sweeping.SweepPoint] | None = None
        measured: list[list[sweeping.Measures]] = []
        places: list[tuple[int, int, bool]] = []  # (tokens, rollout, correct)
        for rollout, tokens, states in cached_rollouts(run, round_, head.device, progress):
            if points is None:
                points = sweeping.recipe_grid(_common_pools(run, round_), recipes, strengths)
            measured.append(sweeping.measure_points(states, tokens, points, head, config.steer.batch_tokens))
            places.append((len(tokens), len(places), rollout.outcome == "correct"))
        if points is None:
            raise DataError(f"round {round_} of run {config.name} has no cached states: no rollout was scored in it")
        if not points:
            names = ", ".join(recipes)
            raise DataError(
                f"the pools cached in round {round_} allow none of {names}: set teacher.pools to cache more"
            )
        measures = [concatenate(parts) for parts in zip(*measured, strict=True)]
        where = sweeping.TokenPlaces(
            rollout=np.concatenate([np.full(n, i) for n, i, _ in places]),
            position=np.concatenate([np.arange(n) for n, _, _ in places]),
            correct=np.concatenate([np.full(n, c) for n, _, c in places]),
        )
        rows = list(sweeping.summary_rows(points, measures, where))
        positions = list(sweeping.position_rows(points, measures, where))
        writer.write_shard(0, to_arrow(SWEEPS, rows))
        writer.write_extra(SWEEP_POSITIONS, to_arrow(SWEEP_POSITIONS, positions))
        writer.write_extra(SWEEP_AGREEMENT, to_arrow(SWEEP_AGREEMENT, list(sweeping.agreement_rows(points, measures))))
        title = f"{config.name}, round {round_}: {len(where.position)} tokens, {len(places)} rollouts"
        writer.attach_file(FIGURES, FIGURE, sweep_figure(rows, positions, title))
        return {"points": len(points), "rollouts": len(places)}

    return run.carry_out("sweeps", round_, inputs, work)


def _common_pools(run: Run, round_: int) -> set[Pool]:
    """The pools that every scored rollout of a round has."""
    pools: dict[tuple[str, int], set[Pool]] = {}
    for row in run.records.read("teacher_states", round_, ["problem_id", "sample", "pool"]).to_pylist():
        pools.setdefault((row["problem_id"], row["sample"]), set()).add(row["pool"])
    return set.intersection(*pools.values())
