"""Prefect artifacts: keys, and the progress of long stages (items done, rate, time left) in the UI."""

from __future__ import annotations

import time
from typing import Any
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.logging import get_run_logger

from ogls.progress import seconds_left
from ogls.records import StageResult
from ogls.records.stages import STAGES_BY_NAME

_UPDATE_SECONDS = 2.0  # the UI does not poll more often


class ArtifactProgress:
    """A progress callback that updates a Prefect artifact.

    Each stage of a run has one artifact; each round is a version of it. If Prefect is unavailable the stage continues:
    the artifact is no longer updated, and one warning is logged.
    """

    def __init__(self, run: str, stage: str, round_: int):
        self.unit = STAGES_BY_NAME[stage].unit
        self.key = artifact_key(f"{run}-{stage}")
        self.label = f"{run} r{round_:03d} {stage}"
        self.started = self.last_sent = time.monotonic()
        self.artifact_id: UUID | None = None
        self.unavailable = False

    def __call__(self, done: int, total: int) -> None:
        if self.artifact_id is None or time.monotonic() - self.last_sent >= _UPDATE_SECONDS:
            self._update(done, total)

    def finish(self, result: StageResult) -> None:
        """Complete the artifact, if it was created."""
        if self.artifact_id:
            self._send(100.0, f"{self.label}: done, {result.rows} rows in {result.seconds:.1f} s")

    def _update(self, done: int, total: int) -> None:
        self.last_sent = time.monotonic()
        elapsed = self.last_sent - self.started
        rate = done / elapsed if elapsed else 0.0
        left = seconds_left(done, total, elapsed)
        time_left = f", {left:.0f} s left" if left is not None else ""
        description = f"{self.label}: {done} of {total} {self.unit}, {rate:.3g} per second{time_left}"
        self._send(100.0 * done / max(total, 1), description)

    def _send(self, percent: float, description: str) -> None:
        if not self.unit or self.unavailable:
            return
        try:
            if self.artifact_id is None:
                created: Any = create_progress_artifact(progress=percent, key=self.key, description=description)
                self.artifact_id = created
            else:
                update_progress_artifact(self.artifact_id, progress=percent, description=description)
        except Exception as error:  # no error of the server may fail the stage
            self.unavailable = True
            get_run_logger().warning(f"{self.label}: live progress is no longer updated ({type(error).__name__})")


def artifact_key(name: str) -> str:
    """The artifact key for a name: characters that Prefect does not allow, such as dots, become dashes."""
    return "".join(c if c.isalnum() else "-" for c in name).strip("-")
