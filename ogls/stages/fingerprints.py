"""Inputs that several stages share in their fingerprints."""

from __future__ import annotations

from typing import Any

from ogls.stages.run import Run


def policy_inputs(run: Run) -> dict[str, Any]:
    """What decides the model and its prompts, wherever one runs."""
    config = run.config
    adapter = config.adapter.model_copy(update={"start": run.policy_hash(0)})  # its content, wherever it lies
    return {"model": config.model, "adapter": adapter, "prompts": config.prompts, "seed": config.seed}
