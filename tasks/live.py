"""Progress of the long stages as Prefect artifacts: the UI shows how far they are, how fast, and how long yet."""

from __future__ import annotations

import time
from typing import Any
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.logging import get_run_logger

from ogls.records import StageResult

UNITS = {"sample": "rollouts", "verify": "answers", "teach": "groups", "train": "steps", "evaluate": "completions"}
_SECONDS = 2.0  # between two updates: the UI asks no more often, and a server has other things to do


class LiveArtifact:
    """What a stage calls with (done, total). An artifact a stage of a run; each round is a version of it.

    Prefect being away never disturbs the stage: the artifact then stays behind, and the log says so once.
    """

    def __init__(self, run: str, stage: str, round_: int):
        self.unit = UNITS.get(stage)
        self.key = artifact_key(f"{run}-{stage}")
        self.what = f"{run} r{round_:03d} {stage}"
        self.began = self.told = time.monotonic()
        self.artifact: UUID | None = None
        self.away = False

    def __call__(self, done: int, total: int) -> None:
        if self.artifact is None or time.monotonic() - self.told >= _SECONDS:
            self._tell(done, total)

    def finished(self, result: StageResult) -> None:
        """The last word, if there was a first."""
        if self.artifact:
            self._send(100.0, f"{self.what}: done, {result.rows} rows in {result.seconds:.1f} s")

    def _tell(self, done: int, total: int) -> None:
        self.told = time.monotonic()
        spent = self.told - self.began
        rate = done / spent if spent else 0.0
        left = f", {(total - done) / rate:.0f} s left" if rate else ""
        said = f"{self.what}: {done} of {total} {self.unit}, {rate:.3g} a second{left}"
        self._send(100.0 * done / max(total, 1), said)

    def _send(self, share: float, said: str) -> None:
        if not self.unit or self.away:
            return
        try:
            if self.artifact is None:
                made: Any = create_progress_artifact(progress=share, key=self.key, description=said)
                self.artifact = made
            else:
                update_progress_artifact(self.artifact, progress=share, description=said)
        except Exception as error:  # whatever ails the server, the stage goes on
            self.away = True
            get_run_logger().warning(f"{self.what}: no live progress any more ({type(error).__name__})")


def artifact_key(name: str) -> str:
    """A name as an artifact's key: lower-case letters, digits and dashes, while run names may have dots."""
    return "".join(c if c.isalnum() else "-" for c in name).strip("-")
