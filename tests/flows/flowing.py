"""Configurations for flow tests."""

from __future__ import annotations

from pathlib import Path

from conftest import small_config

from ogls.config import RunConfig


def tracked(root: Path, *overrides: str) -> RunConfig:
    """The small configuration, tracked in a database of its own."""
    return small_config(
        root,
        "tracking.enabled=true",
        f"tracking.uri=sqlite:///{root}/ml/mlflow.db",
        f"tracking.artifacts={root}/ml/artifacts",
        "execution.retry_seconds=0",
        *overrides,
    )
