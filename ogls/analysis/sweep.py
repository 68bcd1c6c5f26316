"""`ogls sweep`: measures a grid of recipes on the cached states of a round, and writes four tables and a figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ogls.analysis.figures import sweep_figure
from ogls.config import Pool
from ogls.distillation.concatenate import concatenate
from ogls.distillation.style import classify, substance_only
from ogls.distillation.sweep import (
    RECIPES,
    STRENGTHS,
    Measures,
    SweepPoint,
    SweepTokens,
    agreement_rows,
    class_rows,
    measure_points,
    position_rows,
    recipe_grid,
    summary_rows,
)
from ogls.errors import DataError
from ogls.models.load import load_tokenizer
from ogls.progress import Progress, no_progress
from ogls.records import SWEEP_AGREEMENT, SWEEP_CLASSES, SWEEP_POSITIONS, SWEEPS, StageResult
from ogls.records.schema import to_arrow
from ogls.stages.groups import cached_rollouts
from ogls.stages.heads import load_heads
from ogls.stages.run import Run
from ogls.store.writer import StageWriter

FIGURES, FIGURE = "figures", "sweep.png"


def sweep(
    run: Run,
    round_: int,
    progress: Progress = no_progress,
    recipes: Sequence[str] = RECIPES,
    strengths: Sequence[float] = STRENGTHS,
) -> StageResult:
    """Measure recipes and strengths on the cached states of a round.

    Raises DataError if the round has no cached states, or if its pools allow none of the recipes.
    """
    config = run.config
    inputs = {
        "model": run.identity.model,
        "temperature": config.steer.temperature,
        "states": run.digest("teacher_states", round_),
        "trajectories": run.digest("trajectories", round_),
        "classes": config.style.model_dump(mode="json")["classes"],
        "mistake_nats": config.train.mistake_nats,
        "recipes": recipes,
        "strengths": strengths,
    }

    def work(writer: StageWriter) -> dict[str, Any]:
        heads = load_heads(config)
        classes = classify(load_tokenizer(config.model), len(heads.matrix), config.style.classes)
        substance = substance_only(classes, config.style.classes).to(heads.matrix.device)
        limits = config.steer.batch_tokens, config.steer.temperature, substance
        points: list[SweepPoint] | None = None
        measured: list[list[Measures]] = []
        rollouts: list[tuple[int, bool, int]] = []  # (number of tokens, correct, group)
        token_classes: list[np.ndarray] = []
        groups: dict[str, int] = {}
        for rollout, tokens, states in cached_rollouts(run, round_, heads, progress):
            if points is None:
                points = _points(run, round_, recipes, strengths)
            measured.append(measure_points(states, tokens, points, heads.matrix, *limits))
            group_number = groups.setdefault(rollout.problem_id, len(groups))
            rollouts.append((len(tokens), rollout.outcome == "correct", group_number))
            token_classes.append(classes[tokens.cpu()].numpy())
        if points is None:
            raise DataError(
                f"round {round_} of run {config.name} has no cached states: no rollout of the round was scored"
            )
        measures = [concatenate(parts) for parts in zip(*measured, strict=True)]
        lengths, correct, group = np.array(rollouts).T
        locations = SweepTokens(
            rollout=np.repeat(np.arange(len(rollouts)), lengths),
            position=np.concatenate([np.arange(n) for n in lengths]),
            correct=np.repeat(correct == 1, lengths),
            token_class=np.concatenate(token_classes),
            group=np.repeat(group, lengths),
        )
        _write_tables(writer, run, round_, points, measures, locations)
        return {"points": len(points), "rollouts": len(rollouts)}

    return run.carry_out("sweeps", round_, inputs, work)


def _write_tables(
    writer: StageWriter,
    run: Run,
    round_: int,
    points: list[SweepPoint],
    measures: list[Measures],
    tokens: SweepTokens,
) -> None:
    """Write the four tables and the figure."""
    rows = list(summary_rows(points, measures, tokens, run.config.train.mistake_nats))
    positions = list(position_rows(points, measures, tokens))
    by_class = class_rows(points, measures, tokens, [c.name for c in run.config.style.classes])
    writer.write_shard(0, to_arrow(SWEEPS, rows))
    writer.write_extra(SWEEP_POSITIONS, to_arrow(SWEEP_POSITIONS, positions))
    writer.write_extra(SWEEP_CLASSES, to_arrow(SWEEP_CLASSES, list(by_class)))
    writer.write_extra(SWEEP_AGREEMENT, to_arrow(SWEEP_AGREEMENT, list(agreement_rows(points, measures))))
    size = f"{len(tokens.position)} tokens, {len(np.unique(tokens.rollout))} rollouts"
    writer.attach_file(FIGURES, FIGURE, sweep_figure(rows, positions, f"{run.config.name}, round {round_}: {size}"))


def _points(run: Run, round_: int, recipes: Sequence[str], strengths: Sequence[float]) -> list[SweepPoint]:
    """Return the points that the cached pools allow, and the run's own recipe if it has no name.

    Raises DataError if there is none.
    """
    own = run.config.steer
    custom = [SweepPoint("custom", None, own.to_recipe())] if own.recipe == "custom" else []
    points = recipe_grid(_common_pools(run, round_), recipes, strengths) + custom
    if not points:
        raise DataError(
            f"the pools cached in round {round_} allow none of {', '.join(recipes)}: in a new run, set teacher.pools "
            "to cache more"
        )
    return points


def _common_pools(run: Run, round_: int) -> set[Pool]:
    """Return the pools that every scored rollout of a round has."""
    pools: dict[tuple[str, int], set[Pool]] = {}
    for row in run.records.read("teacher_states", round_, ["problem_id", "sample", "pool"]).to_pylist():
        pools.setdefault((row["problem_id"], row["sample"]), set()).add(row["pool"])
    return set.intersection(*pools.values())
