"""The stage `style`: measure which part of each signal is style and which is substance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ogls.distillation import style as styling
from ogls.distillation.concatenate import concatenate
from ogls.models.load import load_tokenizer
from ogls.progress import Progress, no_progress
from ogls.records import STYLE, Key, StageResult
from ogls.records.schema import to_arrow
from ogls.stages.groups import cached_rollouts, state_keys
from ogls.stages.heads import load_heads
from ogls.stages.run import Run
from ogls.store.writer import StageWriter


def style(run: Run, round_: int, progress: Progress = no_progress) -> StageResult:
    """Split the shift of the target, the direction and each privileged pool into style and substance."""
    config = run.config
    inputs = {
        "style": config.style.model_dump(mode="json"),
        "recipe": config.steer.to_recipe(),
        **({"sources": config.steer.sources} if config.steer.sources else {}),
        "temperature": config.steer.temperature,
        "model": run.identity.model,
        "states": run.digest("teacher_states", round_),
        "trajectories": run.digest("trajectories", round_),
    }

    def work(writer: StageWriter) -> dict[str, Any]:
        heads, tokenizer = load_heads(config), load_tokenizer(config.model)
        head, own = heads.matrix, run.recipes()
        classes = styling.classify(tokenizer, len(head), config.style.classes)
        substance = styling.substance_only(classes, config.style.classes).to(head.device)
        measured = _evenly_spaced(
            list(dict.fromkeys(key for _, keys in state_keys(run, round_) for key in keys)), config.style.rollouts
        )
        parts: dict[str, list[styling.Shift]] = {}
        tokens: dict[str, list[np.ndarray]] = {}  # by signal: rollouts may have different pools
        positions: dict[str, list[np.ndarray]] = {}
        for rollout, ids, states in cached_rollouts(run, round_, heads, progress, measured):
            recipes = styling.signal_recipes(tuple(states), own[rollout.problem_id])
            limits = config.steer.batch_tokens, config.steer.temperature
            for name, shift in styling.measure_shifts(states, recipes, substance, head, *limits).items():
                parts.setdefault(name, []).append(shift)
                tokens.setdefault(name, []).append(classes[ids.cpu()].numpy())
                positions.setdefault(name, []).append(np.arange(len(ids)))
        names = [c.name for c in config.style.classes]
        rows: list[dict[str, Any]] = []
        metrics: dict[str, float] = {}
        for name, of_rollouts in parts.items():
            shifts, token_classes = {name: concatenate(of_rollouts)}, np.concatenate(tokens[name])
            rows += styling.style_rows(shifts, token_classes, np.concatenate(positions[name]), names)
            metrics |= styling.shift_metrics(shifts, token_classes, names)
        writer.write_shard(0, to_arrow(STYLE, rows))
        return {"numbers": metrics, "rollouts": len(measured)}

    return run.carry_out("style", round_, inputs, work)


def _evenly_spaced(keys: Sequence[Key], most: int) -> set[Key]:
    """At most `most` of the rollouts with cached states, evenly spaced."""
    count = min(most, len(keys))
    return {keys[i * len(keys) // count] for i in range(count)}
