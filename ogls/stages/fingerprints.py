"""Inputs that the fingerprints of several stages share."""

from __future__ import annotations

from typing import Any

from ogls.stages.run import Run


def policy_inputs(run: Run) -> dict[str, Any]:
    """The settings that decide what a model computes from a problem."""
    config = run.identity
    adapter = config.adapter.model_copy(update={"start": run.policy_hash(0)})  # also if it is in another store
    return {"model": config.model, "adapter": adapter, "prompts": config.prompts, "seed": config.seed}
