"""Prefect artifacts: their keys, and the progress of long stages (done, rate, time left) in the UI."""

from __future__ import annotations

import time
from typing import Any
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.logging import get_run_logger

from ogls.records import StageResult
from ogls.records.stages import STAGES_BY_NAME

_SECONDS = 2.0  # between two updates: the UI asks no more often, and a server has other things to do


class ArtifactProgress:
    """What a stage calls with (done, total). An artifact a stage of a run; each round is a version of it.

    Prefect being away never disturbs the stage: the artifact then stays behind, and the log says so once.
    """

    def __init__(self, run: str, stage: str, round_: int):
        self.unit = STAGES_BY_NAME[stage].unit
        self.key = artifact_key(f"{run}-{stage}")
        self.label = f"{run} r{round_:03d} {stage}"
        self.started = self.last_sent = time.monotonic()
        self.artifact: UUID | None = None
        self.unavailable = False

    def __call__(self, done: int, total: int) -> None:
        if self.artifact is None or time.monotonic() - self.last_sent >= _SECONDS:
            self._update(done, total)

    def finish(self, result: StageResult) -> None:
        """The last word, if there was a first."""
        if self.artifact:
            self._send(100.0, f"{self.label}: done, {result.rows} rows in {result.seconds:.1f} s")

    def _update(self, done: int, total: int) -> None:
        self.last_sent = time.monotonic()
        spent = self.last_sent - self.started
        rate = done / spent if spent else 0.0
        left = f", {(total - done) / rate:.0f} s left" if rate else ""
        said = f"{self.label}: {done} of {total} {self.unit}, {rate:.3g} a second{left}"
        self._send(100.0 * done / max(total, 1), said)

    def _send(self, share: float, said: str) -> None:
        if not self.unit or self.unavailable:
            return
        try:
            if self.artifact is None:
                made: Any = create_progress_artifact(progress=share, key=self.key, description=said)
                self.artifact = made
            else:
                update_progress_artifact(self.artifact, progress=share, description=said)
        except Exception as error:  # whatever ails the server, the stage goes on
            self.unavailable = True
            get_run_logger().warning(f"{self.label}: no live progress any more ({type(error).__name__})")


def artifact_key(name: str) -> str:
    """A name as an artifact's key: lower-case letters, digits and dashes, while run names may have dots."""
    return "".join(c if c.isalnum() else "-" for c in name).strip("-")
