"""A process that is killed before any single write of a run: each write of every stage is a point of its own."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from conftest import carry_out, content, small_config

from ogls.records.stages import STAGES
from ogls.stages.run import Run
from ogls.store.storage import Storage


class Killed(BaseException):
    """Stands for SIGKILL: no code of ours handles it."""


class KillPoints:
    """Raises Killed the first time that each write or removal is about to happen; the next attempt gets past it."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.passed: set[tuple[str, str, str]] = set()
        for name in ("write_bytes", "write_file", "remove"):
            patch.setattr(Storage, name, self._killing(getattr(Storage, name)))

    def _killing(self, real: Any) -> Any:
        def operation(storage: Storage, path: str, *data: Any) -> Any:
            digest = hashlib.sha256(data[0]).hexdigest() if data and path.endswith("partial.json") else ""
            point = (real.__name__, path, digest)  # partial.json is written once a shard
            if point not in self.passed:
                self.passed.add(point)
                raise Killed
            return real(storage, path, *data)

        return operation


def test_a_run_killed_before_each_of_its_writes_has_the_same_result(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = KillPoints(monkeypatch)
    attempts = 0
    while True:
        attempts += 1
        try:
            run = carry_out(small_config(tmp_path, "rounds=1"))
            break
        except Killed:
            continue
    written = {path.split("/")[1] for _, path, _ in points.passed}
    assert written >= {"run.json", "policy", "contexts", "steered", "summaries", *(s.table for s in STAGES)}
    assert attempts == len(points.passed) + 1 > 60
    first_round = {name: files for name, files in content(finished).items() if name.endswith((" 0", " 1"))}
    assert content(run) == first_round
