"""The loaded models of a process that carries out stage after stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ogls.config import RunConfig
from ogls.models.policy import Policy


class KeptModels:
    """Models by path; "" is the run's own. A model is loaded once, and leaves a GPU between two stages."""

    def __init__(self) -> None:
        self._models: dict[str, Policy] = {}

    def get(self, path: str, load: Callable[[], Policy], device: Any) -> Policy:
        """The model of a path, on `device`; loads it if there is none."""
        if path not in self._models:
            self._models[path] = load()
        policy = self._models[path]
        policy.move_to(device)
        return policy

    def release_memory(self) -> None:
        """Move all models from a GPU to the CPU."""
        for policy in self._models.values():
            if policy.device.type == "cuda":
                import torch

                policy.move_to("cpu")
                torch.cuda.empty_cache()


_kept: tuple[RunConfig, KeptModels] | None = None


def process_models(config: RunConfig) -> KeptModels:
    """The models that this process keeps for a run. Another run, or another configuration of it, drops them."""
    global _kept
    if _kept is None or _kept[0] != config:
        _kept = config, KeptModels()
    return _kept[1]


def drop_models() -> None:
    """Free the models that this process keeps."""
    global _kept
    _kept = None
